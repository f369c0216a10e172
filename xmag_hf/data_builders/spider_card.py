"""The card of a built SPIDER: README.md with the shards pinned by split."""

from __future__ import annotations

from typing import Any

from .card import SIZE_CLASSES
from .spider_records import MISSING, SPLITS
from .spider_source import LICENCE

SHOWN_PROBLEMS = 20
FILLED = dict(
    zip(
        MISSING,
        (
            "filled with white",
            "filled with the mirror image of the tissue beside them",
            "not there: records without all 24 neighbours were dropped",
        ),
        strict=True,
    )
)


def card_text(described: dict[str, Any], size_bytes: int) -> str:
    """README.md.

    Args:
        described: Content of spider.json.
        size_bytes: Of the shards.
    """
    organ, options = described["organ"], described["options"]
    rows = described["rows"]
    total = sum(rows.values())
    size_class = next((name for limit, name in SIZE_CLASSES if total < limit), "n>10M")
    pins = "\n".join(
        f"  - split: {split}\n    path: data/{split}-*.parquet" for split in SPLITS if rows[split]
    )
    table = "\n".join(
        f"| {name} | {' | '.join(f'{counts[split]:,}' for split in SPLITS)} |"
        for name, counts in described["classes"].items()
    )
    commit = f", commit `{described['revision']}`" if described["revision"] else ""
    # The pin: without it `load_dataset` was seen to take the JSON beside the shards for the data.
    # The description: `datasets` 5.2 names its cache by folder name and this block alone, so that a
    # data set built again with other options was seen to come back as the old one.
    return f"""---
configs:
- config_name: default
  description: SPIDER-{organ}, fingerprint {described["fingerprint"]}
  data_files:
{pins}
license: {LICENCE.lower()}
task_categories:
- image-classification
tags:
- pathology
- spider
- xmag
size_categories:
- {size_class}
---

# SPIDER-{organ} as pairs of a 20x and a 5x image

{total:,} labelled patches, {size_bytes / 1e6:,.0f} MB, made from {described["source"]} of
[SPIDER-{organ}](https://huggingface.co/datasets/histai/SPIDER-{organ}){commit}.

```python
from datasets import load_dataset

spider = load_dataset("path/to/this/folder")  # streaming=True works too
```

**Licence.** {LICENCE}, that of SPIDER: Nechaev, Pchelnikov and Ivanova 2025, *SPIDER: A
Comprehensive Multi-Organ Supervised Pathology Dataset and Baseline Models*, arXiv:2503.02876.
Changed here: neighbours stitched and reduced to `image_5x`; part of train set aside as validation.

## Columns

`image_20x`: SPIDER's labelled patch, its file untouched (224 x 224 px; `mpp`, 0.5 um/px).
`image_5x`: what surrounds it (224 x 224 px; `mpp_5x`, 2.0 um/px): the 5 x 5 patches stitched, the
central 896 px reduced by 4 with Lanczos-3; the labelled patch is its central 56 px. `label`: the
class. `xmag probe` takes the scale of `image_20x` from `mpp`, that of `image_5x` from `mpp_5x`.
`slide_id`: as SPIDER gives it; split by it. `num_missing_context`: of the 24 neighbours, how many
SPIDER does not have; here they are {FILLED[options["missing"]]}.
Both scales are nominal: SPIDER says 20x and gives no um/px.

## Records

| class | {" | ".join(SPLITS)} |
|---|{"---:|" * len(SPLITS)}
{table}
| **all** | {" | ".join(f"{rows[split]:,}" for split in SPLITS)} |

`test` is SPIDER's own; `validation` is {options["validation"]:.0%} of the slides of its `train`,
chosen by a hash of slide_id and seed {options["seed"]} (listed in `spider.json`).

{_missing_text(described)}{_notes(described)}
Fingerprint `{described["fingerprint"]}`, xmag_hf {described["versions"]["xmag_hf"]}; options,
versions and sha256 of the source are in `spider.json`.
"""


def _missing_text(described: dict[str, Any]) -> str:
    total = sum(described["missing"].values())
    some = total - described["missing"].get("0", 0)
    dropped = described["dropped"]
    text = f"Neighbours are missing in {some:,} of {total:,} records"
    return text + (f"; {dropped:,} were dropped for that.\n" if dropped else ".\n")


def _notes(described: dict[str, Any]) -> str:
    notes = [*described["warnings"], *described["problems"][:SHOWN_PROBLEMS]]
    more = len(described["problems"]) - SHOWN_PROBLEMS
    if more > 0:
        notes.append(f"{more:,} more problems, in `spider.json`")
    if not notes:
        return ""
    return "\n## Noticed while building\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"

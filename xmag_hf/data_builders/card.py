"""The card of a corpus: README.md with the shard pin, and pairs by cancer type as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmag_hf.atomic_write import write_atomically

from .pairs import SlideRecord
from .reading_paths import wide_mpp, wide_px

FIGURE = "cancer_types.png"
UNKNOWN = "not given"
SIZE_CLASSES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


@dataclass(frozen=True)
class CancerTypeCount:
    """Slides, patients and pairs of a cancer type."""

    cancer_type: str
    slides: int
    patients: int
    pairs: int


def count_cancer_types(records: Sequence[SlideRecord]) -> list[CancerTypeCount]:
    """What the corpus holds of each cancer type (the paper's Figure 1c), most pairs first."""
    used = [record for record in records if record.pairs]
    types = dict.fromkeys(record.cancer_type for record in used)
    counts = []
    for name in types:
        mine = [record for record in used if record.cancer_type == name]
        patients = len({record.patient_id for record in mine})
        pairs = sum(record.pairs for record in mine)
        counts.append(CancerTypeCount(name or UNKNOWN, len(mine), patients, pairs))
    return sorted(counts, key=lambda count: (-count.pairs, count.cancer_type))


def write_card(folder: Path, corpus: dict[str, Any], records: Sequence[SlideRecord]) -> None:
    """Write README.md and, where matplotlib is installed, the bar picture.

    Args:
        folder: Of the corpus.
        corpus: Content of corpus.json.
        records: One a slide.
    """
    counts = count_cancer_types(records)
    picture = _draw(folder / FIGURE, counts)
    size_bytes = sum(file.stat().st_size for file in (folder / "data").glob("*.parquet"))
    write_atomically(folder / "README.md", _card_text(corpus, records, counts, size_bytes, picture))


def _card_text(
    corpus: dict[str, Any],
    records: Sequence[SlideRecord],
    counts: list[CancerTypeCount],
    size_bytes: int,
    picture: bool,
) -> str:
    pairs = corpus["pairs"]
    size_class = next((name for limit, name in SIZE_CLASSES if pairs < limit), "n>10M")
    statuses = Counter(record.status for record in records)
    table = "\n".join(
        f"| {c.cancer_type} | {c.slides:,} | {c.patients:,} | {c.pairs:,} |" for c in counts
    )
    options = "\n".join(f"| {key} | {value} |" for key, value in corpus["options"].items())
    unreadable = sum(record.unreadable for record in records)
    # The pin: without it `load_dataset` was seen to take the manifest for the data, in silence.
    # The description: `datasets` 5.2 names its cache by folder name and this block alone, so that
    # another corpus in a folder of that name was seen to come back as the first one.
    return f"""---
configs:
- config_name: default
  description: paired 20x and 5x images, fingerprint {corpus["fingerprint"]}
  data_files:
  - split: train
    path: data/*.parquet
license: other
license_name: that-of-the-slides
task_categories:
- image-feature-extraction
tags:
- pathology
- whole-slide-images
- xmag
size_categories:
- {size_class}
---

# Paired 20x / 5x corpus

{pairs:,} pairs from {statuses["ok"]:,} slides, {size_bytes / 1e6:,.0f} MB. Each pair is one square
of tissue, 448 um wide: `image_20x` (896 x 896 px at 0.5 um/px) and `image_5x` (the same pixels
reduced by 4 with Lanczos-3, before any JPEG).

```python
from datasets import load_dataset

pairs = load_dataset("path/to/this/folder", split="train")  # streaming=True works too
```

**Licence.** The pixels stay under the licence of the slides they were cut from (column `source`,
`manifest.jsonl`); this tool adds none. Settle it before sharing the corpus.

## Pairs by cancer type

| cancer type | slides | patients | pairs |
|---|---:|---:|---:|
{table}
{f"{chr(10)}![Pairs by cancer type]({FIGURE}){chr(10)}" if picture else ""}
## Slides

{", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))}; {unreadable} regions could
not be decoded and are left out. `manifest.jsonl` has a line a slide: um/px and level used, pairs
kept, and why a slide was skipped.

## Columns

`x`, `y`: top-left corner, level-0 px. `width0`: exact width, level-0 px (448 / `mpp0`). `mpp0`:
um/px of level 0. `level`: pyramid level read. `tissue_fraction`: share of the square that is
tissue. `slide_id`, `patient_id`, `cancer_type`, `source`: of the slide. Split by `patient_id`:
squares of a slide overlap when `stride` is below 896.
{_other_columns(corpus["options"])}
## Made with

| option | value |
|---|---|
{options}

Fingerprint `{corpus["fingerprint"]}`, xmag_hf {corpus["versions"]["xmag_hf"]}.
"""


def _other_columns(options: dict[str, Any]) -> str:
    """What the optional images are, if there are any."""
    text = ""
    if options["reading_paths"]:
        text += """
`image_5x_scanner`, `image_5x_fast`: the same square at 2.0 um/px from the scanner's own coarser
level, and as reduced JPEG decoding shows it; null where a slide has no such level. The um/px behind
them are in `manifest.jsonl`.
"""
    if options["margin"]:
        text += f"""
`image_5x_wide`: the square and {options["margin"]:g} of its width more, centred on it, at
{wide_mpp(wide_px(options["margin"])):.4g} um/px.
"""
    return text


def _draw(path: Path, counts: list[CancerTypeCount]) -> bool:
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display
    except ImportError:
        return False
    figure = Figure(figsize=(6, 1.2 + 0.32 * max(1, len(counts))), layout="constrained")
    axes = figure.add_subplot()
    names = [count.cancer_type for count in reversed(counts)]
    bars = axes.barh(names, [count.pairs for count in reversed(counts)], color="#7a4a8c")
    axes.bar_label(bars, labels=[f"{count.pairs:,}" for count in reversed(counts)], padding=3)
    axes.set_xlabel("pairs")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True

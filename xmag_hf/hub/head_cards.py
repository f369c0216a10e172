"""Model cards of slide-level heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = {
    "xmag_abmil": (
        "Gated-attention (ABMIL) head",
        "[1802.04712](https://arxiv.org/abs/1802.04712)",
    ),
    "xmag_mean_pool": ("Mean-pool head", "a baseline"),
}


@dataclass(frozen=True, kw_only=True)
class HeadCardFacts:
    """Everything that a head's card says.

    Attributes:
        model_type: `xmag_abmil` or `xmag_mean_pool`.
        classes: Names, in the order of the logits.
        identity: Of the bags: encoder, encoder_revision, pooling, mpp, patch_px, and the nominal
            target_magnification where there is no mpp; None where they do not say.
        encoder_licence: As the encoder's page says; None where nobody said.
        cohorts: Name -> class -> slides that it was trained or tested on.
        patients: Name of the cohort -> patients.
        origin: Which slides it has learnt from, and how it was chosen, in a sentence or two.
        results: Markdown: tables with headings of the third level.
        options: Of the study, as given to it.
        versions: Package name to version.
    """

    model_type: str
    classes: Sequence[str]
    identity: Mapping[str, Any]
    encoder_licence: str | None
    cohorts: Mapping[str, Mapping[str, int]]
    patients: Mapping[str, int]
    origin: str
    results: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]


def render_head_card(facts: HeadCardFacts) -> str:
    """The card.

    Args:
        facts: Of one head.

    Returns:
        README.md of its folder: YAML metadata as the Hub reads it, then Markdown.
    """
    from huggingface_hub import ModelCardData

    title, source = KINDS[facts.model_type]
    metadata = ModelCardData(
        library_name="transformers",
        license="other",
        license_name="see-card",
        license_link="README.md#licence",
        tags=["pathology", "histology", "whole-slide-images", "multiple-instance-learning", "xmag"],
    )
    encoder = facts.identity.get("encoder") or "an encoder that its bags do not name"
    return f"""---
{metadata}
---

# {title}: {" / ".join(facts.classes)}

Takes the bag of a slide, embeddings by `{encoder}` of H&E patches, and gives a probability for each
class and an attention for each patch ({source}), in the implementation of xmag_hf
{facts.versions.get("xmag_hf", "")}. {facts.origin}

**For research use only. Not a medical device**, not validated for diagnosis, and not to be used for
it. Scanners, stains, organs and patients other than those below are untested.

## Use

```bash
xmag predict BAGS_OR_SLIDES --head THIS_FOLDER --out predictions.csv
```

```python
import torch
from transformers import AutoModel
from xmag_hf.embedding import read_bag
from xmag_hf.mil import check_bag

head = AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True).eval()
bag = read_bag("SLIDE.h5")
check_bag(head.config, bag)  # refuses a bag of another encoder or scale
with torch.no_grad():
    output = head(torch.from_numpy(bag.features).float()[None])
probabilities = output.logits.softmax(-1)  # (1, {len(facts.classes)})
attention = output.attentions  # (1, patches), sums to 1
```

## Bags it takes

Bags that say anything else are refused by `xmag predict` and `check_bag`; what is not stated cannot
be checked.

{_pairs(_stated(facts.identity))}

## Slides

{_cohorts(facts)}

## Results

{facts.results}

## Training

{_pairs(dict(sorted(facts.options.items())))}

{" ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))}

## Licence

The encoder's: {facts.encoder_licence or "not stated; see its page"}. Terms of slides and labels:
not stated here; ask whoever trained this head. Whether weights trained on a model's outputs are a
derivative work of that model is not settled.
"""


def _cohorts(facts: HeadCardFacts) -> str:
    rows = [
        (name, facts.patients[name], *(counts[label] for label in facts.classes))
        for name, counts in facts.cohorts.items()
    ]
    return _table(("cohort", "patients", *(f"slides: {name}" for name in facts.classes)), rows)


def _stated(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What bags say of themselves; some things only where they say them."""
    rarely = ("target_magnification", "normalisation")
    return {
        name: "not stated" if value is None else value
        for name, value in identity.items()
        if value is not None or name not in rarely
    }


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(("", ""), [(f"`{name}`", value) for name, value in values.items()])


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; a bar or a line break in a cell would end it."""
    lines = [list(headings), ["---"] * len(headings), *rows]
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)

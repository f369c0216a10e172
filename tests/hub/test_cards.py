"""Model cards: read back as the Hub reads them."""

from __future__ import annotations

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard

from xmag_hf.hub import CardFacts, render_card

ROW = {
    "part": "colon:y>0.75", "n_pairs": 40, "n_disjoint": 6, "student": "distilled",
    "level": "global", "cosine": 0.91234, "centred_cosine": 0.5, "retrieval": 0.25,
    "chance": 0.025, "cosine_ci": (0.9, 0.92),
}  # fmt: skip
FACTS = CardFacts(
    model_type="xmag_lite",
    size="lite",
    parameters=3_371_024,
    embed_dim=1280,
    patch_px=224,
    mpp=2.0,
    teacher="uni2-h",
    teacher_revision="abc123",
    teacher_licence="CC-BY-NC-ND 4.0",
    teacher_source="Chen et al. 2024",
    start="imagenet",
    start_licence="Apache-2.0",
    corpus="corpus",
    corpus_fingerprint="f00d",
    corpus_source=None,
    corpus_licences=["CC0-1.0"],
    n_pairs=2885,
    n_slides=1,
    options={"learning_rate": 1e-3, "holdout": ("a|b",), "note": "two\nlines"},
    versions={"xmag_hf": "0.1.0", "torch": "2.15.0"},
    alignment=None,
    downstream=None,
    seeds=[7],
    date="2026-01-02",
    repo_id="org/name",
)


def _table(card: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, as a Markdown reader splits them."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in line] for line in cells]


def test_metadata_as_the_hub_reads_it():
    card = ModelCard(render_card(FACTS))
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert {"pathology", "histology", "xmag", "distillation"} <= set(data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "non-commercial-see-card")
    free = dataclasses.replace(FACTS, teacher_licence="Apache-2.0")
    data = ModelCard(render_card(free)).data.to_dict()
    assert data["license"] == "apache-2.0" and "license_name" not in data


def test_says_what_was_not_measured():
    card = render_card(FACTS)
    assert "Alignment: not measured." in card
    assert "Downstream tasks: not measured." in card
    assert not re.search(r"\{\{|\}\}|\{%|\{#|\bNone\b|Undefined", card)


def test_carries_the_facts():
    card = render_card(FACTS)
    for words in (
        "3.4M-parameter", "arXiv 2509.23097", 'where = "org/name"', "trust_remote_code=True",
        "448 um", "2.0 um/px", "(1, 1280)", "Not a medical device",
        "Trained on 2,885 pairs from 1 slide.", "Chen et al. 2024", "not settled",
    ):  # fmt: skip
        assert words in card, words
    training = dict(_table(card, "Training")[2:])
    assert training["teacher"] == "`uni2-h` at `abc123`"
    assert training["`learning_rate`"] == "`0.001`"
    assert training["seeds"] == "7"
    assert dict(_table(card, "Data")[2:])["source"] == "not stated"


def test_options_cannot_break_the_table():
    rows = _table(render_card(FACTS), "Training")
    assert all(len(row) == 2 for row in rows)
    assert ["`note`", "`two lines`"] in rows


def test_alignment_table():
    start = ROW | {"student": "start", "cosine": 0.8, "retrieval": 0.05}
    constant = ROW | {"student": "constant", "centred_cosine": None, "retrieval": None}
    rows = _table(
        render_card(dataclasses.replace(FACTS, alignment=[ROW, start, constant])),
        "Alignment with the teacher",
    )
    head, distilled, last = rows[0], dict(zip(rows[0], rows[2], strict=True)), rows[4]
    assert distilled["cosine"] == "0.912 (0.900 to 0.920)"
    assert distilled["centred cosine"] == "0.500"
    assert distilled["disjoint"] == "6" and distilled["chance"] == "0.025"
    assert dict(zip(head, last, strict=True))["retrieval"] == "-"


@pytest.mark.parametrize("value", [float("nan"), 1.5, -2.0])
def test_impossible_scores_are_refused(value):
    facts = dataclasses.replace(FACTS, alignment=[ROW | {"centred_cosine": value}])
    with pytest.raises(ValueError, match="colon:y>0.75, global, distilled: centred_cosine="):
        render_card(facts)


def test_template_is_the_one_at_the_root(project_root):
    packaged = project_root / "xmag_hf" / "hub" / "MODEL_CARD.md"
    assert packaged.resolve() == (project_root / "MODEL_CARD.md").resolve()

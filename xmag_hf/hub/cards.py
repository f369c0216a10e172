"""Model cards: MODEL_CARD.md filled with the facts of one student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NotRequired, TypedDict

from .licences import student_licence

NOT_MEASURED = "not measured"
MEASURES = ("cosine", "centred_cosine", "retrieval")
ALIGNMENT_NOTE = (
    "Held-out pairs, scored after one ridge map from each frozen encoder to the teacher's space, "
    "fitted on training pairs. `constant` is the mean training-teacher feature: its cosine is what "
    "a model gets that has learnt nothing, its centred cosine is 0. Retrieval is top-1: global "
    "among all held-out pairs of the part, local among the sixteen cells of a pair; chance stands "
    "beside it. `disjoint` counts regions that do not overlap: the honest sample size."
)


class AlignmentRow(TypedDict):
    """Scores of one student on one held-out part.

    Cosines are in [-1, 1], retrieval and chance are shares in [0, 1]. An interval is (low, high).
    None means that the measure does not exist for that row, as retrieval for the constant.
    """

    part: str
    n_pairs: int
    n_disjoint: int
    student: str  # start, distilled or constant
    level: str  # global or local
    cosine: float | None
    centred_cosine: float | None
    retrieval: float | None
    chance: float | None
    cosine_ci: NotRequired[tuple[float, float]]
    centred_cosine_ci: NotRequired[tuple[float, float]]
    retrieval_ci: NotRequired[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        model_type: `xmag` or `xmag_lite`.
        size: `base`, `small`, `tiny` or `lite`.
        parameters: Number of weights.
        embed_dim: Length of an embedding.
        patch_px: Side of the input, px.
        mpp: um/px of the input.
        teacher: Encoder id.
        teacher_revision: Digest of its weights.
        teacher_licence: As its page says; None where nobody said.
        teacher_source: Paper or page to cite.
        start: What the weights started from (`dinov2`, `imagenet`, `random`, a path or Hub id).
        start_licence: Of those weights; `none` for random ones.
        corpus: Folder name or Hub repository.
        corpus_fingerprint: From corpus.json.
        corpus_source: Where the slides come from; None where nobody said.
        corpus_licences: Of the slides; may be empty where nobody said.
        n_pairs: Pairs trained on.
        n_slides: Slides they come from.
        options: Of the run, as given to it.
        versions: Package name to version.
        alignment: Scores; None where nothing was measured.
        downstream: One line on other measurements, or None.
        seeds: Of the run.
        date: ISO date.
        repo_id: What `from_pretrained` is given: the folder, or `<org>/<name>`.
        teacher_view: `20x`, or `5x` where the teacher saw the 5x view enlarged.
    """

    model_type: str
    size: str
    parameters: int
    embed_dim: int
    patch_px: int
    mpp: float
    teacher: str
    teacher_revision: str
    teacher_licence: str | None
    teacher_source: str
    start: str
    start_licence: str | None
    corpus: str
    corpus_fingerprint: str
    corpus_source: str | None
    corpus_licences: Sequence[str | None]
    n_pairs: int
    n_slides: int
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    alignment: Sequence[AlignmentRow] | None
    downstream: str | None
    seeds: Sequence[int]
    date: str
    repo_id: str
    teacher_view: str = "20x"


def render_card(facts: CardFacts) -> str:
    """Fill the template.

    Args:
        facts: Of one student.

    Returns:
        README.md of its folder: YAML metadata as the Hub reads it, then Markdown.

    Raises:
        LicenceError: The start's licence forbids sharing changed versions.
        ValueError: An alignment row holds a number that is none; the row is named.
    """
    from huggingface_hub import ModelCard, ModelCardData

    licence = student_licence(facts.teacher_licence, facts.start_licence, facts.corpus_licences)
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": licence.hub_id,
        "tags": ["pathology", "histology", "xmag", "distillation"],
    }
    if licence.name:
        metadata |= {"license_name": licence.name, "license_link": "README.md#licences"}
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=_template(),
        title=f"XMAG {facts.size}",
        parameters=f"{facts.parameters / 1e6:.1f}M-parameter",
        patch_um=_number(facts.patch_px * facts.mpp),
        mpp=_number(facts.mpp),
        patch_px=facts.patch_px,
        embed_dim=facts.embed_dim,
        distilled_from=_distilled_from(facts),
        teacher_citation=f"{facts.teacher} ({facts.teacher_source})",
        versions=facts.versions,
        repo_id=facts.repo_id,
        n_slides=f"{facts.n_slides:,}" if facts.n_slides != 1 else 1,
        n_pairs=f"{facts.n_pairs:,}",
        data_rows=_rows(_data(facts)),
        training_rows=_rows(_training(facts)),
        alignment=_alignment(facts.alignment),
        downstream=facts.downstream or NOT_MEASURED,
        licences=licence.text,
    )
    return str(card)


def render_start_card(
    source: str, model_type: str, parameters: int, licence: str | None = None, *, copied: bool
) -> str:
    """Card of weights that were converted, not distilled.

    Args:
        source: Name of what was converted.
        model_type: `xmag` or `xmag_lite`.
        parameters: Number of weights.
        licence: Of the source; None where nobody said.
        copied: The source was an XMAG, so there was nothing to compare.

    Returns:
        README.md of the folder.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license="other",
        license_name="that-of-the-source",
        license_link="README.md#licence",
        tags=["pathology", "xmag"],
    )
    return (
        f"---\n{metadata}\n---\n\n# Converted weights\n\n"
        f"`{source}` in the form of `{model_type}` ({parameters / 1e6:.1f}M parameters), "
        f"{'which it was already' if copied else 'checked to compute the same'}. Nothing was "
        "trained: this is a start for `train_distill.py --init`, or a released encoder under new "
        f"names.\n\n## Licence\n\nThat of the source: {licence or 'not stated; see its page'}.\n"
    )


def _template() -> str:
    return (resources.files("xmag_hf.hub") / "MODEL_CARD.md").read_text(encoding="utf-8")


def _distilled_from(facts: CardFacts) -> str:
    """What the student saw the teacher do; a control must not claim 20x detail."""
    if facts.teacher_view == "20x":
        return f"the 20x\nencoder `{facts.teacher}`"
    return (
        f"`{facts.teacher}`\nlooking at the same {facts.teacher_view} pixels enlarged four times: "
        "a control, whose\ntargets held no 20x detail"
    )


def _data(facts: CardFacts) -> dict[str, Any]:
    return {
        "corpus": f"`{facts.corpus}`",
        "fingerprint": f"`{facts.corpus_fingerprint}`",
        "slides": f"{facts.n_slides:,}",
        "pairs trained on": f"{facts.n_pairs:,}",
        "source": facts.corpus_source or "not stated",
        "licence": ", ".join(str(text or "not stated") for text in facts.corpus_licences)
        or "not stated",
    }


def _training(facts: CardFacts) -> dict[str, Any]:
    fixed = {
        "teacher": f"`{facts.teacher}` at `{facts.teacher_revision}`",
        "start": f"`{facts.start}`",
        "date": facts.date,
        "seeds": ", ".join(map(str, facts.seeds)),
    }
    options = {f"`{name}`": f"`{value}`" for name, value in sorted(facts.options.items())}
    versions = " ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    return fixed | options | {"versions": versions}


def _rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Cells of a Markdown table: a bar or a line break inside one would end it."""
    return [(_cell(name), _cell(value)) for name, value in table.items()]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _alignment(rows: Sequence[AlignmentRow] | None) -> str:
    """Markdown table of the scores, or that there are none."""
    if not rows:
        return f"Alignment: {NOT_MEASURED}."
    head = "| held-out part | pairs | disjoint | level | encoder | cosine | centred cosine | "
    lines = [head + "retrieval | chance |", "|---|--:|--:|---|---|--:|--:|--:|--:|"]
    for row in rows:
        cells = [row["part"], row["n_pairs"], row["n_disjoint"], row["level"], row["student"]]
        cells += [_score(row, measure) for measure in MEASURES]
        cells.append("-" if row["chance"] is None else f"{row['chance']:.3f}")
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n\n" + ALIGNMENT_NOTE


def _score(row: Mapping[str, Any], measure: str) -> str:
    value = row[measure]
    if value is None:
        return "-"
    if not -1.0001 <= value <= 1.0001:  # also refuses NaN
        raise ValueError(
            f"{row['part']}, {row['level']}, {row['student']}: {measure}={value} is no cosine and "
            "no share. Leave it out (None) or measure it again."
        )
    interval = row.get(f"{measure}_ci")
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _number(value: float) -> str:
    """2.0 as `2.0`, 448.0 as `448`, no rounding noise."""
    return f"{value:.1f}" if value < 10 and round(value, 1) == value else f"{value:g}"

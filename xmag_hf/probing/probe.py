"""The flow of a probe: rows -> embeddings -> protocol -> scores and tests -> report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xmag_hf._version import __version__
from xmag_hf.encoders import Encoder, EncoderCard, check_encoder, load_encoder, student_size

from . import report
from .counts import count_probe, nuclei_counts, nuclei_types
from .dense import cell_boxes, embed_cells
from .errors import ProbeError
from .features import check_scales, embed_images
from .images import LabelledImages, open_images
from .options import STUDENT_MPP, TEACHER_MPP, ProbeOptions
from .protocols import Predictions, cross_validated, official_split

logger = logging.getLogger(__name__)

PACKAGES = ["torch", "timm", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "pillow"]
# Called with what is being embedded, images finished since the last call, and images in all.
Advance = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Row:
    """A row of the report: an encoder at a scale.

    Attributes:
        label: Unique; names files and lines.
        role: `model`, or which control it is.
        name: As `load_encoder` takes it.
        mpp: um/px at which it sees the tissue.
    """

    label: str
    role: str
    name: str
    mpp: float


@dataclass(frozen=True)
class RowResult:
    """What came of a row.

    Attributes:
        row: The row.
        encoder: Facts of the encoder: revision, precision, normalisation, licence, width.
        questions: What is scored.
        scores: With intervals.
        details: Method -> what the protocol says of it (chosen C, folds ...).
    """

    row: Row
    encoder: dict[str, Any]
    questions: list[report.Question]
    scores: list[report.Score]
    details: dict[str, Any]


@dataclass(frozen=True)
class ProbeResult:
    """A finished probe, as it was written to `options.out`.

    Attributes:
        options: As given.
        data: Name, fingerprint, splits, classes, groups, share of the largest class.
        rows: In order; tests are against the first.
        comparisons: Paired tests.
        seconds: Of the whole run.
    """

    options: ProbeOptions
    data: dict[str, Any]
    rows: list[RowResult]
    comparisons: list[report.Comparison]
    seconds: float


def run_probe(options: ProbeOptions, advance: Advance = _silent) -> ProbeResult:
    """Probe every row, and write the report.

    Args:
        options: See there.
        advance: For progress bars.

    Returns:
        The result; `options.out` holds results.json, predictions and the confusion picture.

    Raises:
        ProbeError: Data, rows or labels that cannot be used.
        EncoderError: An encoder that cannot be had; all are asked for before data is read.
    """
    began = time.perf_counter()
    report.check_out(Path(options.out))
    rows = plan_rows(options)
    images = open_images(options)
    for row in rows:
        check_scales(images.at(row.mpp), row.mpp, options.max_enlarge)
    folder = report.open_report(Path(options.out))
    results = []
    for row in rows:
        encoder = load_encoder(row.name, device=device(options), precision=precision(options))
        results.append(_probe_row(row, encoder, images, options, folder, advance))
        del encoder  # the next one may need the memory
    comparisons = report.compare(
        [result.questions for result in results], samples=options.samples, seed=options.seed
    )
    seconds = time.perf_counter() - began
    result = ProbeResult(options, _describe(images, options), results, comparisons, seconds)
    report.close_report(folder, Path(options.out), _record(result))
    return result


# --- rows ------------------------------------------------------------------------------------


def plan_rows(options: ProbeOptions) -> list[Row]:
    """The rows of the report, each encoder known to be had and its scale known.

    Order: --model as given, --teacher at 20x, --teacher at 5x, --undistilled.

    Args:
        options: Names and scales.

    Returns:
        At least one row; labels are unique.

    Raises:
        ProbeError: No row, an encoder without a scale of its own and no --mpp, or --undistilled
            without an XMAG to take the architecture from.
        EncoderError: An encoder that cannot be had.
    """
    wanted: list[tuple[str, str, float | None]] = []
    for name in options.model:
        bare, mpp = split_scale(name)
        wanted.append(("model", bare, mpp if mpp is not None else options.mpp))
    if options.teacher is not None:
        wanted.append(("teacher", options.teacher, TEACHER_MPP))
        if options.teacher_at_5x:
            wanted.append(("teacher at 5x", options.teacher, STUDENT_MPP))
    if not wanted:
        raise ProbeError("nothing to probe: give --model or --teacher.")
    cards = {name: check_encoder(name) for _, name, _ in wanted}
    if options.undistilled is not None:
        size = _student_size([split_scale(name)[0] for name in options.model], cards)
        name = f"{options.undistilled}:{size}"
        if options.undistilled == "random" and options.seed:
            name += f":{options.seed}"
        cards[name] = check_encoder(name)
        wanted.append((f"undistilled ({options.undistilled})", name, STUDENT_MPP))
    rows = []
    for role, name, mpp in wanted:
        mpp = _own_scale(name, cards[name]) if mpp is None else mpp
        rows.append(Row(f"{_short(name)}@{mpp:g}", role, name, mpp))
    return _unique(rows)


def split_scale(name: str) -> tuple[str, float | None]:
    """NAME@MPP -> its parts; a name without a number after an @ is left whole."""
    bare, _, scale = name.rpartition("@")
    try:
        mpp = float(scale) if bare else None
    except ValueError:
        return name, None
    if mpp is not None and not mpp > 0:
        raise ProbeError(f"--model {name}: um/px must be above 0.")
    return (bare, mpp) if bare else (name, None)


def _own_scale(name: str, card: EncoderCard) -> float:
    if card.mpp is None:
        raise ProbeError(
            f"{name}: was made for natural images and has no um/px of its own. Say --mpp F (0.5 "
            f"for 20x, 2.0 for 5x), or {name}@0.5; as --teacher it runs at 0.5."
        )
    return float(card.mpp)


def _student_size(names: list[str], cards: dict[str, EncoderCard]) -> str:
    """Size of the first XMAG among `names`."""
    for name in names:
        # Only students are pooled by their own pooler, so nothing else is loaded to find out.
        size = student_size(load_encoder(name)) if cards[name].pooling == "pooler" else None
        if size is not None:
            return size
    raise ProbeError(
        "--undistilled takes the architecture of the first XMAG among --model, and there is none "
        "of size base, small, tiny or lite. Say --model random:SIZE or start:SIZE instead."
    )


def _short(name: str) -> str:
    """Last part of a path or repository."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _unique(rows: list[Row]) -> list[Row]:
    seen: dict[str, int] = {}
    unique = []
    for row in rows:
        seen[row.label] = count = seen.get(row.label, 0) + 1
        label = row.label if count == 1 else f"{row.label}#{count}"
        unique.append(dataclasses.replace(row, label=label))
    return unique


def device(options: ProbeOptions) -> str:
    """Where encoders run."""
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(options: ProbeOptions) -> str:
    """How encoders run."""
    if options.precision != "auto":
        return options.precision
    return "bf16" if device(options).startswith("cuda") else "fp32"


def feature_cache(options: ProbeOptions) -> Path:
    """Folder of the embeddings' cache."""
    if options.cache_dir is not None:
        return Path(options.cache_dir).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "xmag_hf" / "probe"


def row_features(
    row: Row,
    encoder: Encoder,
    images: LabelledImages,
    options: ProbeOptions,
    advance: Advance = _silent,
) -> dict[str, np.ndarray]:
    """Embeddings of every split for one row: split -> (N, D) float32; see `embed_images`."""
    return embed_images(
        images.at(row.mpp),
        encoder,
        row.mpp,
        cache_dir=feature_cache(options),
        batch_size=options.batch_size,
        num_threads=options.num_threads,
        max_enlarge=options.max_enlarge,
        advance=lambda done: advance(row.label, done, _size(images)),
    )


def _size(images: LabelledImages) -> int:
    return sum(len(split) for split in images.splits.values())


# --- one row ---------------------------------------------------------------------------------


def _probe_row(
    row: Row,
    encoder: Encoder,
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
    advance: Advance,
) -> RowResult:
    features = row_features(row, encoder, images, options, advance)
    if options.nuclei_csv is None:
        questions, details = _classify(row, features, images, options, folder)
    else:
        questions, details = _count(row, features, images, options, folder)
        if options.dense:
            more, about = _count_cells(row, encoder, images, options, folder, advance)
            questions, details = questions + more, details | about
    scores = [
        score
        for question in questions
        for score in report.score(
            question, samples=options.samples, level=options.level, seed=options.seed
        )
    ]
    facts = {
        "name": encoder.name,
        "revision": encoder.revision,
        "precision": encoder.precision,
        "normalisation": encoder.normalisation,
        "licence": encoder.licence,
        "embed_dim": encoder.embed_dim,
        "parameters_m": encoder.card.params_m,
    }
    return RowResult(row, facts, questions, scores, details)


def is_official(images: LabelledImages, options: ProbeOptions) -> bool:
    """Whether the data set's own test split is used; else it is pooled and cross-validated."""
    return {"train", "test"} <= images.splits.keys() and not options.cross_validate


def _classify(
    row: Row,
    features: dict[str, np.ndarray],
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
) -> tuple[list[report.Question], dict[str, Any]]:
    protocol = official_split if is_official(images, options) else cross_validated
    answers = protocol(features, images, options)
    questions, details = [], {}
    for answer in answers:
        questions += report.class_questions(
            row.label, answer.method, answer.labels, answer.probabilities, answer.groups
        )
        details[answer.method] = answer.details
        path = folder / "predictions" / report.predictions_name(row.label, answer.method)
        report.write_class_predictions(
            path, answer.ids, answer.groups, answer.labels, answer.probabilities, images.classes
        )
    _draw(row, answers[0], images, folder)
    return questions, details


def _draw(row: Row, answer: Predictions, images: LabelledImages, folder: Path) -> None:
    """The confusion matrix of the first method's first repeat."""
    from .pictures import draw_confusion  # matplotlib, not before it is needed

    repeats = answer.probabilities
    probabilities = repeats[0] if repeats.ndim == 3 else repeats
    path = folder / report.predictions_name(row.label, answer.method).replace(".csv", ".png")
    predicted = probabilities.argmax(axis=1)
    title = f"{row.label}, {answer.method}, {images.name}"
    draw_confusion(answer.labels, predicted, images.classes, path, title=title)


def _count(
    row: Row,
    features: dict[str, np.ndarray],
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
) -> tuple[list[report.Question], dict[str, Any]]:
    """Counts of nuclei per image from one embedding each."""
    splits = [images.splits[name] for name in features]
    x = np.concatenate(list(features.values()))
    ids = np.concatenate([split.ids for split in splits])
    groups = _pooled_groups(images)
    everywhere = np.tile([-np.inf, -np.inf, np.inf, np.inf], (len(ids), 1))
    return _regress(row, "counts", x, ids, everywhere, groups, options, folder)


def _count_cells(
    row: Row,
    encoder: Encoder,
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
    advance: Advance,
) -> tuple[list[report.Question], dict[str, Any]]:
    """Counts of nuclei per grid cell; cells of one image (or group) stay together."""
    view = images.at(row.mpp)
    found = embed_cells(
        view,
        encoder,
        row.mpp,
        cache_dir=feature_cache(options),
        batch_size=options.batch_size,
        num_threads=options.num_threads,
        max_enlarge=options.max_enlarge,
        advance=lambda done: advance(f"{row.label} cells", done, _size(images)),
    )
    ids, boxes, groups = [], [], []
    for name, (_, image) in found.items():
        split = view.splits[name]
        ids.append(split.ids[image])
        groups.append((split.ids if split.groups is None else split.groups)[image])
        for index in range(len(split)):
            mpp = float(split.mpp[index])
            boxes.append(cell_boxes(split.size(index), mpp, max_enlarge=options.max_enlarge)[0])
    x = np.concatenate([features for features, _ in found.values()])
    if not len(x):
        raise ProbeError(
            f"--dense: no image of {images.name} holds a whole cell (112 um a side) of the grid of "
            "a centred 5x patch."
        )
    together = np.concatenate(groups)
    return _regress(
        row, "cells", x, np.concatenate(ids), np.concatenate(boxes), together, options,
        folder,
    )  # fmt: skip


def _regress(
    row: Row,
    method: str,
    x: np.ndarray,
    ids: np.ndarray,
    boxes: np.ndarray,
    groups: np.ndarray | None,
    options: ProbeOptions,
    folder: Path,
) -> tuple[list[report.Question], dict[str, Any]]:
    path = Path(str(options.nuclei_csv)).expanduser()
    types = options.nuclei_types or nuclei_types(path)
    counts = nuclei_counts(path, ids, boxes, types)
    constant = [name for name, column in zip(types, counts.T, strict=True) if np.ptp(column) == 0]
    if constant:
        raise ProbeError(
            f"{path}: every {method[:-1]} has the same number of {', '.join(constant)}; there is "
            "nothing to predict. Name others with --nuclei-types."
        )
    seeds = range(options.repeats)
    predictions = count_probe(x, counts, groups=groups, folds=options.folds, seeds=seeds)
    log_counts = np.log1p(counts)
    report.write_count_predictions(
        folder / "predictions" / report.predictions_name(row.label, method),
        ids, groups, log_counts, predictions, types,
    )  # fmt: skip
    questions = report.count_questions(row.label, method, types, log_counts, predictions, groups)
    totals = {name: int(total) for name, total in zip(types, counts.sum(axis=0), strict=True)}
    return questions, {method: {"rows": len(x), "nuclei": totals}}


def _pooled_groups(images: LabelledImages) -> np.ndarray | None:
    groups = [split.groups for split in images.splits.values()]
    found = [own for own in groups if own is not None]
    return np.concatenate(found) if len(found) == len(groups) else None


# --- the record ------------------------------------------------------------------------------


def _describe(images: LabelledImages, options: ProbeOptions) -> dict[str, Any]:
    splits = {}
    for name, split in images.splits.items():
        splits[name] = {"images": len(split), "mpp": [split.mpp.min(), split.mpp.max()]}
        if split.groups is not None:
            splits[name]["groups"] = len(set(split.groups))
        if split.labels is not None:
            counts = np.bincount(split.labels, minlength=len(images.classes))
            splits[name]["labels"] = dict(zip(images.classes, counts.tolist(), strict=True))
            # What always answering with the commonest class would score.
            splits[name]["majority"] = counts.max() / counts.sum()
    if options.nuclei_csv is not None:
        protocol = "cross-validation (counts)"
    else:
        protocol = "official split" if is_official(images, options) else "cross-validation"
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "classes": images.classes,
        "splits": splits,
        "protocol": protocol,
    }


def _record(result: ProbeResult) -> dict[str, Any]:
    rows = [
        {
            "row": vars(row.row),
            "encoder": row.encoder,
            "scores": row.scores,
            "details": row.details,
        }
        for row in result.rows
    ]
    return {
        "format": "xmag-probe",
        "format_version": report.FORMAT_VERSION,
        "options": vars(result.options),
        "versions": {"xmag_hf": __version__} | _versions(),
        "data": result.data,
        "rows": rows,
        "comparisons": result.comparisons,
        "seconds": result.seconds,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # datasets, on a machine that reads folders only
            continue
    return found

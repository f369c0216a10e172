"""The flow of a probe: rows -> embeddings -> protocol -> scores and tests -> report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xmag_hf.encoders import Encoder, check_encoder, load_encoder
from xmag_hf.lock import only_writer
from xmag_hf.reporting.predictions import write_class_predictions, write_count_predictions
from xmag_hf.reporting.records import EXACT_DIGITS
from xmag_hf.reporting.tables import as_markdown

from . import report, tables
from .counts import count_probe, images_without_nuclei, nuclei_counts, nuclei_types
from .dense import cell_boxes, check_cell_encoder, embed_cells
from .errors import ProbeError
from .features import check_scales, embed_images
from .images import SCALED_COLUMNS, LabelledImages, open_images
from .options import ProbeOptions
from .protocols import (
    Predictions,
    check_protocol,
    cross_validated,
    is_official,
    official_split,
)
from .record import ProbeResult, RowResult, describe, record
from .rows import Row, pairs, plan_rows
from .scoring import (
    FEW_SHOT,
    Comparison,
    Question,
    Score,
    class_questions,
    compare,
    count_questions,
    score,
)

# Called with what is being done, steps finished since the last call, and steps in all.
Advance = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


def run_probe(options: ProbeOptions, advance: Advance = _silent) -> ProbeResult:
    """Probe every row, and write the report.

    Args:
        options: See there.
        advance: For progress bars.

    Returns:
        The result; `options.out` holds results.json, the tables, predictions and the confusion
        pictures.

    Raises:
        ProbeError: Data, rows or labels that cannot be used; another process fills `options.out`.
        EncoderError: An encoder that cannot be had; all are asked for before data is read.
    """
    out = report.check_out(Path(options.out))
    with only_writer(out, ProbeError):
        return _made(options, out, advance)


def _made(options: ProbeOptions, out: Path, advance: Advance) -> ProbeResult:
    """The result, its report in `out`."""
    began = time.perf_counter()
    rows = plan_rows(options)
    images = open_images(options, lambda done, total: advance("reading images", done, total))
    if options.dense and images.views:
        raise ProbeError(
            f"--dense: {images.name} has {', '.join(SCALED_COLUMNS)}, and {options.nuclei_csv} has "
            "pixels of one of them. Say which: --image-column image_20x, which every row can be "
            "resampled from."
        )
    for row in rows:
        check_scales(images.at(row.mpp), row.mpp, options.max_enlarge)
        if options.dense:
            check_cell_encoder(row.name, check_encoder(row.name).input_px, row.mpp)
    # What cannot be done with these labels or nuclei is said before anything is embedded.
    if options.nuclei_csv is None:
        check_protocol(images, options)
    else:
        image_counts(images, options)
    folder = report.open_report(out)
    results = []
    for row in rows:
        encoder = load_encoder(row.name, device=device(options), precision=precision(options))
        results.append(_probe_row(row, encoder, images, options, folder, advance))
        del encoder  # the next one may need the memory
    comparisons = _compare(rows, results, options, advance)
    data = describe(images, _protocol(images, options))
    remarks = tables.remarks(data, results, comparisons)
    seconds = time.perf_counter() - began
    result = ProbeResult(options, data, results, comparisons, remarks, seconds)
    text = as_markdown(tables.sheets(result), tables.all_remarks(result))
    (folder / report.TABLE).write_text(text, encoding="utf-8")
    report.close_report(folder, out, record(result))
    return result


def _protocol(images: LabelledImages, options: ProbeOptions) -> str:
    if options.nuclei_csv is not None:
        return "cross-validation (counts)"
    return "official split" if is_official(images, options) else "cross-validation"


def _compare(
    rows: list[Row], results: list[RowResult], options: ProbeOptions, advance: Advance
) -> list[Comparison]:
    wanted = pairs(rows)
    tested = [q for q in results[0].questions if not q.method.startswith(FEW_SHOT)]
    total = len(wanted) * len(tested)
    return compare(
        [result.questions for result in results],
        samples=options.samples,
        level=options.level,
        seed=options.seed,
        pairs=wanted,
        step=lambda: advance("paired tests", 1, total),
    )


# --- encoders and embeddings -----------------------------------------------------------------


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
        checked=lambda done: advance("checking images", done, _size(images)),
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
    scores: list[Score] = []
    for question in questions:
        scores += score(question, samples=options.samples, level=options.level, seed=options.seed)
        advance(f"{row.label} scores", 1, len(questions))
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


def _classify(
    row: Row,
    features: dict[str, np.ndarray],
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
) -> tuple[list[Question], dict[str, Any]]:
    protocol = official_split if is_official(images, options) else cross_validated
    answers = protocol(features, images, options)
    questions, details = [], {}
    for answer in answers:
        questions += class_questions(
            row.label, answer.method, answer.labels, answer.probabilities, answer.groups
        )
        details[answer.method] = answer.details
        path = folder / "predictions" / report.predictions_name(row.label, answer.method)
        few = answer.method.startswith(FEW_SHOT)
        write_class_predictions(
            path, answer.ids, answer.groups, answer.labels, answer.probabilities, images.classes,
            digits=report.FEW_SHOT_DIGITS if few else EXACT_DIGITS,
        )  # fmt: skip
    _draw(row, answers[0], images, folder)
    return questions, details


def _draw(row: Row, answer: Predictions, images: LabelledImages, folder: Path) -> None:
    """The confusion matrix of the first method's first repeat."""
    from xmag_hf.reporting.pictures import draw_confusion  # matplotlib, not before it is needed

    repeats = answer.probabilities
    probabilities = repeats[0] if repeats.ndim == 3 else repeats
    path = folder / report.predictions_name(row.label, answer.method).replace(".csv", ".png")
    predicted = probabilities.argmax(axis=1)
    of = f" (repeat 1 of {len(repeats)})" if repeats.ndim == 3 and len(repeats) > 1 else ""
    title = f"{row.label}, {answer.method}, {images.name}{of}"
    draw_confusion(answer.labels, predicted, images.classes, path, title=title)


def _count(
    row: Row,
    features: dict[str, np.ndarray],
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
) -> tuple[list[Question], dict[str, Any]]:
    """Counts of nuclei per image from one embedding each."""
    x = np.concatenate([features[name] for name in images.splits])
    ids, counts = image_counts(images, options)
    return _regress(row, "counts", images, x, ids, counts, _pooled_groups(images), options, folder)


def image_counts(images: LabelledImages, options: ProbeOptions) -> tuple[np.ndarray, np.ndarray]:
    """Nuclei of each type in each whole image.

    Returns:
        (N,) ids of all splits in their order, and (N, K) int64 counts.

    Raises:
        ProbeError: As `nuclei_counts`, or an id that two splits share.
    """
    path, types = _nuclei(options)
    ids = np.concatenate([split.ids for split in images.splits.values()])
    twice = [str(name) for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise ProbeError(
            f"{path}: {len(twice)} ids are of more than one image ({', '.join(twice[:5])}; splits "
            f"{', '.join(images.splits)}), so nobody knows whose its nuclei are. Give --id-column, "
            "a column of names that no two splits share, and use those names in the file too."
        )
    everywhere = np.tile([-np.inf, -np.inf, np.inf, np.inf], (len(ids), 1))
    return ids, nuclei_counts(path, ids, everywhere, types)


def _nuclei(options: ProbeOptions) -> tuple[Path, tuple[str, ...]]:
    path = Path(str(options.nuclei_csv)).expanduser()
    return path, options.nuclei_types or nuclei_types(path)


def _count_cells(
    row: Row,
    encoder: Encoder,
    images: LabelledImages,
    options: ProbeOptions,
    folder: Path,
    advance: Advance,
) -> tuple[list[Question], dict[str, Any]]:
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
    path, types = _nuclei(options)
    names, together = np.concatenate(ids), np.concatenate(groups)
    counts = nuclei_counts(path, names, np.concatenate(boxes), types)
    return _regress(row, "cells", images, x, names, counts, together, options, folder)


def _regress(
    row: Row,
    method: str,
    images: LabelledImages,
    x: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    groups: np.ndarray | None,
    options: ProbeOptions,
    folder: Path,
) -> tuple[list[Question], dict[str, Any]]:
    path, types = _nuclei(options)
    constant = [name for name, column in zip(types, counts.T, strict=True) if np.ptp(column) == 0]
    if constant:
        raise ProbeError(
            f"{path}: every {method[:-1]} has the same number of {', '.join(constant)}; there is "
            "nothing to predict. Name others with --nuclei-types."
        )
    seeds = range(options.repeats)
    predictions = count_probe(x, counts, groups=groups, folds=options.folds, seeds=seeds)
    log_counts = np.log1p(counts)
    write_count_predictions(
        folder / "predictions" / report.predictions_name(row.label, method),
        ids, groups, log_counts, predictions, types,
    )  # fmt: skip
    # Cells whose images are in no group are drawn image by image.
    grouped = _pooled_groups(images) is not None
    together = "image" if method == "cells" and not grouped else "group"
    units = ("cell" if method == "cells" else "image", together)
    questions = count_questions(row.label, method, types, log_counts, predictions, groups, units)
    totals = {name: int(total) for name, total in zip(types, counts.sum(axis=0), strict=True)}
    details: dict[str, Any] = {"rows": len(x), "nuclei": totals}
    empty = images_without_nuclei(path, ids)
    if empty:
        details["images_without_nuclei"] = list(empty)
        details["remarks"] = [
            f"{path.name} names none of {len(empty)} images ({empty[0]}, ...); counted as 0 nuclei."
        ]
    return questions, {method: details}


def _pooled_groups(images: LabelledImages) -> np.ndarray | None:
    groups = [split.groups for split in images.splits.values()]
    found = [own for own in groups if own is not None]
    return np.concatenate(found) if len(found) == len(groups) else None

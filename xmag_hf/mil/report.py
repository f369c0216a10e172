"""What is written of a study: predictions, scores, tables, pictures, results.json, heads' cards."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xmag_hf.atomic_write import write_atomically
from xmag_hf.encoders import ENCODERS
from xmag_hf.hub import HeadCardFacts, render_head_card
from xmag_hf.reporting.pictures import draw_confusion
from xmag_hf.reporting.records import EXACT_DIGITS, plain, versions

from .compare import METRICS, CompareOptions, CompareResult, cohort_facts, remarks_of, study_score
from .compare_report import comparison_markdown
from .labels import Cohort
from .options import INTERNAL, RESULTS
from .pictures import draw_roc
from .predict import HEAD_IDENTITY
from .predictions import COLUMNS, FILE, read_predictions

FORMAT, FORMAT_VERSION = "xmag-study", 1
TABLE = "table.md"
PACKAGES = ("torch", "transformers", "numpy", "scikit-learn")


@dataclass(frozen=True, eq=False)
class Tested:
    """What one fold's model said of slides.

    Attributes:
        cohort: Of the slides.
        fold: Of the model.
        rows: (m,) int64, slides of the cohort.
        probabilities: (m, C).
    """

    cohort: Cohort
    fold: int
    rows: np.ndarray
    probabilities: np.ndarray


def write_predictions(path: Path, tested: Sequence[Tested]) -> None:
    """Write a row for each slide and fold: slide_id, patient_id, cohort, fold, label, p_CLASS."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *(f"p_{name}" for name in tested[0].cohort.classes)])
    for one in tested:
        cohort = one.cohort
        for row, values in zip(one.rows, one.probabilities, strict=True):
            writer.writerow([
                cohort.slide_ids[row], cohort.patient_ids[row], cohort.name, one.fold,
                cohort.classes[cohort.labels[row]], *(f"{v:.{EXACT_DIGITS}g}" for v in values),
            ])  # fmt: skip
    write_atomically(path, text.getvalue())


def score_study(
    folder: Path, name: str, *, samples: int, level: float, seed: int, preset: str | None = None
) -> CompareResult:
    """Scores of a study, from its predictions alone; intervals draw patients.

    Args:
        folder: With predictions.csv.
        name: Of the study, in tables.
        samples: Of the bootstrap.
        level: Of the intervals.
        seed: Of the bootstrap.
        preset: Whose published values stand beside the scores.

    Returns:
        As of a comparison, without tests.
    """
    options = CompareOptions(
        by_patient=True, samples=samples, level=level, seed=seed, preset=preset
    )
    study = read_predictions(folder, name)
    facts = [
        cohort_facts(cohort, own, study.classes, options) for cohort, own in study.cohorts.items()
    ]
    scores = [
        study_score(cohort, name, own, metric, options)
        for cohort, own in study.cohorts.items()
        for metric in METRICS
    ]
    remarks = tuple(remarks_of(facts, scores, (), options))
    return CompareResult(options, (name,), tuple(facts), tuple(scores), (), remarks)


def write_report(
    folder: Path,
    name: str,
    tested: Sequence[Tested],
    record: dict[str, Any],
    *,
    samples: int,
    level: float,
    seed: int,
    preset: str | None = None,
) -> CompareResult:
    """Write predictions.csv, roc.png, confusion.png, table.md and, last, results.json.

    Args:
        folder: Exists.
        name: Of the study, in tables.
        tested: All of the cross-validation, in the order of the folds, then those of an external
            cohort.
        record: Into results.json, beside scores, versions and exclusions.
        samples: Of the intervals' bootstrap.
        level: Of the intervals.
        seed: Of the bootstrap.
        preset: Whose published values stand beside the scores.

    Returns:
        The scores.
    """
    write_predictions(folder / FILE, tested)
    result = score_study(folder, name, samples=samples, level=level, seed=seed, preset=preset)
    study = read_predictions(folder, name)
    draw_roc(study.cohorts, study.classes, folder / "roc.png", title=name)
    for cohort, own in study.cohorts.items():
        ending = "" if cohort == INTERNAL else f"-{cohort}"
        draw_confusion(
            own.labels, own.probabilities.argmax(axis=1), study.classes,
            folder / f"confusion{ending}.png", title=f"{name}, {cohort}",
        )  # fmt: skip
    cohorts = {one.cohort.name: one.cohort for one in tested}
    lines = [
        f"- {cohort.name}: left out {exclusion.slide_id}: {exclusion.reason}"
        for cohort in cohorts.values()
        for exclusion in cohort.exclusions
    ]
    text = comparison_markdown(result) + "".join(f"{line}\n" for line in lines)
    write_atomically(folder / TABLE, text)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(PACKAGES),
        **record,
        "exclusions": {name: cohort.exclusions for name, cohort in cohorts.items()},
        "cohorts": result.cohorts,
        "scores": result.scores,
        "remarks": result.remarks,
    }
    write_atomically(folder / RESULTS, json.dumps(plain(record), indent=2, allow_nan=False))
    return result


def head_card(
    model: Any, cohorts: Sequence[Cohort], origin: str, results: str, options: dict[str, Any]
) -> str:
    """README.md of a head's folder.

    Args:
        model: The head.
        cohorts: Whose slides are counted in it.
        origin: Which head of which study it is, and from whom it has learnt.
        results: Tables of scores, or where they are.
        options: It was made with.
    """
    config: Any = model.config
    identity = {name: getattr(config, name) for name in HEAD_IDENTITY}
    known = ENCODERS.get(str(config.encoder))
    counts = {
        cohort.name: dict(
            zip(cohort.classes, np.bincount(cohort.labels, minlength=len(cohort.classes)).tolist(),
                strict=True)
        )
        for cohort in cohorts
    }  # fmt: skip
    return render_head_card(
        HeadCardFacts(
            model_type=config.model_type,
            classes=[config.id2label[n] for n in range(config.num_labels)],
            identity=identity,
            encoder_licence=known.licence if known else None,
            cohorts=counts,
            patients={cohort.name: len(set(cohort.patient_ids)) for cohort in cohorts},
            origin=origin,
            results=results,
            options=options,
            versions=versions(PACKAGES),
        )
    )

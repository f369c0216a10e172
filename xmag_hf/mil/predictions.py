"""Stored predictions of studies and probes, by cohort, with one prediction per slide.

How folds are pooled. In cross-validation every slide has one prediction, by the model that did not
train on its patient: the slides of all folds are scored together. In an external cohort every slide
has one prediction per fold's model: their mean probability is the slide's prediction (the five
models as an ensemble), because the five rows of a slide are not five cases, and a paired test that
took them for such would be too sure by about the square root of five. What single folds score
stands beside it as mean and standard deviation, which is what most papers print.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xmag_hf.reporting.errors import ReportError
from xmag_hf.reporting.predictions import read_class_predictions

from .errors import MILError
from .options import INTERNAL

FILE = "predictions.csv"
COLUMNS = ("slide_id", "patient_id", "cohort", "fold", "label")
ONE = "one prediction per slide"
PROBE_COLUMNS = ("id", "group", "label")
_SUM_TOLERANCE = 1e-3  # probabilities are written with a few digits


@dataclass(frozen=True, eq=False)
class FoldPredictions:
    """One model's predictions of the slides it did not train on.

    Attributes:
        fold: Name of the fold.
        rows: (m,) int64, rows of the cohort.
        probabilities: (m, C).
    """

    fold: str
    rows: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, eq=False)
class CohortPredictions:
    """Predictions of one cohort.

    Attributes:
        slide_ids: (n,) str, sorted.
        patient_ids: (n,) str, or None where a probe had no groups.
        labels: (n,) int64.
        probabilities: (n, C) float64, pooled over folds as the module says.
        folds: What was pooled, by fold.
    """

    slide_ids: np.ndarray
    patient_ids: np.ndarray | None
    labels: np.ndarray
    probabilities: np.ndarray
    folds: tuple[FoldPredictions, ...]

    @property
    def pooling(self) -> str:
        """How several predictions became one, in words."""
        if sum(len(fold.rows) for fold in self.folds) == len(self.labels):
            if len(self.folds) == 1:
                return ONE
            return f"out-of-fold predictions of {len(self.folds)} models, scored together"
        return f"mean probability of {len(self.folds)} models per slide"


@dataclass(frozen=True, eq=False)
class StudyPredictions:
    """Predictions of one model or study.

    Attributes:
        name: In tables.
        classes: Class names, in the order of the columns.
        cohorts: By name.
    """

    name: str
    classes: tuple[str, ...]
    cohorts: dict[str, CohortPredictions]


@dataclass(frozen=True)
class _Row:
    slide_id: str
    patient_id: str
    fold: str
    label: int
    probabilities: list[float]


def read_predictions(path: Path, name: str | None = None) -> StudyPredictions:
    """Read a study folder, its predictions.csv, or a CSV of `xmag probe`.

    Args:
        path: Folder with predictions.csv, or a CSV.
        name: In tables; default the folder's or file's name.

    Returns:
        The predictions.

    Raises:
        MILError: No such file, another layout, damaged rows, a slide twice in a fold, or a slide
            with two labels or patients.
    """
    file = path / FILE if path.is_dir() else path
    default = path.resolve().name if path.is_dir() else path.stem
    if file.name == FILE and not path.is_dir():
        default = path.resolve().parent.name
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MILError(
            f"{path}: no predictions ({error}). Give a folder of `xmag mil` (with {FILE}), or a "
            "predictions CSV."
        ) from error
    header = tuple(lines[0]) if lines else ()
    if header[:3] == PROBE_COLUMNS:
        return _probe(file, name or default, lines)
    classes = tuple(column[2:] for column in header[5:] if column.startswith("p_"))
    if header[:5] != COLUMNS or len(classes) < 2 or len(classes) != len(header) - 5:
        raise MILError(
            f"{file}: columns {', '.join(header[:6]) or 'none'}; expected {', '.join(COLUMNS)} and "
            "p_CLASS of every class, as `xmag mil` writes them."
        )
    by_cohort: dict[str, list[_Row]] = {}
    for number, line in enumerate(lines[1:], 2):
        by_cohort.setdefault(line[2] if len(line) > 2 else "", []).append(
            _row(file, number, line, classes)
        )
    if not by_cohort:
        raise MILError(f"{file}: a header without rows. Run the study again.")
    cohorts = {cohort: _cohort(file, cohort, rows) for cohort, rows in by_cohort.items()}
    return StudyPredictions(name or default, classes, cohorts)


def _row(file: Path, number: int, line: list[str], classes: tuple[str, ...]) -> _Row:
    try:
        slide_id, patient_id, _, fold, label = line[:5]
        probabilities = [float(value) for value in line[5:]]
        if label not in classes:
            raise ValueError(f"label {label!r} has no column p_{label}")
        if len(probabilities) != len(classes):
            raise ValueError(f"{len(probabilities)} probabilities for {len(classes)} classes")
        # NaN fails this too.
        if not abs(sum(probabilities) - 1) < _SUM_TOLERANCE or min(probabilities) < 0:
            raise ValueError(f"probabilities {probabilities} are none: they do not sum to 1")
    except ValueError as error:
        raise MILError(f"{file}, line {number}: {error}. Run the study again.") from error
    return _Row(slide_id, patient_id, fold, classes.index(label), probabilities)


def _cohort(file: Path, cohort: str, rows: Sequence[_Row]) -> CohortPredictions:
    known: dict[str, _Row] = {}
    for row in rows:
        first = known.setdefault(row.slide_id, row)
        if (first.label, first.patient_id) != (row.label, row.patient_id):
            raise MILError(
                f"{file}: slide {row.slide_id} of {cohort} has two labels or patients "
                f"({first.patient_id}, {row.patient_id}). Run the study again."
            )
    place = {slide_id: number for number, slide_id in enumerate(sorted(known))}
    folds = []
    for fold in sorted({row.fold for row in rows}):
        own = sorted((row for row in rows if row.fold == fold), key=lambda row: row.slide_id)
        if len({row.slide_id for row in own}) < len(own):
            raise MILError(f"{file}: fold {fold} of {cohort} has a slide twice. Run it again.")
        numbers = np.array([place[row.slide_id] for row in own])
        folds.append(FoldPredictions(fold, numbers, np.array([row.probabilities for row in own])))
    ordered = [known[slide_id] for slide_id in place]
    patients = np.array([row.patient_id for row in ordered])
    return CohortPredictions(
        np.array(list(place)),
        patients if (patients != "").all() else None,
        np.array([row.label for row in ordered]),
        _pooled(folds, len(place)),
        tuple(folds),
    )


def _pooled(folds: Sequence[FoldPredictions], n: int) -> np.ndarray:
    """(n, C) mean over the folds that have each slide."""
    total = np.zeros((n, folds[0].probabilities.shape[1]))
    times = np.zeros((n, 1))
    for fold in folds:
        total[fold.rows] += fold.probabilities
        times[fold.rows] += 1
    return total / times


def _probe(file: Path, name: str, lines: list[list[str]]) -> StudyPredictions:
    """Predictions of a probe: its images are the slides, its groups the patients."""
    try:
        labels, repeats, classes = read_class_predictions(file)
    except ReportError as error:
        raise MILError(str(error)) from error
    ids = np.array([line[0] for line in lines[1:]])
    groups = np.array([line[1] for line in lines[1:]])
    if len(set(ids)) < len(ids):
        raise MILError(f"{file}: an image is in it twice. Run the probe again.")
    order = np.argsort(ids, kind="stable")
    everything = np.arange(len(ids))
    folds = [FoldPredictions(str(n), everything, table[order]) for n, table in enumerate(repeats)]
    cohort = CohortPredictions(
        ids[order],
        groups[order] if (groups != "").all() else None,
        labels[order],
        _pooled(folds, len(ids)),
        tuple(folds),
    )
    return StudyPredictions(name, classes, {INTERNAL: cohort})


def paired(studies: Sequence[StudyPredictions]) -> list[StudyPredictions]:
    """The studies with their classes in the first one's order, checked to be of the same cases.

    Args:
        studies: At least two.

    Returns:
        The same, columns reordered.

    Raises:
        MILError: One study only, a name twice, other classes, cohorts, slides, labels, patients,
            or folds.
    """
    if len(studies) < 2:
        raise MILError("compare: one study only; give two or more.")
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise MILError(f"compare: two studies named alike ({', '.join(names)}); give --names.")
    first = studies[0]
    same = [_reordered(study, first) for study in studies]
    for study in same[1:]:
        if study.cohorts.keys() != first.cohorts.keys():
            raise MILError(
                f"{first.name} has the cohorts {', '.join(first.cohorts)}; {study.name} has "
                f"{', '.join(study.cohorts)}. Compare studies of the same cohorts, or name one "
                "(--cohort)."
            )
        for cohort, ours in first.cohorts.items():
            _same_cases(first.name, study.name, cohort, ours, study.cohorts[cohort])
    return same


def _reordered(study: StudyPredictions, first: StudyPredictions) -> StudyPredictions:
    if set(study.classes) != set(first.classes):
        raise MILError(
            f"{first.name} has the classes {', '.join(first.classes)}; {study.name} has "
            f"{', '.join(study.classes)}. They answer different questions."
        )
    order = [study.classes.index(name) for name in first.classes]
    new_place = np.argsort(order)
    cohorts = {
        name: CohortPredictions(
            cohort.slide_ids,
            cohort.patient_ids,
            new_place[cohort.labels],
            cohort.probabilities[:, order],
            tuple(
                FoldPredictions(fold.fold, fold.rows, fold.probabilities[:, order])
                for fold in cohort.folds
            ),
        )
        for name, cohort in study.cohorts.items()
    }
    return StudyPredictions(study.name, first.classes, cohorts)


def _same_cases(
    first: str, second: str, cohort: str, ours: CohortPredictions, theirs: CohortPredictions
) -> None:
    missing = sorted(set(ours.slide_ids) ^ set(theirs.slide_ids))
    if missing:
        raise MILError(
            f"{first} and {second}: {len(missing)} slides of {cohort} are in one only, the first "
            f"is {missing[0]}. A paired test needs both models' predictions of the same slides."
        )
    for what, a, b in (
        ("labels", ours.labels, theirs.labels),
        ("patients", ours.patient_ids, theirs.patient_ids),
    ):
        if (a is None) != (b is None) or (a is not None and (a != b).any()):
            where = 0 if a is None or b is None else int(np.flatnonzero(a != b)[0])
            raise MILError(
                f"{first} and {second}: their {what} differ in {cohort}, first at slide "
                f"{ours.slide_ids[where]}. Make both studies from one label CSV."
            )
    if [fold.rows.tolist() for fold in ours.folds] != [fold.rows.tolist() for fold in theirs.folds]:
        raise MILError(
            f"{first} and {second}: {cohort} was cut into other folds, so the models were trained "
            "on other slides. Run the second study with the first one's folds.csv."
        )

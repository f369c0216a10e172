"""Folds by patient: made, written, read again, checked; and the validation split inside them."""

from __future__ import annotations

import csv
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from xmag_hf.atomic_write import write_atomically

from .errors import MILError
from .labels import Cohort, read_lines
from .options import VALIDATES

logger = logging.getLogger(__name__)

COLUMNS = ("slide_id", "patient_id", "label", "fold")
# Shuffles that are tried for a split with every class on both sides.
_SHUFFLES = 50


def make_folds(cohort: Cohort, n_folds: int, seed: int) -> np.ndarray:
    """Stratified folds by patient (scikit-learn's StratifiedGroupKFold).

    The first of some shuffles that has every class in every fold; else the first whose folds can
    all be trained and scored (`check_folds`).

    Args:
        cohort: Its slides are in the order of their ids, so folds do not depend on a CSV's order.
        n_folds: At least 2.
        seed: Of the shuffles.

    Returns:
        (n,) int64, 0..n_folds - 1.

    Raises:
        MILError: Fewer patients than folds, or no split that works; the class is named.
    """
    labels, patients = cohort.labels, cohort.patient_ids
    if len(set(patients)) < n_folds:
        raise MILError(
            f"{cohort.name}: {len(set(patients))} patients for {n_folds} folds. Lower --folds."
        )

    def good(folds: np.ndarray) -> bool:
        return all(len(set(labels[folds == k])) == len(cohort.classes) for k in range(n_folds))

    def usable(folds: np.ndarray) -> bool:
        try:
            check_folds(cohort, folds)
        except MILError:
            return False
        return True

    remedy = "Lower --folds, or merge classes."
    made = _first_good(labels, patients, n_folds, seed, _assigned, good, usable, n_folds, remedy)
    check_folds(cohort, made)
    return made


def validation_rows(cohort: Cohort, training: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose validation patients among the training patients, stratified.

    Args:
        cohort: The slides.
        training: (n,) bool, slides outside the test fold.
        share: Of the training patients; they are cut into round(1 / share) parts, one of which
            is chosen.
        seed: Of the choice.

    Returns:
        (n,) bool, part of `training`, with at least one slide; every class stays in the rest.

    Raises:
        MILError: Too few patients of a class to train on it.
    """
    rows = np.flatnonzero(training)
    labels, patients = cohort.labels[rows], cohort.patient_ids[rows]
    parts = max(2, round(1 / share))
    if len(set(patients)) < parts:
        raise MILError(
            f"{cohort.name}: {len(set(patients))} training patients, of which {share:g} shall "
            "validate. Raise --validation-share, or lower --folds."
        )
    whole = len(set(labels))

    def sides(part: np.ndarray) -> tuple[int, int]:
        return len(set(labels[part])), len(set(labels[~part]))

    def assigned(*split: np.ndarray) -> np.ndarray:
        return np.isin(np.arange(len(rows)), split[1])

    part = _first_good(
        labels, patients, parts, seed,
        lambda splits: assigned(*splits[0]),
        lambda part: sides(part) == (whole, whole),
        lambda part: bool(part.any()) and sides(part)[1] == whole,
        2,
        "Raise --validation-share, or merge classes.",
    )  # fmt: skip
    if sides(part)[1] < whole or not part.any():
        lost = sorted(set(labels) - set(labels[~part]))
        raise MILError(
            f"{cohort.name}: {', '.join(cohort.classes[c] for c in lost)}: so few patients that "
            "none is left to train on beside the validation split. Lower --folds or "
            "--validation-share, or merge classes."
        )
    chosen = np.zeros(len(cohort), dtype=bool)
    chosen[rows[part]] = True
    return chosen


def share_of_patients(cohort: Cohort, part: np.ndarray, whole: np.ndarray) -> float:
    """What `validation_rows` made of the share it was asked for; masks are (n,) bool."""
    patients = cohort.patient_ids
    return len(set(patients[part])) / len(set(patients[whole]))


def check_classes(cohort: Cohort) -> None:
    """Refuse a cohort that has lost all slides of a class.

    Raises:
        MILError: Naming the classes.
    """
    lost = [name for c, name in enumerate(cohort.classes) if not (cohort.labels == c).any()]
    if lost:
        raise MILError(
            f"class {lost[0]!r}: none of its slides is left after exclusions. Embed them, or drop "
            "the class from the labels."
        )


def check_folds(cohort: Cohort, folds: np.ndarray) -> None:
    """Refuse folds that cannot be trained or scored, or that share a patient.

    Args:
        cohort: The slides.
        folds: (n,) int64.

    Raises:
        MILError: A patient in two folds; a fold with one class only, where no AUC exists; or a
            class that is in one fold only, so that a head would not have seen it.
    """
    where: dict[str, int] = {}
    for patient, fold in zip(cohort.patient_ids.tolist(), folds.tolist(), strict=True):
        if where.setdefault(patient, fold) != fold:
            raise MILError(
                f"patient {patient!r} is in folds {where[patient]} and {fold}: a head would "
                "be tested on a patient it has learnt from. Put all slides of a patient in one."
            )
    for fold in np.unique(folds):
        tested, trained = cohort.labels[folds == fold], cohort.labels[folds != fold]
        if len(set(tested)) < 2:
            raise MILError(
                f"fold {fold}: its {len(tested)} slides are all {cohort.classes[tested[0]]!r}, so "
                "it has no AUC. Lower --folds, or give others by --folds-csv."
            )
        lost = sorted(set(range(len(cohort.classes))) - set(trained.tolist()))
        if lost:
            raise MILError(
                f"class {cohort.classes[lost[0]]!r} is only in fold {fold}, so its head never sees "
                "it. Lower --folds, add slides, or merge the class with another."
            )


def warn_rare(cohort: Cohort, n_folds: int) -> None:
    """Warn of classes that cannot be in every fold, having fewer patients than there are folds."""
    rare = []
    for number, name in enumerate(cohort.classes):
        patients = len(set(cohort.patient_ids[cohort.labels == number]))
        if patients < n_folds:
            rare.append(f"class {name!r} has {patients} patient{'s' * (patients != 1)}")
    if rare:
        logger.warning(
            "%s: %s for %d folds: some folds test none of it. Fewer --folds, or merge classes.",
            cohort.name,
            ", ".join(rare),
            n_folds,
        )


def write_folds(
    path: Path, cohort: Cohort, folds: np.ndarray, validation: Sequence[np.ndarray] = ()
) -> None:
    """Write slide_id, patient_id, label, fold, and who validates.

    Args:
        path: Of the CSV.
        cohort: The slides.
        folds: (n,) int64.
        validation: (n,) bool for each fold, its validation slides. Column `validates` has the
            folds that a slide validates, with blanks between them; without any, no such column.
    """
    names = [cohort.classes[label] for label in cohort.labels]
    columns = [cohort.slide_ids, cohort.patient_ids, names, folds.tolist()]
    if validation:
        told = np.stack(validation, axis=1)  # (n, folds)
        columns.append([" ".join(map(str, np.flatnonzero(row))) for row in told])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((*COLUMNS, VALIDATES)[: len(columns)])
    writer.writerows(zip(*columns, strict=True))
    write_atomically(path, text.getvalue().encode())


def read_folds(path: Path, cohort: Cohort) -> tuple[Cohort, np.ndarray]:
    """Folds that an earlier study wrote, for the slides of this one.

    Args:
        path: CSV with `COLUMNS`.
        cohort: The slides.

    Returns:
        The cohort without slides that the file does not name (they are exclusions), and (n,) int64
        folds, numbered from 0.

    Raises:
        MILError: Another patient or label than in the cohort, a slide given twice, a fold that is
            no whole number, no slide in common, or what `check_folds` refuses.
        OSError: The file cannot be read.
    """
    told: dict[str, dict[str, str]] = {}
    for number, line in read_lines(path, COLUMNS):
        if line["slide_id"] in told:
            raise MILError(f"{path}, line {number}: slide_id {line['slide_id']!r} again. Keep one.")
        if not line["fold"].isdecimal():
            raise MILError(f"{path}, line {number}: fold {line['fold']!r} is no number from 0 on.")
        told[line["slide_id"]] = line
    keep = np.isin(cohort.slide_ids, list(told))
    if not keep.any():
        raise MILError(f"{path}: names none of the {len(cohort)} slides. Is it of this cohort?")
    cohort = cohort.rows(keep, f"no fold in {Path(path).name}")
    for slide, patient, label in zip(
        cohort.slide_ids.tolist(), cohort.patient_ids.tolist(), cohort.labels, strict=True
    ):
        line, ours = told[slide], {"patient_id": patient, "label": cohort.classes[label]}
        for column, value in ours.items():
            if line[column] != value:
                raise MILError(
                    f"{path}: {slide} has {column} {line[column]!r}, the labels say {value!r}. "
                    "Folds are of the same patients and classes only."
                )
    given = np.array([int(told[str(slide)]["fold"]) for slide in cohort.slide_ids])
    numbers, folds = np.unique(given, return_inverse=True)
    if len(numbers) < 2:
        raise MILError(f"{path}: one fold only; cross-validation needs at least 2.")
    check_folds(cohort, folds)
    return cohort, folds


Splits = list[tuple[np.ndarray, np.ndarray]]


def _first_good(
    labels: np.ndarray,
    patients: np.ndarray,
    parts: int,
    seed: int,
    assigned: Callable[[Splits], np.ndarray],
    good: Callable[[np.ndarray], bool],
    usable: Callable[[np.ndarray], bool],
    needed: int,
    remedy: str,
) -> np.ndarray:
    """The first shuffle whose assignment is good, or else usable, or else the first of all.

    No assignment is good unless each class has `needed` patients; then the first usable will do.
    """
    fewest = min(len(set(patients[labels == label])) for label in set(labels))
    tried = []
    for shuffle in range(_SHUFFLES):
        state = np.random.RandomState([seed, shuffle])
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=state)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of rare classes: they are checked for here
                tried.append(assigned(list(splitter.split(labels, labels, patients))))
        except ValueError as error:
            # Even the commonest class has fewer slides than there shall be parts.
            most = np.bincount(labels).max()
            raise MILError(
                f"{len(labels)} slides, of no class more than {most}, cannot be split into {parts} "
                f"parts. {remedy}"
            ) from error
        if (usable if fewest < needed else good)(tried[-1]):
            return tried[-1]
    return next(filter(usable, tried), tried[0])


def _assigned(splits: Splits) -> np.ndarray:
    folds = np.empty(sum(len(test) for _, test in splits), dtype=np.int64)
    for number, (_, test) in enumerate(splits):
        folds[test] = number
    return folds

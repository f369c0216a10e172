"""Which rows a classifier learns from, and which it is asked about: splits and cross-validation.

Rows of one group (patient, slide) are never on both sides.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from .classifiers import (
    LinearProbe,
    choose_c,
    few_shot_probabilities,
    fit_linear,
    knn_probabilities,
)
from .errors import ProbeError
from .images import (
    TEST,
    TRAIN,
    VALIDATION,
    ImageSplit,
    LabelledImages,
    natural_key,
    pooled_ids,
)
from .options import ProbeOptions

logger = logging.getLogger(__name__)

_SPLIT_DRAWS = 100


@dataclass(frozen=True)
class Predictions:
    """What one classifier said about rows that it had not learned from.

    Attributes:
        method: "linear", "knn" or "few-shot-N".
        ids: (n,) str.
        groups: (n,) str, or None.
        labels: (n,) int64.
        probabilities: (n, C), or (R, n, C) for repeats (of cross-validation, or of few-shot draws).
        details: How it was fitted: chosen C and the like, ready for JSON.
    """

    method: str
    ids: np.ndarray
    groups: np.ndarray | None
    labels: np.ndarray
    probabilities: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A split whose labels are there."""

    ids: np.ndarray
    groups: np.ndarray | None
    labels: np.ndarray


@dataclass(frozen=True)
class _Settings:
    """What of the options the data allow.

    Attributes:
        neighbours: Of kNN, at most the training rows.
        shots: Numbers of images that every class has.
        remarks: Method ("" for all) -> what was changed, in sentences.
    """

    neighbours: int
    shots: tuple[int, ...]
    remarks: dict[str, list[str]]


@dataclass(frozen=True)
class _Official:
    """An official split, checked.

    Attributes:
        parts: Split -> ids, groups and labels.
        held: (n,) bool over training rows, or over training and validation rows where the
            validation split shares groups with training: drawn for the choice of C. None where
            the validation split is used as it is.
        settings: Of kNN and few-shot.
    """

    parts: dict[str, _Part]
    held: np.ndarray | None
    settings: _Settings


# A partition of the rows: (training rows, test rows) of each fold.
_Folds = list[tuple[np.ndarray, np.ndarray]]


def is_official(images: LabelledImages, options: ProbeOptions) -> bool:
    """Whether the data set's own test split is used; else it is pooled and cross-validated."""
    return {TRAIN, TEST} <= images.splits.keys() and not options.cross_validate


def check_protocol(images: LabelledImages, options: ProbeOptions) -> list[str]:
    """Find out before anything is embedded what a protocol would refuse or change.

    Args:
        images: Labelled.
        options: Methods and their settings.

    Returns:
        Remarks, each logged as a warning too: settings that these data do not allow.

    Raises:
        ProbeError: As `official_split` or `cross_validated`.
    """
    if is_official(images, options):
        settings = _plan_official(images, options).settings
    else:
        settings = _plan_folds(images, options)[2]
    remarks = [text for texts in settings.remarks.values() for text in texts]
    for text in remarks:
        logger.warning("%s: %s", images.name, text)
    return remarks


def official_split(
    features: dict[str, np.ndarray], images: LabelledImages, options: ProbeOptions
) -> list[Predictions]:
    """Learn from the training split, be asked about the test split.

    The linear probe's C is chosen on the validation split (where there is none, or where it shares
    groups with training: on a seeded share of the groups), and it is then fitted again on training
    and validation together. kNN and few-shot have nothing to choose: they use the training split
    alone, so that a data set gives the same numbers whether or not its validation split is stored
    beside it.

    Args:
        features: Split -> (N, D).
        images: With splits train and test.
        options: Methods and their settings.

    Returns:
        One a method, few-shot one for each number of shots; `details["remarks"]` says what of the
        options the data did not allow.

    Raises:
        ProbeError: A split without labels, a group on both sides, a class that is asked for but
            not learned, or what the classifiers refuse.
    """
    plan = _plan_official(images, options)
    count, test, asked = len(images.classes), plan.parts[TEST], features[TEST]
    x, y = features[TRAIN], plan.parts[TRAIN].labels
    out = []
    for method in options.methods:
        if method == "linear":
            probe, details = _chosen(features, plan, images.classes, options)
            out.append(_of("linear", test, probe.probabilities(asked), details))
        elif method == "knn":
            k = plan.settings.neighbours
            p = knn_probabilities(x, y, asked, neighbours=k, n_classes=count)
            out.append(_of("knn", test, p, {"neighbours": k}))
        else:
            for shots in plan.settings.shots:
                p = few_shot_probabilities(
                    x, y, asked, shots=shots, draws=options.shot_repeats,
                    seed=options.seed, n_classes=count,
                )  # fmt: skip
                out.append(_of(f"few-shot-{shots}", test, p, {"draws": options.shot_repeats}))
    return _remarked(out, plan.settings)


def cross_validated(
    features: dict[str, np.ndarray], images: LabelledImages, options: ProbeOptions
) -> list[Predictions]:
    """Every row is asked about once a repeat, by classifiers that saw none of its group.

    All splits are pooled, in their order. Linear and kNN: `options.repeats` repeats of
    `options.folds` folds. Few-shot: repeat r draws from the training folds of the partition with
    seed r, so draws and folds vary together.

    Args:
        features: Split -> (N, D), rows as in `images`.
        images: Ids, labels, groups, class names.
        options: Methods and their settings.

    Returns:
        One a method, few-shot one for each number of shots; `details["remarks"]` says what of the
        options the data did not allow.

    Raises:
        ProbeError: No labels, folds that lose a class, or what the classifiers refuse.
    """
    part, partitions, settings = _plan_folds(images, options)
    x = np.concatenate([features[name] for name in images.splits])
    y, count = part.labels, len(images.classes)
    out = []
    for method in options.methods:
        if method == "linear":
            own = partitions[: options.repeats]
            p, details = _linear_folds(x, y, own, options.c, count)
            out.append(_of("linear", part, p, {"folds": options.folds} | details))
        elif method == "knn":
            p = np.zeros((options.repeats, len(y), count))
            for repeat, folds in enumerate(partitions[: options.repeats]):
                for train, test in folds:
                    p[repeat, test] = knn_probabilities(
                        x[train], y[train], x[test], neighbours=settings.neighbours,
                        n_classes=count,
                    )  # fmt: skip
            details = {"repeats": options.repeats, "neighbours": settings.neighbours}
            out.append(_of("knn", part, p, {"folds": options.folds} | details))
        else:
            for shots in settings.shots:
                p = _few_shot_folds(x, y, partitions[: options.shot_repeats], shots, count, options)
                details = {"folds": options.folds, "draws": options.shot_repeats}
                out.append(_of(f"few-shot-{shots}", part, p, details))
    return _remarked(out, settings)


def _few_shot_folds(
    x: np.ndarray,
    y: np.ndarray,
    partitions: Sequence[_Folds],
    shots: int,
    n_classes: int,
    options: ProbeOptions,
) -> np.ndarray:
    """(draws, n, C): a partition of its own for each draw."""
    p = np.zeros((len(partitions), len(y), n_classes), dtype=np.float32)
    for draw, folds in enumerate(partitions):
        for train, test in folds:
            p[draw, test] = few_shot_probabilities(
                x[train], y[train], x[test], shots=shots, draws=1,
                seed=options.seed + draw, n_classes=n_classes,
            )[0]  # fmt: skip
    return p


def _linear_folds(
    x: np.ndarray, y: np.ndarray, partitions: Sequence[_Folds], c: float, n_classes: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """(repeats, n, C) out-of-fold probabilities, and the details."""
    out, stopped = np.zeros((len(partitions), len(y), n_classes)), 0
    for repeat, folds in enumerate(partitions):
        for train, test in folds:
            probe = fit_linear(x[train], y[train], c, n_classes=n_classes)
            stopped += not probe.converged
            out[repeat, test] = probe.probabilities(x[test])
    return out, {"repeats": len(partitions), "c": c, "not_converged": stopped}


def grouped_cv(
    x: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    *,
    folds: int = 5,
    repeats: int = 5,
    c: float = 1e-3,
    n_classes: int | None = None,
    classes: Sequence[str] = (),
) -> Predictions:
    """Linear probe by repeated, grouped, stratified cross-validation.

    Features are standardised within each training part; folds are scikit-learn's
    StratifiedGroupKFold(folds, shuffle=True, random_state=repeat), which depends on the order of
    the groups' names: here it is the natural one, whatever their type (9 before 10).

    Args:
        x: (n, D) float.
        labels: (n,) ints.
        groups: (n,) patient or slide; None makes every row its own group.
        folds: Parts.
        repeats: Partitions, seeds 0, 1, ...
        c: Inverse regularisation, the same in every fold.
        n_classes: Columns of the probabilities; none: largest label + 1.
        classes: Names, for errors.

    Returns:
        Out-of-fold probabilities (repeats, n, C); `ids` are the rows' numbers.

    Raises:
        ProbeError: Fewer groups than folds, or a training part without some class.
    """
    labels = np.asarray(labels)
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    partitions = _partitions(labels, groups, folds, repeats, classes)
    out, details = _linear_folds(x, labels, partitions, c, n_classes)
    ids = np.arange(len(labels)).astype(str)
    return Predictions("linear", ids, groups, labels, out, {"folds": folds} | details)


def validation_rows(
    labels: np.ndarray, groups: np.ndarray | None, share: float, seed: int
) -> np.ndarray:
    """Draw a share of the groups, such that the rest keeps every class.

    Args:
        labels: (n,) ints.
        groups: (n,), or None for every row on its own.
        share: Of the groups, in (0, 1).
        seed: Of the draw.

    Returns:
        (n,) bool, True for validation.

    Raises:
        ProbeError: Fewer than two groups, or no draw in a hundred keeps every class in training.
    """
    unit = _units(labels, groups)
    units = int(unit.max()) + 1
    if units < 2:
        raise ProbeError(f"group {groups[0] if groups is not None else 0}: the only one; "
                         "a validation split needs two. Give another --group-column.")  # fmt: skip
    wanted = min(max(round(share * units), 1), units - 1)
    rng = np.random.default_rng(seed)
    present = len(np.unique(labels))
    for _ in range(_SPLIT_DRAWS):
        held = np.isin(unit, rng.permutation(units)[:wanted])
        if len(np.unique(labels[~held])) == present:
            return held
    raise ProbeError(
        f"validation share {share:g}: each of {_SPLIT_DRAWS} draws of {wanted} from {units} groups "
        "took all of a class from training. Give a smaller --validation-share, or a data set with "
        "a validation split."
    )


# --- what the data allow ---------------------------------------------------------------------


def _plan_official(images: LabelledImages, options: ProbeOptions) -> _Official:
    if not {TRAIN, TEST} <= set(images.splits):
        raise ProbeError(
            f"{images.name}: splits {', '.join(images.splits)}; an official split needs train and "
            "test. Use --cross-validate."
        )
    used = [name for name in (TRAIN, VALIDATION, TEST) if name in images.splits]
    parts = {name: _labelled(images.name, images.splits[name]) for name in used}
    y = parts[TRAIN].labels
    settings = _settings([y], images.classes, options)
    for name in (TRAIN, VALIDATION):
        settings.remarks[""] += _shared_with_test(images.name, parts, name, options)
    _check_learned(images, y, parts[TEST].labels, TEST)
    held = None
    if VALIDATION not in parts:
        if "linear" in options.methods:
            held = validation_rows(y, parts[TRAIN].groups, options.validation_share, options.seed)
        return _Official(parts, held, settings)
    shared = _shared(parts[TRAIN].groups, parts[VALIDATION].groups)
    if len(shared):
        both = _pooled([parts[TRAIN], parts[VALIDATION]])
        held = validation_rows(both.labels, both.groups, options.validation_share, options.seed)
        settings.remarks[""].append(
            f"{len(shared)} groups lie in train and in validation ({shared[0]!r} for one), so C is "
            "chosen on groups drawn from both instead."
        )
    else:
        _check_learned(images, y, parts[VALIDATION].labels, VALIDATION)
    return _Official(parts, held, settings)


def _plan_folds(
    images: LabelledImages, options: ProbeOptions
) -> tuple[_Part, list[_Folds], _Settings]:
    """All rows, the partitions of as many repeats as any method wants, and the settings."""
    part = _pooled([_labelled(images.name, split) for split in images.splits.values()])
    part = replace(part, ids=pooled_ids(images.splits))
    few = options.shot_repeats if "few-shot" in options.methods else 0
    most = max(few, options.repeats if {"linear", "knn"} & set(options.methods) else 0)
    partitions = _partitions(part.labels, part.groups, options.folds, most, images.classes)
    learned = [part.labels[train] for folds in partitions for train, _ in folds]
    return part, partitions, _settings(learned, images.classes, options)


def _settings(
    learned: Sequence[np.ndarray], classes: Sequence[str], options: ProbeOptions
) -> _Settings:
    """Clamp k and drop shots to what every training part has.

    Args:
        learned: Labels of each training part.
        classes: Names.
        options: What is wanted.

    Raises:
        ProbeError: No method is left.
    """
    remarks: dict[str, list[str]] = {"": [], "knn": [], "few-shot": []}
    rows = min(len(y) for y in learned)
    neighbours = min(options.neighbours, rows)
    if "knn" in options.methods and neighbours < options.neighbours:
        remarks["knn"].append(
            f"knn: {options.neighbours} neighbours wanted, but only {rows} images to learn from; "
            f"{neighbours} are used."
        )
    least, rarest = min(
        (int(count), int(label))
        for y in learned
        for label, count in zip(*np.unique(y, return_counts=True), strict=True)
    )
    shots = tuple(number for number in options.shots if number <= least)
    if "few-shot" in options.methods and len(shots) < len(options.shots):
        left_out = ", ".join(str(number) for number in options.shots if number > least)
        text = (
            f"few-shot: class {classes[rarest]!r} has {least} images to learn from, so {left_out} "
            "per class are left out."
        )
        if not shots and set(options.methods) == {"few-shot"}:
            raise ProbeError(f"{text} Nothing is left; give smaller --shots.")
        remarks["few-shot"].append(text)
    return _Settings(neighbours, shots, remarks)


def _remarked(answers: list[Predictions], settings: _Settings) -> list[Predictions]:
    """Put remarks into the details: of a method with its first answer, the rest with the first."""
    for key, remarks in settings.remarks.items():
        own = [answer for answer in answers if answer.method.startswith(key)] or answers
        if remarks:
            own[0].details.setdefault("remarks", []).extend(remarks)
    return answers


def _of(method: str, part: _Part, probabilities: np.ndarray, details: dict) -> Predictions:
    return Predictions(method, part.ids, part.groups, part.labels, probabilities, details)


def _labelled(name: str, split: ImageSplit) -> _Part:
    if split.labels is None:
        raise ProbeError(f"{name}: images without labels cannot be probed; give --label-column.")
    return _Part(split.ids, split.groups, split.labels)


def _pooled(parts: list[_Part]) -> _Part:
    groups = [part.groups for part in parts if part.groups is not None]
    return _Part(
        np.concatenate([part.ids for part in parts]),
        np.concatenate(groups) if len(groups) == len(parts) else None,
        np.concatenate([part.labels for part in parts]),
    )


def _shared(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray:
    """Groups that two splits have in common, in natural order."""
    if a is None or b is None:
        return np.array([], dtype=object)
    return np.array(sorted(set(map(str, a)) & set(map(str, b)), key=natural_key), dtype=object)


def _shared_with_test(
    name: str, parts: dict[str, _Part], split: str, options: ProbeOptions
) -> list[str]:
    """A remark about groups that a split shares with test, which is refused unless allowed."""
    shared = _shared(parts[split].groups, parts[TEST].groups) if split in parts else []
    if not len(shared):
        return []
    text = f"{len(shared)} groups lie in {split} and in test ({shared[0]!r} for one)"
    if not options.allow_shared_groups:
        raise ProbeError(
            f"{name}: {text}; scores would be of tissue that was learned. Use --cross-validate, "
            "which keeps groups together, or --allow-shared-groups, which says so in the report."
        )
    return [f"{text}: scores are in part of tissue that was learned (--allow-shared-groups)."]


def _check_learned(
    images: LabelledImages, learned: np.ndarray, asked: np.ndarray, where: str
) -> None:
    missing = np.setdiff1d(asked, learned)
    if len(missing):
        raise ProbeError(
            f"{images.name}: {where} has class {images.classes[missing[0]]!r}, training has not. "
            "Use --cross-validate, or leave that class out."
        )


def _chosen(
    features: dict[str, np.ndarray],
    plan: _Official,
    classes: Sequence[str],
    options: ProbeOptions,
) -> tuple[LinearProbe, dict[str, Any]]:
    """The linear probe on training and validation together, with the C of the validation loss."""
    parts, held, count = plan.parts, plan.held, len(classes)
    x, y = features[TRAIN], parts[TRAIN].labels
    if held is None:
        x_val, y_val = features[VALIDATION], parts[VALIDATION].labels
        held_out = "validation split"
        best, losses = choose_c(x, y, x_val, y_val, options.c_grid, n_classes=count)
    if VALIDATION in parts:
        x = np.concatenate([x, features[VALIDATION]])
        y = np.concatenate([y, parts[VALIDATION].labels])
    if held is not None:
        where = "training and validation" if VALIDATION in parts else "training"
        held_out = f"{held.sum()} of {len(held)} {where} images, seed {options.seed}"
        best, losses = choose_c(
            x[~held], y[~held], x[held], y[held], options.c_grid, n_classes=count
        )
    probe = fit_linear(x, y, best.c, n_classes=count, start=best)
    details = {
        "c": best.c,
        "c_chosen_on": held_out,
        "validation_loss": {f"{c:g}": loss for c, loss in losses.items()},
        "fitted_on": len(y),
        "not_converged": int(not probe.converged),
    }
    return probe, details


def _units(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """(n,) int64 number of each row's group, in natural order of the names whatever their type."""
    if groups is None:
        return np.arange(len(labels))
    names, unit = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    place = np.empty(len(names), dtype=np.int64)
    place[sorted(range(len(names)), key=lambda i: natural_key(str(names[i])))] = range(len(names))
    return place[unit]


def _partitions(
    y: np.ndarray, groups: np.ndarray | None, folds: int, repeats: int, classes: Sequence[str]
) -> list[_Folds]:
    """A partition of the rows for each of the seeds 0, 1, ..."""
    own = _units(y, groups)
    if len(own) != len(y):
        raise ProbeError(f"groups: {len(own)} for {len(y)} rows; give one for each row.")
    _check_folds(y, own, folds, classes, "images" if groups is None else "groups")
    return [_partition(y, own, folds, repeat, classes) for repeat in range(repeats)]


def _check_folds(
    y: np.ndarray, own: np.ndarray, folds: int, classes: Sequence[str], what: str
) -> None:
    present, units = np.unique(y), len(np.unique(own))
    if len(present) < 2:
        raise ProbeError(f"labels: {len(present)} class in {len(y)} images; a probe needs two.")
    if units < folds:
        raise ProbeError(
            f"--folds={folds}: only {units} {what}; give fewer folds, or a finer --group-column."
        )
    named = dict(enumerate(classes))
    for label in present:
        if len(np.unique(own[y == label])) < 2:
            raise ProbeError(
                f"class {named.get(int(label), label)!r}: all its images are of one group, so "
                "either training or test lacks it. Leave that class out, merge it with another, or "
                "give a finer --group-column."
            )


def _partition(
    y: np.ndarray, own: np.ndarray, folds: int, seed: int, classes: Sequence[str]
) -> _Folds:
    """StratifiedGroupKFold of one seed."""
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # That some test part lacks a rare class is no harm: scores are pooled.
        warnings.simplefilter("ignore", UserWarning)
        try:
            parts = list(splitter.split(np.zeros(len(y)), y, own))
        except ValueError as error:  # every class has fewer images than folds
            raise ProbeError(f"--folds={folds}: {error} Give fewer folds.") from error
    named = dict(enumerate(classes))
    for train, _ in parts:
        missing = np.setdiff1d(y, y[train])
        if len(missing):
            raise ProbeError(
                f"class {named.get(int(missing[0]), missing[0])!r}: no image left to learn "
                f"from in a fold of repeat {seed} (its groups are too few). Give more "
                "--folds, merge the class with another, or give a finer --group-column."
            )
    return [(train, test) for train, test in parts if len(test)]

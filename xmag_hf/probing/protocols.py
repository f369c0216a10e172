"""Which rows a classifier learns from, and which it is asked about: splits and cross-validation.

Rows of one group (patient, slide) are never on both sides.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from .classifiers import choose_c, few_shot_probabilities, fit_linear, knn_probabilities, log_loss
from .errors import ProbeError
from .images import ImageSplit, LabelledImages
from .options import ProbeOptions

logger = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
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


def official_split(
    features: dict[str, np.ndarray], images: LabelledImages, options: ProbeOptions
) -> list[Predictions]:
    """Learn from the training split, be asked about the test split.

    The linear probe's C is chosen on the validation split (where there is none: on a seeded share
    of the training groups), and it is then fitted again on training and validation together. kNN
    and few-shot have nothing to choose: they use the training split alone, so that a data set
    gives the same numbers whether or not its validation split is stored beside it.

    Args:
        features: Split -> (N, D).
        images: With splits train and test.
        options: Methods and their settings.

    Returns:
        One a method, few-shot one for each number of shots.

    Raises:
        ProbeError: A split without labels, a group on both sides, a class that is asked for but
            not learned, or what the classifiers refuse.
    """
    if not {TRAIN, TEST} <= set(images.splits):
        raise ProbeError(
            f"{images.name}: splits {', '.join(images.splits)}; an official split needs train and "
            "test. Use --cross-validate."
        )
    used = [name for name in (TRAIN, VALIDATION, TEST) if name in images.splits]
    parts = {name: _labelled(images.name, images.splits[name]) for name in used}
    _check_disjoint(images.name, parts)
    count = len(images.classes)
    x, y = features[TRAIN], parts[TRAIN].labels
    test = parts[TEST]
    _check_learned(images, y, test.labels, TEST)
    out = []
    for method in options.methods:
        if method == "linear":
            probe, details = _chosen(features, parts, images.classes, options)
            out.append(_of("linear", test, probe.probabilities(features[TEST]), details))
        elif method == "knn":
            p = knn_probabilities(
                x, y, features[TEST], neighbours=options.neighbours, n_classes=count
            )
            out.append(_of("knn", test, p, {"neighbours": options.neighbours}))
        else:
            for shots in options.shots:
                p = few_shot_probabilities(
                    x, y, features[TEST], shots=shots, draws=options.shot_repeats,
                    seed=options.seed, n_classes=count,
                )  # fmt: skip
                out.append(_of(f"few-shot-{shots}", test, p, {"draws": options.shot_repeats}))
    return out


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
        One a method, few-shot one for each number of shots.

    Raises:
        ProbeError: No labels, folds that lose a class, or what the classifiers refuse.
    """
    part = _pooled([_labelled(images.name, split) for split in images.splits.values()])
    x = np.concatenate([features[name] for name in images.splits])
    y, groups, classes, count = part.labels, part.groups, images.classes, len(images.classes)
    facts = {"folds": options.folds, "repeats": options.repeats}
    out = []
    for method in options.methods:
        if method == "linear":
            cv = grouped_cv(
                x, y, groups, folds=options.folds, repeats=options.repeats, c=options.c,
                n_classes=count, classes=classes,
            )  # fmt: skip
            out.append(_of("linear", part, cv.probabilities, cv.details))
        elif method == "knn":
            p = np.zeros((options.repeats, len(y), count))
            for repeat, train, test in _repeated(
                y, groups, options.folds, options.repeats, classes
            ):
                p[repeat, test] = knn_probabilities(
                    x[train], y[train], x[test], neighbours=options.neighbours, n_classes=count
                )
            out.append(_of("knn", part, p, facts | {"neighbours": options.neighbours}))
        else:
            folds = list(_repeated(y, groups, options.folds, options.shot_repeats, classes))
            for shots in options.shots:
                p = np.zeros((options.shot_repeats, len(y), count), dtype=np.float32)
                for repeat, train, test in folds:
                    p[repeat, test] = few_shot_probabilities(
                        x[train], y[train], x[test], shots=shots, draws=1,
                        seed=options.seed + repeat, n_classes=count,
                    )[0]  # fmt: skip
                facts = {"folds": options.folds, "draws": options.shot_repeats}
                out.append(_of(f"few-shot-{shots}", part, p, facts))
    return out


def grouped_cv(
    x: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    *,
    folds: int = 5,
    repeats: int = 5,
    c: float = 1e-3,
    c_grid: Sequence[float] | None = None,
    n_classes: int | None = None,
    classes: Sequence[str] = (),
) -> Predictions:
    """Linear probe by repeated, grouped, stratified cross-validation.

    Features are standardised within each training part; folds are scikit-learn's
    StratifiedGroupKFold(folds, shuffle=True, random_state=repeat).

    Args:
        x: (n, D) float.
        labels: (n,) ints.
        groups: (n,) patient or slide; None makes every row its own group.
        folds: Parts.
        repeats: Partitions, seeds 0, 1, ...
        c: Inverse regularisation, the same in every fold.
        c_grid: If given, C is instead chosen in every training part, by the mean cross-entropy of
            an inner cross-validation of `folds` parts, by group too.
        n_classes: Columns of the probabilities; none: largest label + 1.
        classes: Names, for errors.

    Returns:
        Out-of-fold probabilities (repeats, n, C); `ids` are the rows' numbers.

    Raises:
        ProbeError: Fewer groups than folds, or a training part without some class.
    """
    labels = np.asarray(labels)
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    out = np.zeros((repeats, len(labels), n_classes))
    chosen, stopped = [], 0
    for repeat, train, test in _repeated(labels, groups, folds, repeats, classes):
        if c_grid is not None:
            own = None if groups is None else groups[train]
            c = _inner_c(x[train], labels[train], own, c_grid, folds, repeat, classes)
            chosen.append(c)
        probe = fit_linear(x[train], labels[train], c, n_classes=n_classes)
        stopped += not probe.converged
        out[repeat, test] = probe.probabilities(x[test])
    details = {
        "folds": folds,
        "repeats": repeats,
        "c": c if c_grid is None else chosen,
        "not_converged": stopped,
    }
    ids = np.arange(len(labels)).astype(str)
    return Predictions("linear", ids, groups, labels, out, details)


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
    unit = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
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


@dataclass(frozen=True)
class _Part:
    """A split whose labels are there."""

    ids: np.ndarray
    groups: np.ndarray | None
    labels: np.ndarray


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


def _check_disjoint(name: str, parts: dict[str, _Part]) -> None:
    """Refuse a group that training or validation shares with test."""
    test = parts[TEST].groups
    for split in (TRAIN, VALIDATION):
        groups = parts[split].groups if split in parts else None
        if groups is None or test is None:
            continue
        shared = np.intersect1d(groups, test)
        if len(shared):
            raise ProbeError(
                f"{name}: {len(shared)} groups lie in {split} and in test, {shared[0]!r} for one; "
                "scores would be of tissue that was learned. Use --cross-validate, which keeps "
                "groups together, or --group-column - to ignore groups."
            )


def _check_learned(images: LabelledImages, learned: np.ndarray, asked: np.ndarray, where: str):
    missing = np.setdiff1d(asked, learned)
    if len(missing):
        raise ProbeError(
            f"{images.name}: {where} has class {images.classes[missing[0]]!r}, training has not. "
            "Use --cross-validate, or leave that class out."
        )


def _chosen(
    features: dict[str, np.ndarray],
    parts: dict[str, _Part],
    classes: Sequence[str],
    options: ProbeOptions,
):
    """The linear probe on training and validation together, with the C of the validation loss."""
    x, y = features[TRAIN], parts[TRAIN].labels
    if VALIDATION in parts:
        x_val, y_val = features[VALIDATION], parts[VALIDATION].labels
        held_out = "validation split"
        best, losses = choose_c(x, y, x_val, y_val, options.c_grid, n_classes=len(classes))
        x, y = np.concatenate([x, x_val]), np.concatenate([y, y_val])
    else:
        held = validation_rows(y, parts[TRAIN].groups, options.validation_share, options.seed)
        held_out = f"{held.sum()} of {len(held)} training images, seed {options.seed}"
        best, losses = choose_c(
            x[~held], y[~held], x[held], y[held], options.c_grid, n_classes=len(classes)
        )
    probe = fit_linear(x, y, best.c, n_classes=len(classes), start=best)
    details = {
        "c": best.c,
        "c_chosen_on": held_out,
        "validation_loss": {f"{c:g}": loss for c, loss in losses.items()},
        "fitted_on": len(y),
        "not_converged": int(not probe.converged),
    }
    return probe, details


def _inner_c(
    x: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None,
    grid: Sequence[float],
    folds: int,
    seed: int,
    classes: Sequence[str],
) -> float:
    """The C with the least mean cross-entropy over inner held-out rows."""
    n_classes = int(y.max()) + 1
    splits = list(_repeated(y, groups, folds, 1, classes, first_seed=seed))
    losses = {}
    for c in sorted(grid):
        total = 0.0
        for _, train, test in splits:
            probe = fit_linear(x[train], y[train], c, n_classes=n_classes)
            total += log_loss(y[test], probe.probabilities(x[test])) * len(test)
        losses[c] = total / len(y)
    return min(losses, key=losses.__getitem__)


def _repeated(
    y: np.ndarray,
    groups: np.ndarray | None,
    folds: int,
    repeats: int,
    classes: Sequence[str],
    first_seed: int = 0,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(repeat, training rows, test rows) of StratifiedGroupKFold with seeds first_seed, ..."""
    own = np.arange(len(y)) if groups is None else np.asarray(groups)
    present, units = np.unique(y), len(np.unique(own))
    if len(present) < 2:
        raise ProbeError(f"labels: {len(present)} class in {len(y)} images; a probe needs two.")
    if units < folds:
        raise ProbeError(
            f"--folds={folds}: only {units} {'groups' if groups is not None else 'images'}; "
            "give fewer folds, or a finer --group-column."
        )
    named = dict(enumerate(classes))
    for label in present:
        holders = len(np.unique(own[y == label]))
        if holders < 2:
            raise ProbeError(
                f"class {named.get(int(label), label)!r}: all its images are of one group, so "
                "either training or test lacks it. Leave that class out, merge it with another, or "
                "give a finer --group-column."
            )
    for repeat in range(repeats):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=first_seed + repeat)
        with warnings.catch_warnings():
            # That some test part lacks a rare class is no harm: scores are pooled.
            warnings.simplefilter("ignore", UserWarning)
            try:
                parts = list(splitter.split(np.zeros(len(y)), y, own))
            except ValueError as error:  # every class has fewer images than folds
                raise ProbeError(f"--folds={folds}: {error} Give fewer folds.") from error
        for train, test in parts:
            missing = np.setdiff1d(present, y[train])
            if len(missing):
                raise ProbeError(
                    f"class {named.get(int(missing[0]), missing[0])!r}: no image left to learn "
                    f"from in a fold of repeat {repeat} (its groups are too few). Give more "
                    "--folds, merge the class with another, or give a finer --group-column."
                )
            if len(test):
                yield repeat, train, test

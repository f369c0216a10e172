"""Accuracy, F1, one-vs-rest AUC, rank correlation, and each one's form for bootstrap weights.

A bootstrap resample is a vector of multiplicities: how often each row was drawn. Every metric here
has a form that sorts once and then scores many resamples from their multiplicities, exactly as if
rows had been repeated; `weighted_form` finds it. May import NumPy. Imports nothing of xmag_hf.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from .errors import EvaluationError, finite, labels_of, same_length

# (B, n) multiplicities -> (B,) values, NaN where the metric is undefined on a resample.
WeightedForm = Callable[[np.ndarray], np.ndarray]
Metric = Callable[..., float]
Average = Literal["macro", "weighted"]


def accuracy(y_true: Any, y_pred: Any) -> float:
    """Share of rows whose predicted class is the true one.

    Args:
        y_true: (n,) labels 0..C-1.
        y_pred: (n,) predicted labels.

    Returns:
        In 0..1.

    Raises:
        EvaluationError: Empty, not integers, negative, or lengths differ.
    """
    return _whole(_accuracy_form(y_true, y_pred), y_true)


def f1(y_true: Any, y_pred: Any, average: Average = "macro") -> float:
    """F1 averaged over classes.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c) = 2 TP_c / (true_c + predicted_c). `macro` is the plain
    mean over the classes that occur in `y_true` or `y_pred` (a class that is predicted and never
    true has F1 0; one that never occurs has none and is left out); `weighted` weights by true_c.
    Both are scikit-learn's `f1_score` at its defaults.

    Args:
        y_true: (n,) labels 0..C-1.
        y_pred: (n,) predicted labels.
        average: `macro` or `weighted`.

    Returns:
        In 0..1.

    Raises:
        EvaluationError: Empty, not integers, negative, lengths differ, or an unknown average.
    """
    return _whole(_f1_form(y_true, y_pred, average), y_true)


def roc_auc(y_true: Any, scores: Any) -> float:
    """Area under the ROC curve; with several classes the macro one-vs-rest mean.

    AUC = P(score of a positive > score of a negative) + P(equal) / 2, by midranks (Mann-Whitney).
    Several classes: the plain mean of each class's AUC against all others, over the classes that
    have a positive and a negative case in `y_true`; the columns of other classes are not used.

    Args:
        y_true: (n,) labels 0..C-1.
        scores: (n,) scores of class 1, or (n, 2) of which column 1 is used, or (n, C).

    Returns:
        In 0..1.

    Raises:
        EvaluationError: One class only, NaN or infinite scores, lengths differ, or a label without
            a column.
    """
    return _whole(_auc_form(y_true, scores), y_true)


def spearman(y_true: Any, y_pred: Any) -> float:
    """Spearman's rank correlation: Pearson's correlation of the midranks.

    Args:
        y_true: (n,) measured values.
        y_pred: (n,) predicted values.

    Returns:
        In -1..1.

    Raises:
        EvaluationError: Fewer than 2 rows, a constant array, NaN or infinite values, or lengths
            differ.
    """
    value = _whole(_spearman_form(y_true, y_pred), y_true)
    if np.isnan(value):
        raise EvaluationError(
            f"spearman: y_true or y_pred is constant over {len(y_true)} rows; "
            "a rank correlation needs at least two different values in each."
        )
    return value


def mean_over_repeats(metric: Metric, y_true: Any, predictions: Any) -> float:
    """Mean of `metric` over repeats of the same predictions (repeated cross-validation).

    Arrays of a bootstrap share axis 0, so repeats lie on axis 1; transpose R-first arrays:

        repeats = probabilities.transpose(1, 0, 2)  # (R, n, C) -> (n, R, C)
        metric = functools.partial(mean_over_repeats, roc_auc)
        bootstrap_ci(metric, labels, repeats, clusters=patients)

    gives the mean AUC over R repeats with an interval that resamples patients (each resample takes
    a patient's rows in all R repeats), so that repeats are not mistaken for new patients.

    Args:
        metric: Called with (y_true, predictions[:, r]).
        y_true: (n,) labels or values.
        predictions: (n, R) or (n, R, C).

    Returns:
        The mean of R values.

    Raises:
        EvaluationError: Fewer than two axes, no repeats, or what `metric` refuses.
    """
    repeats = _repeats(predictions)
    return float(np.mean([metric(y_true, repeats[:, r]) for r in range(repeats.shape[1])]))


def weighted_form(metric: Metric, arrays: tuple[Any, ...]) -> WeightedForm | None:
    """The form of one of this module's metrics that scores resamples by multiplicities.

    The classes of a macro mean are those of the whole data: a resample that has lost one of them
    (AUC: its positives or its negatives; macro F1: its true cases) gets NaN instead of the mean of
    something else.

    Args:
        metric: A metric of this module, or a `functools.partial` of one.
        arrays: What it would be called with.

    Returns:
        (B, n) multiplicities -> (B,) values, NaN where undefined; None for other callables.

    Raises:
        EvaluationError: What the metric itself refuses.
    """
    given: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    while isinstance(metric, partial):
        given, keywords = metric.args + given, metric.keywords | keywords
        metric = metric.func
    for known, form in _FORMS:
        if metric is known:
            return form(*given, *arrays, **keywords)
    return None


def present_classes(y_true: np.ndarray, columns: int) -> np.ndarray:
    """Classes with at least one positive and one negative case.

    Args:
        y_true: (n,) int64, below `columns`.
        columns: C.

    Returns:
        (K,) class numbers, K >= 2.

    Raises:
        EvaluationError: One class only.
    """
    counts = np.bincount(y_true, minlength=columns)
    present = np.flatnonzero((counts > 0) & (counts < len(y_true)))
    if not len(present):
        raise EvaluationError(
            f"y_true: all {len(y_true)} rows are class {y_true[0]}; an AUC needs cases of at "
            "least two classes."
        )
    return present


def scores_of(name: str, scores: Any, y_true: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check scores against labels, and bring them to one binary problem per column.

    Args:
        name: For messages.
        scores: (n,), (n, 2) or (n, C).
        y_true: (n,) labels.

    Returns:
        Labels (n,) int64; the K positive classes; their scores (n, K) float64. Binary: K = 1.

    Raises:
        EvaluationError: As `roc_auc`.
    """
    checked = finite(name, scores, (1, 2))
    if checked.ndim == 2 and checked.shape[1] == 1:
        raise EvaluationError(f"{name}: shape {checked.shape}; give (n,), (n, 2) or (n, C).")
    columns = 2 if checked.ndim == 1 else checked.shape[1]
    labels = labels_of("y_true", y_true, columns)
    same_length(y_true=labels, **{name: checked})
    classes = present_classes(labels, columns)
    if columns == 2:
        return labels, np.array([1]), (checked if checked.ndim == 1 else checked[:, 1])[:, None]
    return labels, classes, checked[:, classes]


def tie_bounds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort once, and say where each value's run of ties begins and ends.

    Args:
        values: (n,) float64.

    Returns:
        `order` (n,): ascending; `first`, `last` (n,) int64: for each row of `values`, how many
        values are smaller, and how many are smaller or equal. The midrank is
        (first + last + 1) / 2.
    """
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    first = np.searchsorted(ascending, values, side="left")
    return order, first, np.searchsorted(ascending, values, side="right")


def _whole(form: WeightedForm, rows: Any) -> float:
    return float(form(np.ones((1, len(rows))))[0])


def _accuracy_form(y_true: Any, y_pred: Any) -> WeightedForm:
    labels, predicted = labels_of("y_true", y_true), labels_of("y_pred", y_pred)
    same_length(y_true=labels, y_pred=predicted)
    right = (labels == predicted).astype(np.float64)
    return lambda weights: weights @ right / weights.sum(axis=1)


def _f1_form(y_true: Any, y_pred: Any, average: Average = "macro") -> WeightedForm:
    if average not in ("macro", "weighted"):
        raise EvaluationError(f"average: {average!r}; choose 'macro' or 'weighted'.")
    labels, predicted = labels_of("y_true", y_true), labels_of("y_pred", y_pred)
    same_length(y_true=labels, y_pred=predicted)
    size = int(max(labels.max(), predicted.max())) + 1
    pairs = labels * size + predicted
    occurs = np.union1d(labels, predicted)
    needed = np.unique(labels)

    def score(weights: np.ndarray) -> np.ndarray:
        tables = np.stack([np.bincount(pairs, row, size * size) for row in weights])
        tables = tables.reshape(-1, size, size)
        hits = np.diagonal(tables, axis1=1, axis2=2)
        true, total = tables.sum(axis=2), tables.sum(axis=2) + tables.sum(axis=1)
        each = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
        if average == "weighted":
            return (each * true).sum(axis=1) / true.sum(axis=1)
        return np.where((true[:, needed] > 0).all(axis=1), each[:, occurs].mean(axis=1), np.nan)

    return score


def _auc_form(y_true: Any, scores: Any) -> WeightedForm:
    labels, classes, columns = scores_of("scores", scores, y_true)
    prepared = []
    for positive, column in zip(classes, columns.T, strict=True):
        rows = np.flatnonzero(labels == positive)
        order, first, last = tie_bounds(column)
        prepared.append((rows, order, first[rows], last[rows]))

    def score(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=1)
        below = np.zeros((len(weights), weights.shape[1] + 1))
        areas = np.empty((len(prepared), len(weights)))
        for area, (rows, order, first, last) in zip(areas, prepared, strict=True):
            np.cumsum(weights[:, order], axis=1, out=below[:, 1:])
            drawn = weights[:, rows]
            positives = drawn.sum(axis=1)
            # Pairs of two positives, ties and a row with itself as a half, make positives^2 / 2.
            wins = ((below[:, first] + below[:, last]) * drawn).sum(axis=1) - positives**2
            area[:] = _ratio(wins / 2, positives * (total - positives))
        return areas.mean(axis=0)

    return score


def _spearman_form(y_true: Any, y_pred: Any) -> WeightedForm:
    measured, predicted = finite("y_true", y_true), finite("y_pred", y_pred)
    if same_length(y_true=measured, y_pred=predicted) < 2:
        raise EvaluationError("spearman: 1 row; a rank correlation needs at least 2.")
    bounds = [tie_bounds(measured), tie_bounds(predicted)]

    def score(weights: np.ndarray) -> np.ndarray:
        centred = []
        for order, first, last in bounds:
            below = np.zeros((len(weights), weights.shape[1] + 1))
            np.cumsum(weights[:, order], axis=1, out=below[:, 1:])
            ranks = (below[:, first] + below[:, last]) / 2
            # Midranks of the whole resample average to half its size, here without the + 1 / 2.
            centred.append(ranks - weights.sum(axis=1, keepdims=True) / 2)
        x, y = centred
        spread = (weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)
        return _ratio((weights * x * y).sum(axis=1), np.sqrt(spread))

    return score


def _repeats_form(metric: Metric, y_true: Any, predictions: Any) -> WeightedForm | None:
    repeats = _repeats(predictions)
    forms = [weighted_form(metric, (y_true, repeats[:, r])) for r in range(repeats.shape[1])]
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return None
    return lambda weights: np.mean([form(weights) for form in known], axis=0)


def _repeats(predictions: Any) -> np.ndarray:
    array = np.asarray(predictions)
    if array.ndim not in (2, 3) or array.shape[1] == 0:
        raise EvaluationError(
            f"predictions: shape {array.shape}; repeats lie on axis 1: (n, R) or (n, R, C)."
        )
    return array


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


_FORMS: tuple[tuple[Metric, Callable[..., WeightedForm | None]], ...] = (
    (accuracy, _accuracy_form),
    (f1, _f1_form),
    (roc_auc, _auc_form),
    (spearman, _spearman_form),
    (mean_over_repeats, _repeats_form),
)

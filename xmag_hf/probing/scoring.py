"""Scores with intervals, and paired tests between rows of the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from xmag_hf.evaluation import (
    EvaluationError,
    PairedTest,
    accuracy,
    bootstrap_ci,
    bootstrap_test,
    delong_test,
    f1,
    holm,
    mcnemar_test,
    mean_over_repeats,
    roc_auc,
    spearman,
)

from .errors import ProbeError

AUC = "AUC"
ACCURACY = "accuracy"
SPEARMAN = "Spearman"
# Few-shot draws differ between images drawn, not between encoders; a test of each number of shots
# would be many tests of one question. Their predictions are saved for whoever asks it.
FEW_SHOT = "few-shot"

Metric = Callable[..., float]
# Called when one question is answered.
Step = Callable[[], None]


@dataclass(frozen=True)
class Question:
    """One number to be told about one row of the report.

    Attributes:
        row: Label of the row.
        method: linear, knn, few-shot-4, counts, cells ...
        metric: Name of the metric.
        function: Called with truth and one repeat's predictions.
        truth: (n,) labels, or measured values.
        predictions: (n, ...) or, with `repeats`, (n, R, ...).
        repeats: Whether axis 1 of the predictions is repeats.
        groups: (n,) patients or slides; None without.
        units: What one of the n is, and what one of the groups is.
    """

    row: str
    method: str
    metric: str
    function: Metric
    truth: np.ndarray
    predictions: np.ndarray
    repeats: bool
    groups: np.ndarray | None
    units: tuple[str, str] = ("image", "group")

    @property
    def scored(self) -> Metric:
        """The function over all repeats."""
        return partial(mean_over_repeats, self.function) if self.repeats else self.function

    @property
    def primary(self) -> bool:
        """Whether its p-values are adjusted: one metric speaks for each method."""
        return self.metric == AUC or self.metric.startswith(SPEARMAN)


@dataclass(frozen=True)
class Score:
    """A score and its interval.

    Attributes:
        row: Label of the row.
        method: As in `Question`.
        metric: As in `Question`.
        estimate: On all images; the mean over repeats. NaN where it is undefined.
        low: Lower end; NaN where there is none.
        high: Upper end.
        level: Of the interval.
        unit: What was drawn: `image`, `cell`, `group`; or `draw`, whose interval is of the
            few-shot draws themselves.
        samples: Bootstrap resamples, or draws.
        redrawn: Of them drawn again because the metric was undefined.
        reason: Why something is NaN; empty otherwise.
    """

    row: str
    method: str
    metric: str
    estimate: float
    low: float
    high: float
    level: float
    unit: str
    samples: int
    redrawn: int
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """A row against another, on the same images.

    Attributes:
        row: Label of the row.
        reference: Label of the other.
        method: As in `Question`.
        metric: As in `Question`.
        test: Name; p-value two-sided; difference = row - reference with its interval. NaN where
            there is no answer.
        p_holm: Adjusted over the `family`; NaN for the metrics that are not adjusted.
        family: How many p-values of what were adjusted together; empty where none were.
        reason: Why there is no answer; empty where there is one.
    """

    row: str
    reference: str
    method: str
    metric: str
    test: PairedTest
    p_holm: float
    family: str = ""
    reason: str = ""

    @property
    def half_width(self) -> float:
        """Of the interval: differences smaller than this are not told apart."""
        return (self.test.high - self.test.low) / 2


def class_questions(
    row: str,
    method: str,
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray | None,
) -> list[Question]:
    """Accuracy, macro F1, weighted F1 and macro one-vs-rest AUC of one set of predictions.

    Args:
        row: Label of the row.
        method: Of the classifier.
        labels: (n,) ints.
        probabilities: (n, C), or (R, n, C) for repeats.
        groups: (n,) or None.

    Returns:
        Four questions; the class of highest probability is the prediction.
    """
    repeats = probabilities.ndim == 3
    scores = probabilities.transpose(1, 0, 2) if repeats else probabilities  # (n, R, C) or (n, C)
    chosen = scores.argmax(axis=-1)
    return [
        Question(row, method, name, function, labels, predictions, repeats, groups)
        for name, function, predictions in (
            (ACCURACY, accuracy, chosen),
            ("macro F1", partial(f1, average="macro"), chosen),
            ("weighted F1", partial(f1, average="weighted"), chosen),
            (AUC, roc_auc, scores),
        )
    ]


def count_questions(
    row: str,
    method: str,
    types: Sequence[str],
    log_counts: np.ndarray,
    predictions: np.ndarray,
    groups: np.ndarray | None,
    units: tuple[str, str] = ("image", "group"),
) -> list[Question]:
    """Spearman's rank correlation and mean absolute error of each type's log counts.

    Args:
        row: Label of the row.
        method: `counts` (whole images) or `cells`.
        types: K names.
        log_counts: (n, K) log(1 + count).
        predictions: (seeds, n, K) of the same.
        groups: (n,) or None.
        units: As in `Question`.

    Returns:
        Two questions a type.
    """
    questions = []
    for number, name in enumerate(types):
        predicted = predictions[:, :, number].T  # (n, seeds)
        for metric, function in ((SPEARMAN, spearman), ("MAE", absolute_error)):
            subject = f"{metric} {name}"
            truth = log_counts[:, number]
            questions.append(
                Question(row, method, subject, function, truth, predicted, True, groups, units)
            )
    return questions


def absolute_error(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """Mean absolute difference."""
    return float(np.abs(np.asarray(y_true) - np.asarray(y_pred)).mean())


def score(question: Question, *, samples: int, level: float, seed: int) -> list[Score]:
    """The estimate with its interval by image and, where there are groups, by group.

    Few-shot has one interval, of the draws themselves: which images were learned from moves its
    score more than which were asked about, and resampling both would take an hour.

    Args:
        question: What is asked.
        samples: Bootstrap resamples.
        level: Of the interval.
        seed: Of the bootstrap.

    Returns:
        One or two scores, which differ in their interval only. What is undefined is NaN, with the
        reason.
    """
    if question.method.startswith(FEW_SHOT) and question.repeats:
        return [_score_of_draws(question, level)]
    scores = []
    for unit, clusters in zip(question.units, (None, question.groups), strict=True):
        if unit == question.units[1] and clusters is None:
            continue
        reason = ""
        try:
            found = bootstrap_ci(
                question.scored,
                question.truth,
                question.predictions,
                clusters=clusters,
                samples=samples,
                level=level,
                seed=seed,
            )
            ends = found.estimate, found.low, found.high, level, unit, found.samples, found.redrawn
        except EvaluationError as error:
            estimate, reason = _estimate(question), str(error)
            ends = estimate, math.nan, math.nan, level, unit, 0, 0
        scores.append(Score(question.row, question.method, question.metric, *ends, reason))
    return scores


def _score_of_draws(question: Question, level: float) -> Score:
    """Mean and percentiles over the draws that axis 1 of the predictions holds."""
    values, reason = np.zeros(0), ""
    try:
        values = np.array([
            question.function(question.truth, question.predictions[:, draw])
            for draw in range(question.predictions.shape[1])
        ])  # fmt: skip
    except EvaluationError as error:
        reason = str(error)
    estimate, low, high = (float(values.mean()) if len(values) else math.nan), math.nan, math.nan
    if len(values) == 1:
        reason = "one draw only; an interval of draws needs two"
    elif len(values):
        low, high = (float(q) for q in np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
    ends = estimate, low, high, level, "draw", len(values), 0
    return Score(question.row, question.method, question.metric, *ends, reason)


def _estimate(question: Question) -> float:
    """The estimate alone; NaN where even that is refused."""
    try:
        return float(question.scored(question.truth, question.predictions))
    except EvaluationError:
        return math.nan


def compare(
    rows: Sequence[Sequence[Question]],
    *,
    samples: int,
    level: float,
    seed: int,
    pairs: Sequence[tuple[int, int]] | None = None,
    step: Step = lambda: None,
) -> list[Comparison]:
    """Test rows against each other, method by method and metric by metric.

    Independent images and one set of predictions: DeLong for AUC, McNemar (mid-p) for accuracy.
    Everything else (groups, repeats of a cross-validation, F1, rank correlation) by a bootstrap of
    the difference, which draws groups where there are any. One metric of each method is adjusted by
    Holm over all its comparisons (pairs of rows, and types of nuclei): AUC, or Spearman's.

    Args:
        rows: Questions of each row.
        samples: Bootstrap resamples.
        level: Of the intervals of differences.
        seed: Of the bootstrap.
        pairs: (row, reference) by number; none: every row against the first.
        step: Called after every test.

    Returns:
        Comparisons, pair by pair in the order of the questions; few-shot is not tested. A test
        without an answer has NaN and the reason.

    Raises:
        ProbeError: Rows that answer for different images.
    """
    pairs = [(number, 0) for number in range(1, len(rows))] if pairs is None else pairs
    found: list[tuple[Question, Comparison]] = []
    for number, other in pairs:
        reference = {(q.method, q.metric): q for q in rows[other]}
        for question in rows[number]:
            key = question.method, question.metric
            if key not in reference or question.method.startswith(FEW_SHOT):
                continue
            found.append((question, _compared(question, reference[key], samples, level, seed)))
            step()
    return _adjusted(found)


def _compared(a: Question, b: Question, samples: int, level: float, seed: int) -> Comparison:
    if not np.array_equal(a.truth, b.truth):
        raise ProbeError(
            f"{a.row} and {b.row}: {a.method} was done on different images; they cannot be "
            "compared."
        )
    reason = ""
    try:
        test = _test(a, b, samples, level, seed)
    except EvaluationError as error:
        # One group only, say: no reason to lose all other answers.
        reason, none = str(error), math.nan
        ours, theirs = _estimate(a), _estimate(b)
        test = PairedTest(
            "none", none, none, ours, theirs, ours - theirs, none, none, len(a.truth), level=level
        )
    return Comparison(a.row, b.row, a.method, a.metric, test, math.nan, reason=reason)


def _adjusted(found: Sequence[tuple[Question, Comparison]]) -> list[Comparison]:
    """Holm's adjustment within the primary metric of each method."""
    families: dict[str, list[int]] = {}
    for place, (question, comparison) in enumerate(found):
        if question.primary and not comparison.reason:
            families.setdefault(question.method, []).append(place)
    out = [comparison for _, comparison in found]
    for method, places in families.items():
        metric = out[places[0]].metric.split(" ")[0]
        family = f"{len(places)} of {metric}, {method}"
        adjusted = holm([out[place].test.p_value for place in places])
        for place, p_value in zip(places, adjusted, strict=True):
            out[place] = dataclasses.replace(out[place], p_holm=float(p_value), family=family)
    return out


def _test(a: Question, b: Question, samples: int, level: float, seed: int) -> PairedTest:
    if a.groups is None and not a.repeats:
        if a.metric == ACCURACY:
            return mcnemar_test(a.truth, a.predictions, b.predictions, level=level)
        if a.metric == AUC:
            try:
                return delong_test(a.truth, a.predictions, b.predictions, level=level)
            except EvaluationError:
                pass  # a class with one case, or perfect scores: the bootstrap can still answer
    return bootstrap_test(
        a.scored,
        a.truth,
        a.predictions,
        b.predictions,
        clusters=a.groups,
        samples=samples,
        level=level,
        seed=seed,
    )

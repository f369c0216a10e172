"""Two models on the same cases: DeLong, McNemar, bootstrap tests, Holm's correction. Two-sided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import binom, norm

from .errors import EvaluationError, finite, labels_of, same_length
from .intervals import paired_differences
from .metrics import Average, Metric, f1, scores_of, tie_bounds


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test of model a against model b on the same cases.

    Attributes:
        test: Its name, as a table should print it.
        statistic: DeLong: z. McNemar: the cases that only a has right. Bootstrap: the difference.
        p_value: Two-sided.
        estimate_a: The metric of a.
        estimate_b: The metric of b.
        difference: a - b.
        low: Lower end of the interval of a - b.
        high: Upper end.
        n: Cases (rows).
        samples: Bootstrap resamples used; 0 for the others.
        redrawn: Resamples thrown away because the metric is undefined on them.
        level: Nominal coverage of the interval.
    """

    test: str
    statistic: float
    p_value: float
    estimate_a: float
    estimate_b: float
    difference: float
    low: float
    high: float
    n: int
    samples: int = 0
    redrawn: int = 0
    level: float = 0.95


def delong_test(y_true: Any, score_a: Any, score_b: Any, *, level: float = 0.95) -> PairedTest:
    """DeLong's test of two correlated areas under the ROC curve.

    DeLong et al. 1988 (doi:10.2307/2531595), with midranks in O(n log n) as Sun & Xu 2014
    (doi:10.1109/LSP.2014.2337313). For a class with m positives and k negatives, a positive's
    component V10 is the share of negatives below it (equal: half), a negative's V01 the share of
    positives above it, and AUC = mean V10 = mean V01. Row i contributes

        e_i = (V10_i - AUC) / sqrt(m (m - 1))   or   (V01_i - AUC) / sqrt(k (k - 1))

    and the covariance of two areas on the same rows is sum_i e_i e'_i: with two classes exactly
    S10 / m + S01 / k. Several classes: one area per class against the rest and model, the joint
    covariance over classes and models from the same sum, and the test is of the difference of the
    macro means; a row is a positive in one class and a negative in the others, which the joint
    covariance keeps. z is referred to the standard normal.

    Rows are taken as independent. For clustered rows (images of a patient) use
    `bootstrap_test(roc_auc, ..., clusters=)`.

    Args:
        y_true: (n,) labels 0..C-1.
        score_a: (n,) or (n, 2) for two classes, or (n, C).
        score_b: As `score_a`.
        level: Of the interval.

    Returns:
        `test` "DeLong"; estimates are (macro one-vs-rest) AUCs; normal 95% interval. Identical
        scores have z = 0 and p = 1.

    Raises:
        EvaluationError: As `roc_auc`; a class with a single case, or with all but one; or both
            areas without variance though they differ.
    """
    area_a, rows_a = _delong("score_a", y_true, score_a)
    area_b, rows_b = _delong("score_b", y_true, score_b)
    columns = [shape[1] if len(shape) == 2 else 2 for shape in map(np.shape, (score_a, score_b))]
    if columns[0] != columns[1]:
        raise EvaluationError(
            f"delong_test: score_a and score_b are of {columns[0]} and {columns[1]} classes; "
            "give the same classes in the same order."
        )
    difference = area_a - area_b
    error = float(np.sqrt(np.sum((rows_a - rows_b) ** 2)))
    if error < 1e-12:
        if abs(difference) > 1e-12:
            raise EvaluationError(
                f"delong_test: the areas {area_a:.3f} and {area_b:.3f} differ without any variance "
                "(perfect or constant scores); use bootstrap_test(roc_auc, ...)."
            )
        statistic = 0.0
    else:
        statistic = difference / error
    margin = _normal_quantile(level) * error
    return PairedTest(
        test="DeLong",
        statistic=statistic,
        p_value=float(2 * norm.sf(abs(statistic))),
        estimate_a=area_a,
        estimate_b=area_b,
        difference=difference,
        low=difference - margin,
        high=difference + margin,
        n=len(rows_a),
        level=level,
    )


def mcnemar_test(
    y_true: Any, pred_a: Any, pred_b: Any, mid_p: bool = True, *, level: float = 0.95
) -> PairedTest:
    """McNemar's test of two accuracies, exact conditional or mid-p.

    With b cases that only model a has right and c that only model b has right, b is
    Binomial(b + c, 1/2) under the null. Exact: p = min(1, 2 P(X <= min(b, c))). Mid-p takes
    P(X = min(b, c)) off that (b = c: 1 - P(X = b) / 2). Fagerland, Lydersen & Laake 2013
    (doi:10.1186/1471-2288-13-91): the exact test is conservative, mid-p is near its level. The
    interval is Wald's on b + 1, c + 1 and n + 2 (Bonett & Price 2012,
    doi:10.3102/1076998611411915), so near the borderline it can disagree with the test.

    Rows are taken as independent. For clustered rows use `bootstrap_test(accuracy, ...)`.

    Args:
        y_true: (n,) labels 0..C-1.
        pred_a: (n,) predicted labels.
        pred_b: (n,) predicted labels.
        mid_p: Mid-p instead of exact.
        level: Of the interval.

    Returns:
        `test` "McNemar mid-p" or "McNemar exact"; estimates are accuracies; without discordant
        cases p = 1.

    Raises:
        EvaluationError: Empty, not integers, negative, or lengths differ.
    """
    labels = labels_of("y_true", y_true)
    first, second = labels_of("pred_a", pred_a), labels_of("pred_b", pred_b)
    n = same_length(y_true=labels, pred_a=first, pred_b=second)
    right_a, right_b = first == labels, second == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    less, both = min(only_a, only_b), only_a + only_b
    p_value = min(1.0, 2 * float(binom.cdf(less, both, 0.5)))
    if mid_p and both:
        share = float(binom.pmf(less, both, 0.5))
        p_value = 1 - share / 2 if only_a == only_b else p_value - share
    share_a, share_b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    centre = share_a - share_b
    error = float(np.sqrt((share_a + share_b - centre**2) / (n + 2)))
    margin = _normal_quantile(level) * error
    return PairedTest(
        test="McNemar mid-p" if mid_p else "McNemar exact",
        statistic=float(only_a),
        p_value=p_value,
        estimate_a=float(right_a.mean()),
        estimate_b=float(right_b.mean()),
        difference=(only_a - only_b) / n,
        low=max(-1.0, centre - margin),
        high=min(1.0, centre + margin),
        n=n,
        level=level,
    )


def bootstrap_test(
    metric: Metric,
    y_true: Any,
    a: Any,
    b: Any,
    *,
    clusters: Any = None,
    strata: Any = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    name: str = "bootstrap",
) -> PairedTest:
    """Bootstrap test of metric(y_true, a) - metric(y_true, b), for any metric and clustered rows.

    Both models are scored on the same resamples. With d the difference on the whole data and d*_i
    those on B resamples, the null distribution is estimated by d*_i - d (Hall & Wilson 1991,
    doi:10.2307/2532163), and

        p = (1 + #{i: |d*_i - d| >= |d|}) / (1 + B)

    which is never 0 (Davison & Hinkley 1997, section 4.4): its least value is 1 / (1 + B). The
    interval is the percentile one of d*, so near the borderline it can disagree with p.

    With few clusters the test is somewhat too sure: on simulated null data of 16 or 30 clusters it
    rejected 7% at the 5% level (McNemar's test, which ignores clusters, 28%).

    Args:
        metric: Called as metric(y_true, a), as in `bootstrap_ci`.
        y_true: n rows.
        a: n rows of model a's predictions, as `metric` takes them.
        b: n rows of model b's.
        clusters: (n,) patients or slides to draw whole; None draws rows.
        strata: (n,) drawing happens within each.
        samples: Resamples B.
        seed: Same seed, same answer.
        level: Of the interval.
        name: Goes to `test`, with " (clustered)" where clusters are given.

    Returns:
        The test; `statistic` is the difference itself.

    Raises:
        EvaluationError: As `bootstrap_ci`.
    """
    _check_level(level)
    truth, first, second = np.asarray(y_true), np.asarray(a), np.asarray(b)
    whole_a, whole_b, drawn, redrawn = paired_differences(
        metric,
        truth,
        first,
        second,
        clusters=clusters,
        strata=strata,
        samples=samples,
        seed=seed,
    )
    difference = whole_a - whole_b
    # A rounding error must not decide between "as far out" and "farther".
    beyond = np.abs(drawn - difference) >= abs(difference) - 1e-12
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return PairedTest(
        test=name if clusters is None else f"{name} (clustered)",
        statistic=difference,
        p_value=float((1 + beyond.sum()) / (1 + samples)),
        estimate_a=whole_a,
        estimate_b=whole_b,
        difference=difference,
        low=float(low),
        high=float(high),
        n=len(truth),
        samples=samples,
        redrawn=redrawn,
        level=level,
    )


def f1_bootstrap_test(
    y_true: Any,
    pred_a: Any,
    pred_b: Any,
    average: Average = "macro",
    clusters: Any = None,
    strata: Any = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Bootstrap test of a difference of F1.

    Args:
        y_true: (n,) labels 0..C-1.
        pred_a: (n,) predicted labels.
        pred_b: (n,) predicted labels.
        average: `macro` or `weighted`, as in `f1`.
        clusters: As in `bootstrap_test`.
        strata: As in `bootstrap_test`.
        samples: As in `bootstrap_test`.
        seed: As in `bootstrap_test`.
        level: Of the interval.

    Returns:
        `test` "F1 bootstrap", estimates are F1 scores.

    Raises:
        EvaluationError: As `f1` and `bootstrap_ci`.
    """
    return bootstrap_test(
        partial(f1, average=average),
        y_true,
        pred_a,
        pred_b,
        clusters=clusters,
        strata=strata,
        samples=samples,
        seed=seed,
        level=level,
        name="F1 bootstrap",
    )


def holm(p_values: Any) -> np.ndarray:
    """Holm's step-down adjustment: reject where the adjusted value is at most the level.

    Holm 1979 (doi:10.2307/4615733). With p sorted ascending and m of them, the i-th adjusted value
    (i from 0) is the largest of min(1, (m - j) p_j) over j <= i.

    Args:
        p_values: (m,) in 0..1.

    Returns:
        (m,) adjusted, in the order given.

    Raises:
        EvaluationError: Empty, NaN, or outside 0..1.
    """
    values = finite("p_values", p_values)
    if values.min() < 0 or values.max() > 1:
        raise EvaluationError(f"p_values: {values.min()} to {values.max()}; give values in 0..1.")
    order = np.argsort(values)
    adjusted = np.empty_like(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise EvaluationError(f"level: {level}; give a coverage between 0 and 1, 0.95 say.")


def _normal_quantile(level: float) -> float:
    """Standard deviations to either side that a normal interval of this coverage takes."""
    _check_level(level)
    return float(norm.ppf((1 + level) / 2))


def _delong(name: str, y_true: Any, scores: Any) -> tuple[float, np.ndarray]:
    """Macro one-vs-rest AUC and the rows' contributions to its error.

    Args:
        name: For messages.
        y_true: (n,) labels.
        scores: (n,), (n, 2) or (n, C).

    Returns:
        The area, and (n,) mean over classes of e_i (see `delong_test`): their products summed over
        rows are the covariances of the means, without the (2K, 2K) matrix.
    """
    labels, classes, columns = scores_of(name, scores, y_true)
    areas, contributions = [], np.zeros(len(labels))
    for positive, column in zip(classes, columns.T, strict=True):
        chosen = labels == positive
        above, below = column[chosen], column[~chosen]
        cases, others = len(above), len(below)
        if min(cases, others) < 2:
            raise EvaluationError(
                f"y_true: class {positive} has {cases} cases against {others}; DeLong's variance "
                "needs 2 of each: merge rare classes, or use bootstrap_test(roc_auc, ...)."
            )
        _, first, last = tie_bounds(column)
        _, first_own, last_own = tie_bounds(above)
        _, first_rest, last_rest = tie_bounds(below)
        # Midrank among all less midrank among one's own side: cases of the other side below.
        wins = (first[chosen] + last[chosen] - first_own - last_own) / (2 * others)
        losses = 1 - (first[~chosen] + last[~chosen] - first_rest - last_rest) / (2 * cases)
        area = float(wins.mean())
        contributions[chosen] += (wins - area) / np.sqrt(cases * (cases - 1))
        contributions[~chosen] += (losses - area) / np.sqrt(others * (others - 1))
        areas.append(area)
    return float(np.mean(areas)), contributions / len(areas)

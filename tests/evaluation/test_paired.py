"""Paired tests against pair counting, published examples and exact enumeration.

DeLong's Z, p and interval were also compared once with roc.test of R's pROC on its aSAH data set
(three marker pairs, differences at most 5e-15). Those rows come with a GPL package and are not
kept here.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from xmag_hf.evaluation import (
    EvaluationError,
    accuracy,
    bootstrap_test,
    delong_test,
    f1_bootstrap_test,
    holm,
    mcnemar_test,
    roc_auc,
)


def pair_counting(y: np.ndarray, a: np.ndarray, b: np.ndarray, classes) -> tuple[float, float]:
    """Difference of macro areas and its variance, from every pair and the full covariance."""
    n, models = len(y), (a, b)
    areas, errors = [], []
    for scores, c in itertools.product(models, classes):
        cases, rest = np.flatnonzero(y == c), np.flatnonzero(y != c)
        column = scores[:, c]
        wins = [
            [(column[i] > column[j]) + (column[i] == column[j]) / 2 for j in rest] for i in cases
        ]
        table = np.array(wins, dtype=float)
        error = np.zeros(n)
        m, k = table.shape
        error[cases] = (table.mean(axis=1) - table.mean()) / math.sqrt(m * (m - 1))
        error[rest] = (table.mean(axis=0) - table.mean()) / math.sqrt(k * (k - 1))
        areas.append(table.mean())
        errors.append(error)
    covariance = np.array([[u @ v for v in errors] for u in errors])
    contrast = np.repeat([1, -1], len(classes)) / len(classes)
    return float(contrast @ areas), float(contrast @ covariance @ contrast)


def scored(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two correlated (n, classes) score tables with many ties."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    shared = rng.normal(size=(n, classes))
    tables = []
    for signal in (1.0, 0.6):
        table = shared + rng.normal(size=(n, classes))
        table[np.arange(n), y] += signal
        tables.append(np.round(table))
    return y, *tables


@pytest.mark.parametrize(("n", "classes", "seed"), [(60, 2, 0), (61, 2, 1), (70, 3, 2), (80, 5, 3)])
def test_delong_agrees_with_pair_counting(n: int, classes: int, seed: int) -> None:
    y, a, b = scored(n, classes, seed)
    difference, variance = pair_counting(y, a, b, [1] if classes == 2 else range(classes))
    test = delong_test(y, a, b)
    assert test.difference == pytest.approx(difference, abs=1e-12)
    assert test.statistic == pytest.approx(difference / math.sqrt(variance), rel=1e-9)
    assert test.estimate_a == pytest.approx(roc_auc(y, a), abs=1e-12)
    assert test.p_value == pytest.approx(math.erfc(abs(test.statistic) / math.sqrt(2)), rel=1e-9)
    assert (test.high - test.low) / 2 == pytest.approx(1.959963985 * math.sqrt(variance), rel=1e-8)


def test_delong_of_two_classes_is_the_textbook_variance() -> None:
    """S10 / m + S01 / k with numpy's covariance: the sum over rows must reduce to it."""
    y, a, b = scored(90, 2, 7)
    components = []
    for column in (a[:, 1], b[:, 1]):
        above, below = column[y == 1], column[y == 0]
        table = (above[:, None] > below) + (above[:, None] == below) / 2
        components.append((table.mean(axis=1), table.mean(axis=0)))
    s10, s01 = (np.cov([components[0][side], components[1][side]]) for side in (0, 1))
    s = s10 / (y == 1).sum() + s01 / (y == 0).sum()
    z = (components[0][0].mean() - components[1][0].mean()) / math.sqrt(
        s[0, 0] + s[1, 1] - 2 * s[0, 1]
    )
    assert delong_test(y, a[:, 1], b[:, 1]).statistic == pytest.approx(z, rel=1e-12)


def test_delong_of_identical_scores_is_one() -> None:
    y, a, _ = scored(50, 3, 0)
    test = delong_test(y, a, a * 2 + 1)
    assert (test.statistic, test.p_value, test.difference) == (0, 1, 0)


@pytest.mark.parametrize(
    ("y", "a", "b", "message"),
    [
        ([1, 1, 1], [1, 2, 3], [1, 2, 3], "all 3 rows are class 1"),
        ([0, 0, 1], [1, 2, 3], [1, 2, 3], "class 1 has 1 cases against 2"),
        ([0, 0, 1, 1], [1, 2, 3, np.nan], [1, 2, 3, 4], "score_a: 1 rows are NaN"),
        ([0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3], "y_true has 4, score_b has 3"),
        ([0, 0, 1, 1], [1, 2, 3, 4], [4, 4, 4, 4], "differ without any variance"),
        ([0, 0, 2, 2], [1, 2, 3, 4], [1, 2, 3, 4], "label 2 is outside"),
        ([0, 0, 1, 1, 2, 2], np.ones((6, 3)), np.ones(6), "label 2 is outside"),
        ([0, 0, 1, 1], np.ones((4, 2)), np.ones((4, 3)), "2 and 3 classes"),
        ([], [], [], "empty"),
    ],
)
def test_delong_refuses(y, a, b, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        delong_test(y, a, b)


def discordant(both: int, only_a: int, only_b: int, none: int) -> tuple[np.ndarray, ...]:
    """Labels (all 1) and the two models' predictions with these counts of right answers."""
    counts = [both, only_a, only_b, none]
    a, b = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
    return np.ones(sum(counts), dtype=int), a, b


def test_mcnemar_agrees_with_fagerland() -> None:
    """Airway hyper-responsiveness before and after transplantation, Fagerland et al. 2013, table 1.

    Bentur's 21 children: 1, 1, 7, 12. Exact p = 0.0703, mid-p = 0.0391 (their example).
    """
    table = discordant(1, 1, 7, 12)
    assert mcnemar_test(*table, mid_p=False).p_value == pytest.approx(0.0703, abs=5e-5)
    test = mcnemar_test(*table)
    assert test.p_value == pytest.approx(0.0391, abs=5e-5)
    assert (test.estimate_a, test.estimate_b) == pytest.approx((2 / 21, 8 / 21))
    assert test.difference == pytest.approx(-6 / 21)
    # Wald on 2, 8 of 23: -6/23 -+ 1.96 sqrt((10/23 - (6/23)^2) / 23).
    half = 1.959963985 * math.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert (test.low, test.high) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-8)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 0), (2, 2), (5, 9), (40, 21)])
def test_mcnemar_agrees_with_enumeration(only_a: int, only_b: int) -> None:
    table = discordant(10, only_a, only_b, 5)
    total = only_a + only_b
    exact = mcnemar_test(*table, mid_p=False).p_value
    assert exact == pytest.approx(binomtest(only_a, total).pvalue if total else 1, rel=1e-12)
    chances = [math.comb(total, i) / 2**total for i in range(total + 1)]
    # Two-sided mid-p of a symmetric distribution: farther out, and half of what is as far.
    distance = [abs(i - total / 2) for i in range(total + 1)]
    far = abs(only_a - total / 2)
    farther = sum(p for p, d in zip(chances, distance, strict=True) if d > far)
    equal = sum(p for p, d in zip(chances, distance, strict=True) if d == far)
    # A middle value stands for both tails: Fagerland's rule takes half of it off 1.
    assert mcnemar_test(*table).p_value == pytest.approx(
        farther + equal / 2 if total else 1, rel=1e-12
    )


def test_bootstrap_test_is_the_definition_over_the_same_resamples() -> None:
    """Recomputed from scratch: resamples seen by a metric of the test, scored by scikit-learn."""
    y, a, b = scored(60, 3, 5)
    pred_a, pred_b = a.argmax(axis=1), b.argmax(axis=1)
    drawn: list[tuple[np.ndarray, np.ndarray]] = []

    def spy(truth: np.ndarray, predicted: np.ndarray) -> float:
        drawn.append((truth.copy(), predicted.copy()))
        return f1_score(truth, predicted, average="macro")

    through_spy = bootstrap_test(spy, y, pred_a, pred_b, samples=49, seed=4)
    ours = f1_bootstrap_test(y, pred_a, pred_b, samples=49, seed=4)
    (first, second), rest = drawn[:2], drawn[2:]
    whole = f1_score(*first, average="macro") - f1_score(*second, average="macro")
    for (truth_a, _), (truth_b, _) in zip(rest[:49], rest[49:], strict=True):
        assert (truth_a == truth_b).all()
    scores = [f1_score(*pair, average="macro") for pair in rest]
    differences = np.subtract(scores[:49], scores[49:])
    beyond = sum(abs(d - whole) >= abs(whole) - 1e-12 for d in differences)
    assert ours.p_value == through_spy.p_value == (1 + beyond) / 50
    assert ours.low == pytest.approx(np.percentile(differences, 2.5), abs=1e-12)
    assert ours.difference == pytest.approx(whole, abs=1e-12)
    assert (ours.test, ours.samples, ours.redrawn) == ("F1 bootstrap", 49, 0)


def test_bootstrap_test_of_identical_and_of_far_models() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    same = f1_bootstrap_test(y, y, y, average="weighted", samples=50)
    assert (same.p_value, same.difference, same.low, same.high) == (1, 0, 0, 0)
    far = bootstrap_test(roc_auc, y, y + rng.normal(size=200) / 4, rng.normal(size=200), samples=99)
    assert far.p_value == 1 / 100  # never 0
    assert far.low > 0.2


def test_clustered_rows_lower_the_evidence() -> None:
    """Every row five times is no new evidence: by cluster as before, by row too sure."""
    y, a, b = scored(40, 2, 9)
    right, wrong = (a[:, 1] > 0).astype(int), (b[:, 1] > 0).astype(int)
    once = bootstrap_test(accuracy, y, right, wrong, seed=1)
    copies = [np.repeat(array, 5) for array in (y, right, wrong)]
    clusters = np.repeat(np.arange(40), 5)
    clustered = bootstrap_test(accuracy, *copies, clusters=clusters, seed=1)
    assert clustered.p_value == once.p_value
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert clustered.test == "bootstrap (clustered)"
    by_row = bootstrap_test(accuracy, *copies, seed=1)
    assert by_row.high - by_row.low < 0.6 * (once.high - once.low)  # 1 / sqrt(5) = 0.45


def test_bootstrap_test_refuses_what_it_cannot_pair() -> None:
    with pytest.raises(EvaluationError, match="a has 3, b has 2"):
        bootstrap_test(accuracy, [0, 1, 1], [0, 1, 1], [0, 1])
    with pytest.raises(EvaluationError, match="one cluster only"):
        f1_bootstrap_test([0, 1, 1], [0, 1, 1], [0, 1, 0], clusters=["p", "p", "p"])
    with pytest.raises(EvaluationError, match="choose 'macro'"):
        f1_bootstrap_test([0, 1, 1], [0, 1, 1], [0, 1, 0], average="samples")  # type: ignore
    with pytest.raises(EvaluationError, match="empty"):
        bootstrap_test(accuracy, [], [], [])


def test_level_widens_intervals_and_leaves_p_values() -> None:
    y, a, b = scored(80, 2, 3)
    rows = [
        (delong_test(y, a, b, level=level), mcnemar_test(y, a.argmax(1), b.argmax(1), level=level))
        for level in (0.5, 0.99)
    ]
    for narrow, wide in zip(*rows, strict=True):
        assert wide.p_value == narrow.p_value and (narrow.level, wide.level) == (0.5, 0.99)
        # Normal intervals: half widths go with the normal quantiles of 0.75 and 0.995.
        ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
        assert ratio == pytest.approx(2.5758293 / 0.6744898)
    halves = [bootstrap_test(accuracy, y, a.argmax(1), b.argmax(1), level=v) for v in (0.5, 0.99)]
    assert halves[1].low < halves[0].low and halves[0].high < halves[1].high
    for test, arrays in ((delong_test, (a, b)), (mcnemar_test, (a.argmax(1), b.argmax(1)))):
        with pytest.raises(EvaluationError, match="level: 95"):
            test(y, *arrays, level=95)


def test_holm_agrees_with_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [0.1, 1.2], [-0.1]])
def test_holm_refuses(values) -> None:
    with pytest.raises(EvaluationError, match="p_values"):
        holm(values)

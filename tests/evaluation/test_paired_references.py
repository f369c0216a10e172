"""Paired tests against what others published or programmed, and against resampling the data.

DeLong's worked example with two markers on the same cases (his ovarian cancer data, and pROC's
aSAH) come under licences that forbid keeping the rows here; the ratings below are ten counts of a
published table, for one marker. A marker that is the same for everybody has an area of exactly 0.5
without variance, so a paired test against it is the single marker's interval.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from xmag_hf.evaluation import (
    accuracy,
    bootstrap_test,
    delong_test,
    mcnemar_test,
    roc_auc,
)


def test_delong_of_hanley_and_mcneils_ratings() -> None:
    """109 CT images rated 1 to 5 (Hanley & McNeil 1982, doi:10.1148/radiology.143.1.7063747).

    Stata's manual, [R] roctab, works the example with DeLong's standard error: area 0.8932,
    standard error 0.0307, 95% interval 0.83295 to 0.95339.
    """
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    rating = np.concatenate([np.repeat(np.arange(1, 6), counts) for counts in (normal, abnormal)])
    disease = np.repeat([0, 1], [sum(normal), sum(abnormal)])
    test = delong_test(disease, rating, np.zeros(len(rating)))
    assert test.estimate_a == pytest.approx(0.8932, abs=5e-5)
    assert test.estimate_b == 0.5
    assert test.difference / test.statistic == pytest.approx(0.0307, abs=5e-5)
    assert (test.low + 0.5, test.high + 0.5) == pytest.approx((0.83295, 0.95339), abs=5e-6)


def three_classes(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Labels of unequal classes and two models' correlated probabilities."""
    y = rng.choice(3, n, p=[0.15, 0.35, 0.5])
    shared = rng.normal(size=(n, 3))
    tables = []
    for signal in (1.4, 1.0):
        scores = shared + rng.normal(size=(n, 3))
        scores[np.arange(n), y] += signal
        tables.append(softmax(scores, axis=1))
    return y, *tables


def macro_difference(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """By scikit-learn."""
    areas = [roc_auc_score(y, table, multi_class="ovr", average="macro") for table in (a, b)]
    return float(areas[0] - areas[1])


def test_macro_covariance_agrees_with_the_jackknife() -> None:
    """Delete one case, and let scikit-learn take the areas of the rest.

    The jackknife's variance of a difference of U-statistics and DeLong's agree to the order of
    1/n; a covariance between classes or models that was left out would be off by tens of percent.
    """
    y, a, b = three_classes(np.random.default_rng(0), 110)
    test = delong_test(y, a, b)
    keep = ~np.eye(len(y), dtype=bool)
    left = np.array([macro_difference(y[rows], a[rows], b[rows]) for rows in keep])
    n = len(y)
    jackknife = (n - 1) / n * ((left - left.mean()) ** 2).sum()
    assert test.difference == pytest.approx(macro_difference(y, a, b), abs=1e-12)
    assert (test.difference / test.statistic) ** 2 == pytest.approx(jackknife, rel=0.03)


def test_macro_standard_error_is_the_spread_over_new_data() -> None:
    """600 simulated studies of 150 slides: the sd of the difference, and the mean variance.

    The sd of 600 draws is known to 2.9% (one standard error); 9% is more than three.
    """
    rng = np.random.default_rng(1)
    tests = [delong_test(*three_classes(rng, 150)) for _ in range(600)]
    spread = np.std([test.difference for test in tests], ddof=1)
    variance = np.mean([(test.difference / test.statistic) ** 2 for test in tests])
    assert np.sqrt(variance) == pytest.approx(spread, rel=0.09)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (3, 3), (7, 15), (60, 41)])
def test_mcnemar_agrees_with_statsmodels(only_a: int, only_b: int) -> None:
    counts = [20, only_a, only_b, 9]
    a, b = np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)
    table = [[counts[0], only_a], [only_b, counts[3]]]
    theirs = statsmodels_mcnemar(table, exact=True)
    ours = mcnemar_test(np.ones(sum(counts), dtype=int), a, b, mid_p=False)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-12)
    assert min(only_a, only_b) == theirs.statistic
    # Mid-p lies between the exact test and the uncorrected chi-squared one when both are large.
    if only_a + only_b > 50:
        rough = statsmodels_mcnemar(table, exact=False, correction=False).pvalue
        mid = mcnemar_test(np.ones(sum(counts), dtype=int), a, b).p_value
        assert mid < ours.p_value and mid == pytest.approx(rough, rel=0.03)


def clustered(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, ...]:
    """Patients with one to six slides that share a label and much of both models' scores."""
    sizes = rng.integers(1, 7, patients)
    patient = np.repeat(np.arange(patients), sizes)
    y = rng.integers(0, 2, patients)[patient]
    shared = rng.normal(size=patients)[patient]
    own = [rng.normal(size=patients)[patient] for _ in range(2)]
    a, b = (shared + 0.8 * part + 0.4 * rng.normal(size=len(y)) for part in own)
    return y, a + 1.2 * y, b + 0.9 * y, patient


def test_clustered_auc_agrees_with_obuchowski() -> None:
    """Standard error of a difference of AUCs by patient (Obuchowski 1997, doi:10.2307/2533958).

    Her sums of DeLong's components over each cluster, against the spread of the bootstrap; the
    formula that takes slides as independent is far off.
    """
    y, a, b, patient = clustered(np.random.default_rng(3), 150)
    cases, others = y == 1, y == 0
    m, k = cases.sum(), others.sum()
    above, below = [], []
    for scores in (a, b):
        wins = scores[cases][:, None] > scores[others]
        above.append(wins.mean(axis=1) - wins.mean())
        below.append(wins.mean(axis=0) - wins.mean())
    # Each patient has one label here, so the two parts have no cluster in common.
    parts = []
    for components, chosen, count in ((above, cases, m), (below, others, k)):
        sums = np.bincount(patient[chosen], components[0] - components[1])[
            np.unique(patient[chosen])
        ]
        clusters = len(sums)
        parts.append(clusters / (clusters - 1) * (sums**2).sum() / count**2)
    error = np.sqrt(sum(parts))
    test = bootstrap_test(roc_auc, y, a, b, clusters=patient, samples=4000)
    assert (test.high - test.low) / (2 * norm.ppf(0.975)) == pytest.approx(error, rel=0.08)
    naive = delong_test(y, a, b)
    assert naive.difference / naive.statistic < 0.75 * error


def test_clustered_accuracy_agrees_with_obuchowski() -> None:
    """Clustered McNemar (Obuchowski 1998, doi:10.1002/(SICI)1097-0258(19980715)17:13).

    z = sum_j d_j / sqrt(sum_j d_j^2) with d_j the patient's right answers of a less those of b.
    """
    y, a, b, patient = clustered(np.random.default_rng(7), 200)
    picks = [(scores > 0.6).astype(int) for scores in (a, b)]
    d = np.bincount(patient, (picks[0] == y).astype(float) - (picks[1] == y))
    z = d.sum() / np.sqrt((d**2).sum())
    test = bootstrap_test(accuracy, y, *picks, clusters=patient, samples=4000)
    assert test.p_value == pytest.approx(2 * norm.sf(abs(z)), abs=0.03)
    assert 0.01 < test.p_value < 0.9  # where agreement says something

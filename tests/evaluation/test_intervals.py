"""Bootstrap intervals: fast forms against repeated rows, clusters, strata, coverage, bad input."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.stats import binom, norm, spearmanr, t
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from xmag_hf.evaluation import (
    EvaluationError,
    accuracy,
    bootstrap_ci,
    f1,
    mean_over_repeats,
    roc_auc,
    spearman,
)


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    """90 rows of 30 clusters in 2 strata: labels of 3 classes, tied scores, counts."""
    rng = np.random.default_rng(3)
    y = np.repeat([0, 1, 2], 30)
    scores = rng.normal(size=(90, 3))
    scores[np.arange(90), y] += 0.5
    return {
        "y": y,
        "scores": np.round(scores, 1),
        "predicted": scores.argmax(axis=1),
        "repeats": np.round(scores[:, None] + rng.normal(size=(90, 4, 3)), 1),
        "counts": rng.poisson(4, 90),
        "clusters": np.array([f"patient {i}" for i in rng.integers(0, 30, 90)]),
    }


def sklearn_macro_auc(y: np.ndarray, scores: np.ndarray) -> float:
    return float(np.mean([roc_auc_score(y == c, scores[:, c]) for c in range(3)]))


def sklearn_mean_auc(y: np.ndarray, repeats: np.ndarray) -> float:
    return float(np.mean([sklearn_macro_auc(y, repeats[:, r]) for r in range(4)]))


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(
    ("metric", "reference", "names"),
    [
        (accuracy, accuracy_score, ("y", "predicted")),
        (f1, partial(f1_score, average="macro"), ("y", "predicted")),
        (
            partial(f1, average="weighted"),
            partial(f1_score, average="weighted"),
            ("y", "predicted"),
        ),
        (roc_auc, sklearn_macro_auc, ("y", "scores")),
        (spearman, lambda x, y: spearmanr(x, y).statistic, ("counts", "predicted")),
        (partial(mean_over_repeats, roc_auc), sklearn_mean_auc, ("y", "repeats")),
    ],
)
def test_fast_forms_equal_other_libraries_on_repeated_rows(
    case, metric, reference, names, clustered
) -> None:
    """The same seed draws the same resamples, so the intervals are equal, not only close."""
    arrays = [case[name] for name in names]
    options = {"clusters": case["clusters"] if clustered else None, "samples": 30, "seed": 5}
    ours, theirs = (bootstrap_ci(m, *arrays, **options) for m in (metric, reference))
    assert ours.redrawn == theirs.redrawn == 0
    assert [ours.estimate, ours.low, ours.high] == pytest.approx(
        [theirs.estimate, theirs.low, theirs.high], abs=1e-12
    )
    assert ours.low < ours.estimate < ours.high


def test_clusters_are_drawn_whole_and_strata_keep_their_size(case) -> None:
    clusters = np.repeat(np.arange(18), 5)
    strata = np.repeat(["a", "b"], [30, 60])
    seen = []

    def look(groups: np.ndarray, side: np.ndarray) -> float:
        counts = np.bincount(groups, minlength=18)
        assert (counts % 5 == 0).all()
        assert (side == "a").sum() == 30 and len(side) == 90
        seen.append(counts)
        return float(groups.mean())

    bootstrap_ci(look, clusters, strata, clusters=clusters, strata=strata, samples=50)
    drawn = np.array(seen[1:])  # the first call is the whole data
    assert (drawn == 0).any() and (drawn > 5).any()
    assert len(np.unique(drawn, axis=0)) == 50


def test_width_of_the_mean_is_the_closed_form() -> None:
    """SE of a bootstrapped mean: population sd / sqrt(n), by rows and by equal clusters."""
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=60), 5) + rng.normal(size=300)
    by_cluster = values.reshape(60, 5).mean(axis=1)
    for clusters, error in (
        (None, values.std() / np.sqrt(300)),
        (np.repeat(np.arange(60), 5), by_cluster.std() / np.sqrt(60)),
    ):
        interval = bootstrap_ci(lambda x: float(x.mean()), values, clusters=clusters, samples=4000)
        assert (interval.high - interval.low) / (2 * norm.ppf(0.975) * error) == pytest.approx(
            1, abs=0.06
        )


def test_level_sets_the_quantiles() -> None:
    values = np.random.default_rng(0).normal(size=100)
    wide, narrow = (
        bootstrap_ci(lambda x: float(x.mean()), values, level=level, samples=4000)
        for level in (0.95, 0.5)
    )
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(norm.ppf(0.975) / norm.ppf(0.75), rel=0.08)


@pytest.mark.parametrize("metric", [roc_auc, lambda y, s: roc_auc(y, s)])
def test_resamples_that_lost_a_class_are_redrawn_and_counted(metric) -> None:
    y = np.array([1, 1] + [0] * 28)
    scores = np.random.default_rng(0).normal(size=30) + y
    interval = bootstrap_ci(metric, y, scores, samples=1000)
    lost = (28 / 30) ** 30  # a resample without a positive
    low, high = binom.ppf([0.001, 0.999], 1000 + interval.redrawn, lost)
    assert low <= interval.redrawn <= high
    assert bootstrap_ci(metric, y, scores, samples=1000, strata=y).redrawn == 0


def test_macro_f1_redraws_a_lost_class_and_weighted_need_not() -> None:
    y = np.array([2] + [0, 1] * 20)
    predicted = np.where(np.arange(41) % 5 == 0, 0, y)
    kept = bootstrap_ci(partial(f1, average="weighted"), y, predicted, samples=200)
    assert kept.redrawn == 0
    macro = bootstrap_ci(f1, y, predicted, samples=200)
    low, high = binom.ppf([0.001, 0.999], 200 + macro.redrawn, (40 / 41) ** 41)
    assert low <= macro.redrawn <= high


def test_a_class_in_hardly_any_resample_ends_with_a_remedy() -> None:
    y, predicted = np.arange(10), np.arange(10)  # ten classes of one row: 10! / 10^10 have all
    with pytest.raises(EvaluationError, match="strata=labels, or merge rare classes"):
        bootstrap_ci(f1, y, predicted, samples=100)


def test_same_seed_same_interval_and_batches_do_not_matter(monkeypatch, case) -> None:
    first = bootstrap_ci(roc_auc, case["y"], case["scores"], samples=100, seed=2)
    monkeypatch.setattr("xmag_hf.evaluation.intervals._BATCH_VALUES", 90 * 7)
    assert bootstrap_ci(roc_auc, case["y"], case["scores"], samples=100, seed=2) == first
    assert bootstrap_ci(roc_auc, case["y"], case["scores"], samples=100, seed=3) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": ["p"] * 4}, "one cluster only"),
        ({"clusters": [0, 0, 1]}, r"clusters: shape \(3,\)"),
        ({"clusters": ["p", "q", None, "q"]}, "clusters: some rows have none"),
        ({"clusters": [1.0, np.nan, 2.0, 1.0]}, "clusters: some rows have none"),
        ({"clusters": ["p", "", "q", "q"]}, "clusters: some rows have none"),
        ({"clusters": np.array(["p", 1, "q", 1], dtype=object)}, "mixed types"),
        ({"clusters": ["p", "p", "q", "q"], "strata": [0, 1, 1, 1]}, "'p' lies in more than one"),
        ({"strata": [0, 1, 2, 3]}, "one row only in every stratum"),
        ({"samples": 1}, "samples: 1"),
        ({"level": 95}, "level: 95"),
    ],
)
def test_what_cannot_be_resampled_is_refused(options, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        bootstrap_ci(accuracy, [0, 1, 0, 1], [0, 1, 1, 1], **options)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([0, 1, 1], [0, 1]), "array 1 has 3, array 2 has 2"),
        (([], []), "empty"),
        (([1], [1]), "one row only"),
        ((), "no arrays"),
        ((3, 4), "single number"),
    ],
)
def test_arrays_that_cannot_be_resampled_are_refused(arrays, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        bootstrap_ci(accuracy, *arrays)


def test_metric_undefined_on_the_whole_data_is_refused() -> None:
    with pytest.raises(EvaluationError, match="nan on the whole data"):
        bootstrap_ci(lambda x: float("nan"), [1, 2, 3])
    with pytest.raises(EvaluationError, match="all 3 rows are class 1"):
        bootstrap_ci(roc_auc, [1, 1, 1], [0.1, 0.2, 0.3])


@pytest.mark.slow
def test_coverage_on_clustered_data() -> None:
    """Accuracy of 50 patients with 10 images: beta-binomial, intra-cluster correlation 1/2.

    A patient's images are right with probability p ~ Beta(1/2, 1/2), so the variance of the
    accuracy is 1 + 9 / 2 = 5.5 times that of independent images (Kish's design effect): an
    interval by image covers with probability 2 Phi(1.96 / sqrt(5.5)) - 1 = 0.597. By patient it
    is Student's t with 49 degrees of freedom, cut at 1.96 sqrt(49 / 50): 0.942.
    """
    rng = np.random.default_rng(11)
    runs, patients, images = 1000, 50, 10
    clusters = np.repeat(np.arange(patients), images)
    truth = np.ones(patients * images, dtype=int)
    covered = {"image": 0, "patient": 0}
    for run in range(runs):
        right = rng.binomial(1, np.repeat(rng.beta(0.5, 0.5, patients), images))
        for unit in covered:
            by = clusters if unit == "patient" else None
            interval = bootstrap_ci(accuracy, truth, right, clusters=by, seed=run)
            covered[unit] += interval.low <= 0.5 <= interval.high
    z = norm.ppf(0.975)
    expected = {
        "image": 1 - 2 * norm.sf(z / np.sqrt(1 + (images - 1) / 2)),
        "patient": 1 - 2 * t.sf(z * np.sqrt((patients - 1) / patients), patients - 1),
    }
    print("coverage", covered, "of", runs, "expected", expected)
    for unit, share in expected.items():
        low, high = binom.ppf([0.005, 0.995], runs, share)
        assert low <= covered[unit] <= high, (unit, covered, share)

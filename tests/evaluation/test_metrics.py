"""Metrics against scikit-learn and SciPy, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from xmag_hf.evaluation import (
    EvaluationError,
    accuracy,
    f1,
    mean_over_repeats,
    roc_auc,
    spearman,
)

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1])


def tied_case(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predicted labels, and (n, classes) scores of which most are tied with others."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    scores = rng.normal(size=(n, classes))
    scores[np.arange(n), y] += 0.7
    return y, scores.argmax(axis=1), np.round(scores * 2) / 2


@pytest.mark.parametrize("seed", range(3))
def test_several_classes_agree_with_scikit_learn(seed: int) -> None:
    y, predicted, scores = tied_case(150, 5, seed)
    one_vs_rest = np.mean([roc_auc_score(y == c, scores[:, c]) for c in range(5)])
    assert roc_auc(y, scores) == pytest.approx(one_vs_rest, abs=1e-12)
    assert accuracy(y, predicted) == pytest.approx(accuracy_score(y, predicted), abs=1e-12)
    for average in ("macro", "weighted"):
        expected = f1_score(y, predicted, average=average)
        assert f1(y, predicted, average) == pytest.approx(expected, abs=1e-12)


def test_binary_auc_takes_one_column_or_two() -> None:
    y, _, scores = tied_case(80, 2, 0)
    expected = roc_auc_score(y, scores[:, 1])
    assert roc_auc(y, scores[:, 1]) == pytest.approx(expected, abs=1e-12)
    assert roc_auc(y.astype(bool), scores) == pytest.approx(expected, abs=1e-12)


def test_macro_leaves_out_classes_that_never_occur() -> None:
    y, predicted, scores = tied_case(60, 3, 1)
    y, predicted = np.where(y == 1, 3, y), np.where(predicted == 1, 2, predicted)  # no class 1
    scores = np.insert(scores, 3, scores[:, 1], axis=1)
    areas = [roc_auc_score(y == c, scores[:, c]) for c in (0, 2, 3)]
    assert roc_auc(y, scores) == pytest.approx(np.mean(areas), abs=1e-12)
    # Class 3 is true and never predicted: it counts as 0, class 1 not at all.
    expected = f1_score(y, predicted, average="macro")
    assert f1(y, predicted) == pytest.approx(expected, abs=1e-12)


def test_spearman_with_ties_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 70)
    y = x + rng.integers(0, 6, 70)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_mean_over_repeats_is_the_mean() -> None:
    y, _, scores = tied_case(60, 3, 2)
    repeats = np.stack([scores, np.roll(scores, 1, axis=0)], axis=1)  # (n, 2, 3)
    each = [np.mean([roc_auc_score(y == c, repeats[:, r, c]) for c in range(3)]) for r in range(2)]
    assert mean_over_repeats(roc_auc, y, repeats) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roc_auc([1, 1, 1], [0.1, 0.2, 0.3]), "all 3 rows are class 1"),
        (lambda: roc_auc([0, 1, 1], [0.1, np.nan, 0.3]), "1 rows are NaN.*row 1"),
        (lambda: roc_auc([0, 1, 1], [0.1, np.inf, 0.3]), "NaN or infinite"),
        (lambda: roc_auc([0, 1], [0.1, 0.2, 0.3]), "y_true has 2, scores has 3"),
        (lambda: roc_auc([0, 1, 2], [0.1, 0.2, 0.3]), r"label 2 is outside 0\.\.1"),
        (lambda: roc_auc(LABELS, np.ones((8, 2))), r"label 2 is outside 0\.\.1"),
        (lambda: roc_auc([0, 1], [[0.1], [0.2]]), r"shape \(2, 1\)"),
        (lambda: roc_auc([], []), "empty"),
        (lambda: roc_auc(["a", "b"], [0.1, 0.2]), "encode labels as integers"),
        (lambda: roc_auc([0, 1], ["0.1", "0.2"]), "real numbers"),
        (lambda: f1([0, 1, -1], [0, 1, 1]), r"label -1 is outside 0\.\.C-1"),
        (lambda: f1([0, 1], [0, 1], "micro"), "choose 'macro' or 'weighted'"),  # type: ignore
        (lambda: accuracy([0, 1], [0.0, 1.0]), "dtype float64"),
        (lambda: accuracy([[0], [1]], [0, 1]), r"shape \(2, 1\)"),
        (lambda: accuracy([0, 1, 1], [0, 1]), "y_true has 3, y_pred has 2"),
        (lambda: spearman([1.0, 2.0], [3.0, 3.0]), "constant"),
        (lambda: spearman([1.0], [3.0]), "at least 2"),
        (lambda: mean_over_repeats(roc_auc, [0, 1], [0.1, 0.2]), "repeats lie on axis 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        call()

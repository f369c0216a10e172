"""Against scikit-learn and SciPy in float64, brute force, and sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xmag_hf.probing import classifiers
from xmag_hf.probing.classifiers import (
    choose_c,
    few_shot_probabilities,
    fit_linear,
    knn_probabilities,
    log_loss,
)
from xmag_hf.probing.errors import ProbeError


def correlated(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features whose columns are mixtures, as embeddings' are, far from zero, of unequal size."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d)) * np.arange(1, d + 1) ** -0.7
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(98).standard_normal((classes, d))
    x = (rng.standard_normal((n, d)) + centres[labels]) @ mixing.T + 5
    return x.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(("n", "d"), [(300, 20), (60, 200)])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_probabilities_are_those_of_scikit_learn(classes: int, n: int, d: int, c: float) -> None:
    x, y = correlated(n, d, classes)
    new, _ = correlated(50, d, classes, seed=1)
    reference = make_pipeline(
        StandardScaler(), LogisticRegression(C=c, tol=1e-9, max_iter=20000)
    ).fit(x.astype(np.float64), y)
    probe = fit_linear(x, y, c)
    assert probe.converged
    np.testing.assert_allclose(
        probe.probabilities(new), reference.predict_proba(new.astype(np.float64)), atol=2e-4
    )


def test_float32_path_reaches_the_minimum_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective, written down here in float64, is no larger at our float32 solution."""
    monkeypatch.setattr(classifiers, "FLOAT64_VALUES", 0)
    x, y = correlated(400, 12, 4)
    z = (x - x.mean(0, dtype=np.float64)) / x.std(0, dtype=np.float64)

    def objective(flat: np.ndarray) -> float:
        w, b = flat[:48].reshape(12, 4), flat[48:]
        return -log_softmax(z @ w + b, axis=1)[np.arange(400), y].sum() + (w**2).sum() / (2 * 0.1)

    best = minimize(objective, np.zeros(52), method="BFGS", options={"gtol": 1e-4}).fun
    probe = fit_linear(x, y, 0.1)
    w = probe.coef * x.std(0, dtype=np.float64)[:, None]
    b = probe.intercept + x.mean(0, dtype=np.float64) @ probe.coef
    assert objective(np.concatenate([w.ravel(), b])) == pytest.approx(best, rel=1e-5)


def test_constant_column_and_absent_class_do_no_harm() -> None:
    x, y = correlated(200, 6, 3)
    with_constant = np.concatenate([x, np.full((200, 1), 0.1, np.float32)], axis=1)
    expected = fit_linear(x, y, 0.1).probabilities(x)
    actual = fit_linear(with_constant, 2 * y, 0.1, n_classes=6).probabilities(with_constant)
    np.testing.assert_allclose(actual[:, ::2], expected, atol=1e-5)
    assert (actual[:, 1::2] == 0).all()


def test_c_is_the_one_of_least_validation_loss_and_warm_starts_change_nothing() -> None:
    rng = np.random.default_rng(0)
    x, x_val = (rng.standard_normal((n, 60)).astype(np.float32) for n in (150, 100))
    y, y_val = ((z[:, :3] + rng.standard_normal((len(z), 3))).argmax(1) for z in (x, x_val))
    grid = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    best, losses = choose_c(x, y, x_val, y_val, grid)
    direct = {c: log_loss(y_val, fit_linear(x, y, c).probabilities(x_val)) for c in grid}
    assert best.c == min(direct, key=direct.__getitem__)
    for c, loss in losses.items():
        assert loss == pytest.approx(direct[c], abs=1e-4)
    assert len(losses) < len(grid)  # the overfitted end was not walked


def test_log_loss_by_hand() -> None:
    p = np.array([[0.5, 0.5], [0.1, 0.9]])
    assert log_loss(np.array([0, 0]), p) == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)


def test_knn_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifiers, "CHUNK_VALUES", 300)  # several chunks, the last one short
    x, y = correlated(80, 7, 3)
    new, _ = correlated(25, 7, 3, seed=1)
    actual = knn_probabilities(x, y, new, neighbours=5, temperature=0.07)
    for row, p in zip(new.astype(np.float64), actual, strict=True):
        cosines = [row @ t / np.linalg.norm(row) / np.linalg.norm(t) for t in x.astype(np.float64)]
        nearest = np.argsort(cosines)[-5:]
        votes = np.zeros(3)
        for index in nearest:
            votes[y[index]] += np.exp(cosines[index] / 0.07)
        np.testing.assert_allclose(p, votes / votes.sum(), rtol=1e-4)


def test_few_shot_by_hand() -> None:
    """Two rows per class and two shots: every draw takes both, so the answer is known."""
    x = np.array([[3.0, 0], [5.0, 0.2], [0, 4.0], [0.3, 2.0]])
    y = np.array([0, 0, 1, 1])
    new = np.array([[4.0, 1.0], [1.0, 4.0]])
    centre = x.mean(axis=0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))

    means = [unit(x[y == k] - centre).mean(axis=0) for k in (0, 1)]
    distance = np.array([[((row - m) ** 2).sum() for m in means] for row in unit(new - centre)])
    expected = np.exp(-distance) / np.exp(-distance).sum(axis=1, keepdims=True)
    actual = few_shot_probabilities(x, y, new, shots=2, draws=3, seed=0)
    assert actual.shape == (3, 2, 2)
    for draw in actual:
        np.testing.assert_allclose(draw, expected, rtol=1e-5)


def test_few_shot_draws_differ_repeat_and_gain_from_shots() -> None:
    x, y = correlated(400, 10, 4)
    new, truth = correlated(300, 10, 4, seed=1)
    one = few_shot_probabilities(x, y, new, shots=1, draws=8, seed=3)
    assert not np.array_equal(one[0], one[1])
    again = few_shot_probabilities(x, y, new, shots=1, draws=2, seed=3)
    np.testing.assert_array_equal(again, one[:2])
    many = few_shot_probabilities(x, y, new, shots=16, draws=8, seed=3)
    assert (many.argmax(2) == truth).mean() > (one.argmax(2) == truth).mean()


X, Y = correlated(40, 5, 2)
BROKEN = X.copy()
BROKEN[7, 2] = np.nan


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_linear(BROKEN, Y, 1.0), "row 7"),
        (lambda: fit_linear(X, Y[:-1], 1.0), r"\(39,\).*40 rows"),
        (lambda: fit_linear(X, Y * 0, 1.0), "two classes"),
        (lambda: fit_linear(X, Y - 1, 1.0), r"expected 0\.\."),
        (lambda: fit_linear(X, Y, 0.0), "C=0"),
        (lambda: fit_linear(X.astype(np.float16), Y, 1.0), "float16"),
        (lambda: fit_linear(X, Y, 1.0).probabilities(X[:, :3]), "5 columns"),
        (lambda: choose_c(X, Y, X, Y + 1, [1.0]), "labels"),
        (lambda: choose_c(X, Y, X, Y + 1, [1.0], n_classes=3), "class 2, training has not"),
        (lambda: choose_c(X, Y, X, Y, []), "empty grid"),
        (lambda: knn_probabilities(X, Y, X, neighbours=41), r"1\.\.40"),
        (lambda: knn_probabilities(X, Y, X[:, :4], neighbours=3), "4 columns, training has 5"),
        (lambda: knn_probabilities(X * 0, Y, X, neighbours=3), "row 0 is all zero"),
        (lambda: few_shot_probabilities(X, Y, X, shots=39, draws=1, seed=0), "smaller --shots"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        call()

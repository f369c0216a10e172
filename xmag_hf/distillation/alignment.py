"""How well frozen student features predict the teacher's: the honest alignment scores.

Teacher features share a large mean, so raw cosine flatters: a constant vector scores 0.8. Every
student is therefore mapped to the teacher's space by the same kind of ridge map, fitted on
training pairs, and scored on held-out pairs against the constant (cosine), against 0 (centred
cosine) and against chance (top-1 retrieval). The loss heads play no part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

N_FOLDS = 5
RELATIVE_ALPHAS = np.logspace(-6, 2, 9)  # times the mean eigenvalue of the Gram matrix
TIE = 1e-6  # cosines closer than this are the same picture (shared sub-patches)


@dataclass(frozen=True)
class RidgeMap:
    """y = (x - x_mean) @ weights + y_mean.

    Attributes:
        weights: (d, t).
        x_mean: (d,).
        y_mean: (t,), the mean training-teacher feature.
        alpha: Penalty, chosen by inner cross-validation.
    """

    weights: np.ndarray
    x_mean: np.ndarray
    y_mean: np.ndarray
    alpha: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map (n, d) to (n, t)."""
        return (x - self.x_mean) @ self.weights + self.y_mean


@dataclass(frozen=True)
class AlignmentScores:
    """Scores of predictions against teacher features, all in [-1, 1].

    Attributes:
        cosine: Mean cosine similarity; compare with that of the constant.
        centred_cosine: The same after subtracting the mean training-teacher feature; the constant
            has 0.
        retrieval: Share of predictions whose own target is the most similar among the candidates
            (centred cosine; ties with an identical candidate count).
        chance: Retrieval by guessing: the mean share of candidates identical to the own target,
            which is 1 / candidates where all differ.
    """

    cosine: float
    centred_cosine: float
    retrieval: float
    chance: float


def fit_ridge(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> RidgeMap:
    """Ridge regression with an intercept; the penalty by cross-validation over `folds`.

    Everything is computed from Gram matrices: the rows are passed over once, and all penalties of
    a fold cost one eigendecomposition.

    Args:
        x: (n, d) student features.
        y: (n, t) teacher features.
        folds: (n,) int; rows of one fold are left out together.

    Returns:
        The map, refitted on all rows with the best penalty.

    Raises:
        ValueError: Lengths differ or there are fewer than two folds.
    """
    names = np.unique(folds)
    if not len(x) == len(y) == len(folds) or len(names) < 2:
        raise ValueError(
            f"ridge map: x {x.shape}, y {y.shape}, {len(folds)} fold numbers with {len(names)} "
            "folds; lengths must agree and folds be at least two."
        )
    x, y = x.astype(np.float64), y.astype(np.float64)
    # Shifting by the overall means first keeps the sums well conditioned; each fold's own
    # training means are taken out below.
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    basis = np.eye(x.shape[1])
    if len(x) < x.shape[1]:  # with fewer rows than features, their span holds the whole solution
        basis = np.linalg.svd(x, full_matrices=False)[2].T  # (d, n)
        x = x @ basis
    sums = [_sums(x[folds == name], y[folds == name]) for name in names]
    total = functools.reduce(lambda a, b: _combine(a, b, 1), sums)
    alphas = RELATIVE_ALPHAS * max(np.trace(total.xx) / len(basis), np.finfo(float).tiny)
    errors = np.zeros(len(alphas))
    for left_out in sums:
        errors += _squared_errors(left_out, _combine(total, left_out, -1), alphas)
    alpha = float(alphas[errors.argmin()])
    values, vectors, projected = _decompose(total)
    weights = basis @ vectors @ (projected / (values + alpha)[:, None])
    return RidgeMap(weights, x_mean, y_mean, alpha)


def spatial_folds(slide: np.ndarray, y: np.ndarray, n_folds: int = N_FOLDS) -> np.ndarray:
    """Folds that keep overlapping pairs together: bands across slides, or whole slides.

    Args:
        slide: (n,) slide number of each pair.
        y: (n,) top edge of each pair.
        n_folds: Number of folds wanted.

    Returns:
        (n,) int fold of each pair: n_folds bands within every slide where slides have rows enough
        for bands (4 * n_folds on average), else slides dealt out to the lightest fold, largest
        first.

    Raises:
        ValueError: Fewer than two pairs.
    """
    if len(y) < 2:
        raise ValueError(f"{len(y)} training pairs: the ridge map's folds need at least 2.")
    numbers, slide, counts = np.unique(slide, return_inverse=True, return_counts=True)
    if len(y) / len(numbers) < 4 * n_folds and len(numbers) >= 2:
        weights, fold_of = np.zeros(min(n_folds, len(numbers))), np.zeros(len(numbers), np.int64)
        for number in np.argsort(-counts, kind="stable"):
            fold_of[number] = weights.argmin()
            weights[fold_of[number]] += counts[number]
        return fold_of[slide]
    folds = np.zeros(len(y), dtype=np.int64)
    for number in range(len(numbers)):
        mine = np.flatnonzero(slide == number)
        ranks = np.argsort(np.argsort(y[mine], kind="stable"), kind="stable")
        folds[mine] = ranks * n_folds // len(mine)
    return folds


def score_predictions(
    predicted: np.ndarray, target: np.ndarray, mean: np.ndarray
) -> AlignmentScores:
    """Score predictions, each among the candidates of its group.

    Args:
        predicted: (g, n, t): g groups of n predictions. Global: one group of all held-out pairs.
            Local: one group of sixteen cells per pair.
        target: (g, n, t) teacher features.
        mean: (t,) mean training-teacher feature.

    Returns:
        The scores.
    """
    cosine = (_unit(predicted) * _unit(target)).sum(-1).mean()
    p, t = _unit(predicted - mean), _unit(target - mean)
    similar = p @ t.swapaxes(-1, -2)  # (g, n, n)
    own = np.diagonal(similar, axis1=-2, axis2=-1)  # (g, n)
    # A prediction without direction (the constant) names no candidate: it scores chance.
    hits = (own >= similar.max(-1) - TIE) & (np.abs(p).max(-1) > 0)
    guess = (t @ t.swapaxes(-1, -2) >= 1 - TIE).mean(-1)  # (g, n)
    guess = np.maximum(guess, 1.0 / target.shape[1])  # a target equal to the mean has no direction
    retrieval = np.where(np.abs(p).max(-1) > 0, hits, guess).mean()
    return AlignmentScores(float(cosine), float(own.mean()), float(retrieval), float(guess.mean()))


@dataclass(frozen=True)
class _Sums:
    n: int
    x: np.ndarray  # (d,)
    y: np.ndarray  # (t,)
    xx: np.ndarray  # (d, d)
    xy: np.ndarray  # (d, t)
    yy: float


def _sums(x: np.ndarray, y: np.ndarray) -> _Sums:
    return _Sums(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, float((y**2).sum()))


def _combine(a: _Sums, b: _Sums, sign: int) -> _Sums:
    """Sums over the rows of both (sign 1), or of `a` without those of `b` (sign -1)."""
    return _Sums(
        a.n + sign * b.n,
        a.x + sign * b.x,
        a.y + sign * b.y,
        a.xx + sign * b.xx,
        a.xy + sign * b.xy,
        a.yy + sign * b.yy,
    )


def _decompose(train: _Sums) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues (d,), eigenvectors (d, d) of the centred Gram, and V^T X^T Y (d, t)."""
    gram = train.xx - np.outer(train.x, train.x) / train.n
    cross = train.xy - np.outer(train.x, train.y) / train.n
    values, vectors = np.linalg.eigh(gram)
    return values.clip(min=0), vectors, vectors.T @ cross


def _squared_errors(left_out: _Sums, train: _Sums, alphas: np.ndarray) -> np.ndarray:
    """(n_alphas,) sums over left-out rows of |y - (x - mx) W - my|^2, from sums alone.

    With W = V D P, D = 1 / (values + alpha), the error is yy - 2 <W, X'Y> + <W, X'X W>; in the
    eigenvectors' basis the last two depend on alpha through the diagonal D only.
    """
    mx, my = train.x / train.n, train.y / train.n
    n = left_out.n
    xx = left_out.xx - np.outer(left_out.x, mx) - np.outer(mx, left_out.x) + n * np.outer(mx, mx)
    xy = left_out.xy - np.outer(left_out.x, my) - np.outer(mx, left_out.y) + n * np.outer(mx, my)
    yy = left_out.yy - 2 * left_out.y @ my + n * my @ my
    values, vectors, projected = _decompose(train)
    linear = (projected * (vectors.T @ xy)).sum(1)  # (d,)
    quadratic = (vectors.T @ xx @ vectors) * (projected @ projected.T)  # (d, d)
    inverse = 1.0 / (values[None] + alphas[:, None])  # (n_alphas, d)
    return yy - 2 * inverse @ linear + np.einsum("ai,ij,aj->a", inverse, quadratic, inverse)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-12)

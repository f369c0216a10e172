"""Classifiers on frozen embeddings: multinomial logistic regression, nearest neighbours, few shots.

Arrays in, arrays out; imports nothing of ours but the error.

The logistic regression is scikit-learn's (same objective, same C, features standardised before),
with another solver: at 64,000 x 1,536 x 18 scikit-learn's L-BFGS multiplies float32 features with
float64 weights, which copies the features to float64 at every step. Here steps stay in float32 and
run in the eigenbasis of the features, scaled by the curvature there, so that correlated features
(all embeddings have them) cost tens of steps, not hundreds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize

from .errors import ProbeError

logger = logging.getLogger(__name__)

# Up to this many values (128 MB) the solver runs in float64; above, memory and time count more
# than digits that no score shows.
FLOAT64_VALUES = 2**24
CHUNK_VALUES = 2**23  # of features or similarities held beside the whole
MAX_STEPS = 1000
KNN_TEMPERATURE = 0.07


@dataclass(frozen=True)
class LinearProbe:
    """A fitted logistic regression, in terms of the raw features.

    Attributes:
        coef: (D, K) float64, per raw feature.
        intercept: (K,) float64.
        classes: (K,) labels that were seen in training, ascending.
        n_classes: Columns of `probabilities`; classes not seen get 0.
        c: Inverse regularisation, as scikit-learn's.
        steps: Of the solver.
        converged: False where the solver stopped at its limit.
    """

    coef: np.ndarray
    intercept: np.ndarray
    classes: np.ndarray
    n_classes: int
    c: float
    steps: int
    converged: bool

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """(n, D) features -> (n, n_classes) float64, rows sum to 1."""
        if x.ndim != 2 or x.shape[1] != len(self.coef):
            raise ProbeError(
                f"features of shape {x.shape}: this probe was fitted on {len(self.coef)} columns; "
                "embed with the encoder that it was fitted on."
            )
        # A copy of the weights in the features' precision, not of the features in the weights'.
        logits = x @ self.coef.astype(x.dtype)
        logits = logits.astype(np.float64) + self.intercept
        out = np.zeros((len(x), self.n_classes))
        out[:, self.classes] = _softmax(logits)
        return out


def fit_linear(
    x: np.ndarray,
    y: np.ndarray,
    c: float,
    *,
    n_classes: int | None = None,
    start: LinearProbe | None = None,
) -> LinearProbe:
    """Standardise features and fit a multinomial logistic regression with an L2 penalty.

    Minimises sum of cross-entropies + ||W||^2 / (2 c) over standardised features, the intercept
    unpenalised: what StandardScaler and LogisticRegression(C=c) of scikit-learn minimise (for two
    classes too, where that has one weight vector).

    Args:
        x: (n, D) float, n rows of at least two classes; not changed.
        y: (n,) ints.
        c: Inverse regularisation, above 0.
        n_classes: Columns of the probabilities; none: largest label + 1.
        start: Where to begin, say the same data's solution for another c.

    Returns:
        The fitted probe. If the solver stopped early this is logged and said in `converged`.

    Raises:
        ProbeError: Shapes, NaN, fewer than two classes, or c not above 0.
    """
    y, n_classes = _checked(x, y, n_classes)
    return _solve(_design(x), y, c, n_classes, start)


def choose_c(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    grid: Sequence[float],
    *,
    n_classes: int | None = None,
) -> tuple[LinearProbe, dict[float, float]]:
    """Fit along a grid of C, each from the last, and keep the one with the least validation loss.

    The loss is the mean cross-entropy: it has no ties (accuracy on a few hundred images has many),
    needs no class to be present (macro AUC does), and rewards the probabilities that AUCs are made
    of. A tie goes to the stronger regularisation. The path ends once the loss has been worse than
    the best at two values in a row: weaker regularisation only takes ever more steps from there.

    Args:
        x_train: (n, D).
        y_train: (n,) ints.
        x_val: (m, D).
        y_val: (m,) ints, each among those of `y_train`.
        grid: Values of C.
        n_classes: As in `fit_linear`.

    Returns:
        The probe of the best C, fitted on the training rows, and {C: validation loss} of those
        that were fitted.

    Raises:
        ProbeError: As `fit_linear`; an empty grid; a validation class that training lacks.
    """
    y_train, n_classes = _checked(x_train, y_train, n_classes)
    y_val, _ = _checked(x_val, y_val, n_classes, least=1)
    missing = np.setdiff1d(y_val, y_train)
    if len(missing):
        raise ProbeError(
            f"validation has class {missing[0]}, training has not: C cannot be chosen. Leave that "
            "class out, or move images of it to training."
        )
    design = _design(x_train)
    best: LinearProbe | None = None
    last: LinearProbe | None = None
    losses: dict[float, float] = {}
    for c in sorted(grid):
        last = _solve(design, y_train, c, n_classes, last)
        losses[c] = log_loss(y_val, last.probabilities(x_val))
        logger.info("C=%g: %d steps, validation loss %.4f", c, last.steps, losses[c])
        if best is None or losses[c] < losses[best.c]:
            best = last
        elif all(losses[each] > losses[best.c] for each in sorted(losses)[-2:]):
            break
    if best is None:
        raise ProbeError("C: an empty grid; give at least one value.")
    if len(grid) > 1 and best.c in (min(grid), max(grid)):
        logger.info("C=%g is an end of its grid; a wider --c-grid may do better.", best.c)
    return best, losses


def log_loss(y: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-probability of the true class, in nats; p is kept above 1e-15."""
    own = probabilities[np.arange(len(y)), y]
    return float(-np.log(np.maximum(own, 1e-15)).mean())


def knn_probabilities(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    *,
    neighbours: int = 20,
    n_classes: int | None = None,
    temperature: float = KNN_TEMPERATURE,
) -> np.ndarray:
    """K nearest neighbours by cosine similarity of raw features, votes weighted exp(s / T).

    The protocol of Wu et al. 2018 (arXiv 1805.01978, Sec. 3.4) and DINO (arXiv 2104.14294): k = 20,
    T = 0.07. Brute force, in chunks of test rows.

    Args:
        x_train: (n, D) float.
        y_train: (n,) ints.
        x_test: (m, D) float.
        neighbours: k, at most n.
        n_classes: Columns; none: largest label + 1.
        temperature: T of the votes; infinity counts them equally.

    Returns:
        (m, n_classes) float64: each class's share of the votes.

    Raises:
        ProbeError: Shapes, NaN, k outside 1..n, or a row of zeros, which has no direction.
    """
    y_train, n_classes = _checked(x_train, y_train, n_classes, least=1)
    _finite(x_test, x_train.shape[1])
    n = len(x_train)
    if not 1 <= neighbours <= n:
        raise ProbeError(f"--neighbours={neighbours}: must be in 1..{n}, the training rows.")
    unit_train = _unit(x_train)
    votes = np.zeros((len(x_test), n_classes))
    rows = max(1, CHUNK_VALUES // n)
    for first in range(0, len(x_test), rows):
        similar = _unit(x_test[first : first + rows]) @ unit_train.T
        nearest = np.argpartition(similar, n - neighbours, axis=1)[:, n - neighbours :]
        values = np.take_along_axis(similar, nearest, axis=1).astype(np.float64)
        weights = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
        labels = y_train[nearest]
        for label in np.unique(labels):
            votes[first : first + rows, label] = (weights * (labels == label)).sum(axis=1)
    return votes / votes.sum(axis=1, keepdims=True)


def few_shot_probabilities(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    *,
    shots: int,
    draws: int,
    seed: int,
    n_classes: int | None = None,
) -> np.ndarray:
    """Nearest class mean after centring and L2 normalisation, from few images per class, repeated.

    SimpleShot's CL2N (Wang et al. 2019, arXiv 1911.04623): the mean of all training features
    (labels unused) is subtracted, rows are scaled to length 1, and a test row goes to the class
    whose mean over the drawn rows is closest (Euclidean). Probabilities are the softmax of
    -distance^2, so their order is that of the distances.

    Args:
        x_train: (n, D) float; images are drawn from here.
        y_train: (n,) ints.
        x_test: (m, D) float.
        shots: Images drawn per class, without replacement.
        draws: Repeats.
        seed: Of the draws; draw r is the same whatever `draws` is.
        n_classes: Columns; none: largest label + 1.

    Returns:
        (draws, m, n_classes) float32; classes without training rows get 0.

    Raises:
        ProbeError: Shapes, NaN, or a class with fewer than `shots` rows.
    """
    y_train, n_classes = _checked(x_train, y_train, n_classes)
    _finite(x_test, x_train.shape[1])
    classes, counts = np.unique(y_train, return_counts=True)
    if shots < 1 or draws < 1:
        raise ProbeError(f"few-shot: shots={shots}, draws={draws}; both must be at least 1.")
    if counts.min() < shots:
        raise ProbeError(
            f"few-shot: class {classes[counts.argmin()]} has {counts.min()} training images, fewer "
            f"than {shots}; give smaller --shots."
        )
    mean = x_train.mean(axis=0, dtype=np.float64).astype(x_train.dtype)
    members = [np.flatnonzero(y_train == label) for label in classes]
    unit_test = _unit(x_test - mean)
    out = np.zeros((draws, len(x_test), n_classes), dtype=np.float32)
    for draw in range(draws):
        rng = np.random.default_rng([seed, shots, draw])
        picked = np.stack([rng.choice(rows, shots, replace=False) for rows in members])
        centres = _unit(x_train[picked.ravel()] - mean)
        centres = centres.reshape(len(classes), shots, -1).mean(axis=1)
        # Rows have length 1, so |u - m|^2 = 1 - 2 u.m + |m|^2, and the 1 falls out of the softmax.
        logits = 2 * (unit_test @ centres.T) - (centres**2).sum(axis=1)
        out[draw][:, classes] = _softmax(logits.astype(np.float64))
    return out


@dataclass(frozen=True)
class _Design:
    """Standardised features in the basis of their principal directions.

    Attributes:
        z: (n, r) coordinates.
        basis: (D, r) orthonormal columns.
        spectrum: (r,) mean squares of the columns of z, float64.
        mean: (D,) of the raw features, float64.
        scale: (D,) standard deviation, 1 for constant features, float64.
    """

    z: np.ndarray
    basis: np.ndarray
    spectrum: np.ndarray
    mean: np.ndarray
    scale: np.ndarray


def _design(x: np.ndarray) -> _Design:
    n, d = x.shape
    dtype = np.dtype(np.float64 if x.size <= FLOAT64_VALUES else np.float32)
    rows = max(1, CHUNK_VALUES // d)
    chunks = [slice(first, first + rows) for first in range(0, n, rows)]
    mean = x.mean(axis=0, dtype=np.float64)
    squares = sum(((x[chunk] - mean) ** 2).sum(axis=0) for chunk in chunks)
    scale = np.sqrt(squares / n)
    # A constant column's sd is rounding, not zero; it must not be blown up to noise of sd 1.
    scale[scale <= 10 * np.finfo(x.dtype).eps * np.abs(mean)] = 1.0
    z = np.empty((n, d), dtype=dtype)
    for chunk in chunks:
        z[chunk] = (x[chunk] - mean) / scale
    if n < d:
        # All gradients lie in the span of the rows: r = n directions lose nothing.
        left, singular, right = scipy.linalg.svd(z, full_matrices=False, overwrite_a=True)
        return _Design(left * singular, right.T, singular.astype(np.float64) ** 2 / n, mean, scale)
    spectrum, basis = scipy.linalg.eigh(z.T @ z / n, overwrite_a=True, check_finite=False)
    for chunk in chunks:
        z[chunk] = z[chunk] @ basis
    return _Design(z, basis, np.maximum(spectrum, 0).astype(np.float64), mean, scale)


def _solve(
    design: _Design, y: np.ndarray, c: float, n_classes: int, start: LinearProbe | None
) -> LinearProbe:
    if not (np.isfinite(c) and c > 0):
        raise ProbeError(f"C={c}: inverse regularisation must be above 0.")
    z, (n, r) = design.z, design.z.shape
    classes, own = np.unique(y, return_inverse=True)
    k = len(classes)
    # Two softmax vectors w/2 and -w/2 pay half of what scikit-learn's single w pays.
    penalty = (2.0 if k == 2 else 1.0) / (c * n)
    weights, intercept = _start(design, classes, start)
    rows = np.arange(n)
    first = _softmax(z @ weights.astype(z.dtype) + intercept.astype(z.dtype))
    curvature = float((first * (1 - first)).mean())
    slope = 1 / np.sqrt(curvature * design.spectrum + penalty)[:, None]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        theta = flat.reshape(r + 1, k)
        w = slope * theta[:r]
        logits = z @ w.astype(z.dtype)
        logits += theta[r].astype(z.dtype)
        logits -= logits.max(axis=1, keepdims=True)
        own_logit = logits[rows, own]
        np.exp(logits, out=logits)
        total = logits.sum(axis=1, keepdims=True)
        loss = float((np.log(total[:, 0]) - own_logit).mean(dtype=np.float64))
        logits /= total
        logits[rows, own] -= 1
        gradient = np.empty((r + 1, k))
        # z.T @ p, not p.T @ z: OpenBLAS takes ten times as long for the latter.
        gradient[:r] = slope * ((z.T @ logits) / n + penalty * w)
        gradient[r] = logits.mean(axis=0, dtype=np.float64)
        return loss + penalty / 2 * float((w**2).sum()), gradient.ravel()

    result = scipy.optimize.minimize(
        loss_and_gradient,
        np.concatenate([weights / slope, intercept[None]]).ravel(),
        method="L-BFGS-B",
        jac=True,
        options={"maxiter": MAX_STEPS, "maxfun": 2 * MAX_STEPS, "maxcor": 20, **_stop(z.dtype)},
    )
    theta = result.x.reshape(r + 1, k)
    coef = (design.basis @ (slope * theta[:r])) / design.scale[:, None]
    # Status 2 is a line search that finds nothing better: the end, as far as rounding allows.
    converged = result.status != 1
    if not converged:
        logger.warning("linear probe, C=%g: no convergence in %d steps.", c, result.nit)
    return LinearProbe(
        coef, theta[r] - design.mean @ coef, classes, n_classes, c, int(result.nit), converged
    )


def _stop(dtype: np.dtype) -> dict[str, float]:
    """L-BFGS's ends. Gradients are scaled by curvature: their square is about what is left."""
    if dtype == np.float64:
        return {"gtol": 1e-6, "ftol": 1e-13}
    return {"gtol": 1e-5, "ftol": 1e-8}


def _start(
    design: _Design, classes: np.ndarray, start: LinearProbe | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights in the design's basis, and intercept: of another probe, or zero."""
    usable = start is not None and np.array_equal(start.classes, classes)
    if start is None or not usable or len(start.coef) != len(design.mean):
        return np.zeros((design.z.shape[1], len(classes))), np.zeros(len(classes))
    weights = design.basis.T @ (start.coef * design.scale[:, None])
    return weights, start.intercept + design.mean @ start.coef


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not (length > 0).all():
        raise ProbeError(
            f"features: row {int(np.flatnonzero(length[:, 0] == 0)[0])} is all zero, so it has no "
            "direction; look at that image and at the encoder."
        )
    return x / length


def _checked(
    x: np.ndarray, y: np.ndarray, n_classes: int | None, least: int = 2
) -> tuple[np.ndarray, int]:
    """Labels as int64 and the number of classes, after checks that every classifier needs."""
    y = np.asarray(y)
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(x) or not len(y):
        raise ProbeError(
            f"labels: shape {y.shape}, {y.dtype}, for {len(x)} rows of features; give one integer "
            "for each row, 0..C-1."
        )
    _finite(x)
    y = y.astype(np.int64)
    n_classes = int(y.max()) + 1 if n_classes is None else n_classes
    if y.min() < 0 or y.max() >= n_classes:
        raise ProbeError(f"labels: {y.min()} to {y.max()}; expected 0..{n_classes - 1}.")
    if len(np.unique(y)) < least:
        raise ProbeError(f"labels: all are {y[0]}; a classifier needs two classes in training.")
    return y, n_classes


def _finite(x: np.ndarray, columns: int | None = None) -> None:
    if x.ndim != 2 or x.dtype not in (np.float32, np.float64):
        raise ProbeError(f"features: shape {x.shape}, {x.dtype}; give (n, D) float32 or float64.")
    if columns is not None and x.shape[1] != columns:
        raise ProbeError(
            f"features: {x.shape[1]} columns, training has {columns}; embed both with one encoder."
        )
    bad = ~np.isfinite(x.sum(axis=1))
    if bad.any():
        raise ProbeError(
            f"features: {int(bad.sum())} rows are NaN or infinite, the first is row "
            f"{int(np.flatnonzero(bad)[0])}; embed those images again, or in fp32."
        )

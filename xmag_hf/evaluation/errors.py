"""The folder's one error, and the checks that raise it."""

from __future__ import annotations

from typing import Any

import numpy as np


class EvaluationError(ValueError):
    """Predictions or options that cannot be scored; names subject, value and remedy."""


def labels_of(name: str, values: Any, n_classes: int | None = None) -> np.ndarray:
    """Check class labels.

    Args:
        name: What the caller calls them, for the message.
        values: (n,) integers or booleans, 0..C-1.
        n_classes: C, where it is known.

    Returns:
        (n,) int64.

    Raises:
        EvaluationError: Not (n,), empty, not integers, negative, or not below `n_classes`.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise EvaluationError(f"{name}: shape {array.shape}; give one label per row, shape (n,).")
    if array.size == 0:
        raise EvaluationError(f"{name}: empty; there is nothing to score.")
    if array.dtype.kind not in "iub":
        raise EvaluationError(
            f"{name}: dtype {array.dtype}; encode labels as integers 0..C-1 "
            "(np.unique(labels, return_inverse=True))."
        )
    array = array.astype(np.int64)
    if array.min() < 0 or (n_classes is not None and array.max() >= n_classes):
        wrong = array[array < 0] if array.min() < 0 else array[array >= (n_classes or 0)]
        most = "C-1" if n_classes is None else n_classes - 1
        raise EvaluationError(
            f"{name}: label {wrong[0]} is outside 0..{most}; "
            "encode labels, or give scores with a column for every class."
        )
    return array


def finite(name: str, values: Any, ndim: tuple[int, ...] = (1,)) -> np.ndarray:
    """Check scores or measured values.

    Args:
        name: What the caller calls them, for the message.
        values: Real numbers, n rows.
        ndim: Numbers of axes that are allowed.

    Returns:
        The array as float64, same shape.

    Raises:
        EvaluationError: Wrong axes, empty, not numbers, NaN or infinite (the first row is named).
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iubf":
        raise EvaluationError(f"{name}: dtype {array.dtype}; give real numbers.")
    if array.ndim not in ndim:
        wanted = " or ".join(str(axes) for axes in ndim)
        raise EvaluationError(f"{name}: shape {array.shape}; {wanted} axes are needed, rows first.")
    if array.size == 0:
        raise EvaluationError(f"{name}: empty (shape {array.shape}); there is nothing to score.")
    array = array.astype(np.float64)
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        raise EvaluationError(
            f"{name}: {int(bad.sum())} rows are NaN or infinite, the first is row "
            f"{int(np.flatnonzero(bad)[0])}; drop those rows from every array, or repair the model."
        )
    return array


def same_length(**arrays: np.ndarray) -> int:
    """The common number of rows.

    Args:
        arrays: Arrays by the name that a message should use.

    Returns:
        n.

    Raises:
        EvaluationError: Lengths differ; all are named.
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise EvaluationError(f"rows differ: {told}; pass one row per case in the same order.")
    return next(iter(lengths.values()))

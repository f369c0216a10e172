"""Centred and whitened targets: a cosine of raw teacher features mostly sees their common mean."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from xmag_hf.distillation.teacher_cache import TeacherFeatures

STATISTICS_PAIRS = 20_000  # 320,000 cells: enough for a covariance of 1,536 features
PAIRS_AT_ONCE = 256
# Added to every variance, as a share of their mean: the many directions of nearly no variance are
# rounding noise of float16, and dividing by their own spread would make them as loud as tissue.
WHITENING_FLOOR = 0.01


class TargetMap(nn.Module):
    """h -> (h - mean) @ basis; buffers, so that a checkpoint holds them and processes share them.

    Args:
        mean: (d_T,).
        basis: (d_T, d_T); None only centres.
    """

    mean: Tensor
    basis: Tensor | None

    def __init__(self, mean: Tensor, basis: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., d_T) teacher features; float32, whatever the student trains in."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float() - self.mean
            return centred if self.basis is None else centred @ self.basis


def fit_target_map(
    features: TeacherFeatures, rows: np.ndarray, centering: str, seed: int
) -> TargetMap | None:
    """Mean, and covariance if asked for, of the cells' features of the training pairs.

    Args:
        features: Cached teacher features.
        rows: (n,) rows to train on; at most `STATISTICS_PAIRS` of them are read, drawn at random.
        centering: none, mean or whiten: principal components divided by the root of their
            variance plus `WHITENING_FLOOR` times the mean variance.
        seed: Of that draw.

    Returns:
        The map, the same for the same arguments; None for "none".
    """
    if centering == "none":
        return None
    if len(rows) > STATISTICS_PAIRS:
        draw = np.random.default_rng(seed)
        rows = np.sort(draw.choice(rows, STATISTICS_PAIRS, replace=False))
    mean, covariance = _moments(features, rows)
    if centering == "mean":
        return TargetMap(torch.from_numpy(mean).float())
    values, vectors = np.linalg.eigh(covariance)
    spread = np.sqrt(values.clip(min=0) + WHITENING_FLOOR * values.mean())
    return TargetMap(torch.from_numpy(mean).float(), torch.from_numpy(vectors / spread).float())


def _moments(features: TeacherFeatures, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d,) mean and (d, d) covariance over all cells, float64, a few pairs in memory at a time."""
    dim = features.teacher_dim
    shift = features[int(rows[0])].astype(np.float64).mean(0)  # keeps the squares well conditioned
    total, squares, count = np.zeros(dim), np.zeros((dim, dim)), 0
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        cells = features.rows(rows[start : start + PAIRS_AT_ONCE]).reshape(-1, dim) - shift
        total += cells.sum(0)
        squares += cells.T @ cells
        count += len(cells)
    mean = total / count
    return mean + shift, squares / count - np.outer(mean, mean)

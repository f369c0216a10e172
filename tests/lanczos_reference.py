"""The resampling contract as dense matrices in float64: slow, and plainly right."""

from __future__ import annotations

import numpy as np


def lanczos3(pixels: np.ndarray, first: float, last: float, n: int) -> np.ndarray:
    """Axis 0 of `pixels`, resampled to n samples of [first, last): the contract as a matrix.

    Weights sinc(t) sinc(t/3), |t| < 3, t the distance in source px over max(1, scale), scaled to
    sum 1 over the pixels that exist.
    """
    step = (last - first) / n
    centres = first + (np.arange(n) + 0.5) * step
    t = (np.arange(pixels.shape[0]) + 0.5 - centres[:, None]) / max(1.0, step)
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.tensordot(weights, pixels.astype(np.float64), axes=(1, 0))


def expected_region(
    level: np.ndarray,
    downsample: float,
    xy: tuple[float, float],
    size: tuple[int, int],
    mpp: float,
    mpp0: float,
) -> np.ndarray:
    """The region at level-0 `xy` of `size` px at `mpp`, from the whole level; float64."""
    step = mpp / mpp0 / downsample
    (x, y), (width, height) = (xy[0] / downsample, xy[1] / downsample), size
    across = lanczos3(level.transpose(1, 0, 2), x, x + width * step, width)
    # Pillow, whose filter the contract names, stores bytes between its two passes.
    across = np.clip(across, 0, 255).transpose(1, 0, 2)
    return np.clip(np.rint(lanczos3(across, y, y + height * step, height)), 0, 255)

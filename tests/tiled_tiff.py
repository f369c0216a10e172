"""Tiled pyramidal TIFFs for tests: what OpenSlide's generic-tiff driver reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile


def write_tiff(
    path: Path, levels: Sequence[np.ndarray], mpp: float | tuple[float, float] | None
) -> Path:
    """Write (H, W, 3) or (H, W, 4) uint8 levels, finest first; no um/px in the file if None."""
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    scale = {} if x is None or y is None else {"resolution": (1e4 / x, 1e4 / y)}
    unit = "CENTIMETER" if scale else "NONE"
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                extrasamples=["unassalpha"] if level.shape[2] == 4 else None,
                subfiletype=1 if number else 0,
                resolutionunit=unit,
                metadata=None,
                **scale,
            )
    return path

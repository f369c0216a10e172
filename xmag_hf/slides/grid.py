"""The grid of patch origins: level-0 pixels, no drift."""

from __future__ import annotations

import numpy as np

from .errors import SlideScaleError
from .reader import Slide


def grid_starts(
    begin: int, end: int, patch_px: int, stride_px: float, scale: float, *, pad_edges: bool = False
) -> np.ndarray:
    """Starts along one axis: begin + round(k * stride_px * scale), k = 0, 1, ...

    Rounding the product (never a rounded step, k times) keeps every start within half a level-0
    pixel of its place however wide the slide is.

    Args:
        begin: First level-0 px of the axis.
        end: One past the last.
        patch_px: Side of a patch, px at the target um/px.
        stride_px: Distance between starts, px at the target um/px.
        scale: Level-0 px per target px (target um/px / mpp0).
        pad_edges: Keep patches that start inside and reach past the end.

    Returns:
        (n,) int64. Patches past the end are dropped; an axis shorter than a patch has one start.
    """
    # One more than can fit: the test below decides.
    n = max(0, int((end - begin) / (stride_px * scale))) + 1
    offsets = np.rint(np.arange(n, dtype=np.float64) * stride_px * scale).astype(np.int64)
    reach = 0.0 if pad_edges else patch_px * scale
    inside = offsets + reach <= end - begin + 1e-6 if not pad_edges else offsets < end - begin
    inside[0] = True
    return begin + offsets[inside]


def grid_origins(
    slide: Slide, *, patch_px: int, stride_px: float, mpp: float, pad_edges: bool = False
) -> np.ndarray:
    """Top-left corners of the patches of a slide, row by row.

    Args:
        slide: Gives size, mpp0 and the scanned area's bounds.
        patch_px: Side of a patch, px at `mpp`.
        stride_px: Distance between patches, px at `mpp`.
        mpp: um/px of the patches.
        pad_edges: Keep patches that reach past the edge.

    Returns:
        (N, 2) int64, (x, y) in level-0 px, sorted by (y, x). A slide smaller than a patch has one.

    Raises:
        SlideScaleError: patch_px or stride_px below 1, or mpp not above 0.
    """
    if patch_px < 1 or stride_px < 1 or not mpp > 0:
        raise SlideScaleError(
            f"{slide.slide_id}: patch_px={patch_px}, stride_px={stride_px}, mpp={mpp}; patch and "
            "stride must be at least 1 px and mpp above 0."
        )
    columns, rows = (
        grid_starts(begin, end, patch_px, stride_px, mpp / slide.mpp0, pad_edges=pad_edges)
        for begin, end in zip(slide.origin_xy, slide.extent_xy, strict=True)
    )
    return np.stack([np.tile(columns, len(rows)), np.repeat(rows, len(columns))], axis=1)

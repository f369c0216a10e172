"""Windows: equal arrays of a level's pixels, each around one patch, with the kernel's reach.

Patches of a slide differ in where they begin between two pixels, and at the slide's edge in what
there is to see. As windows of one size they can be stacked and resampled together, on a CPU or a
GPU, and come out as `Slide.read_region` would give them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .reader import LANCZOS_SUPPORT, AxisRead, Slide, resample

WHITE = 255


@dataclass(frozen=True)
class AxisWindow:
    """One axis of a window. Positions without a note are px after the window's start.

    Attributes:
        read: What `read_region` would read.
        start: First px of the window, px of the level; may lie outside it.
        side: px, equal for all patches of a plan.
        first: Where the patch begins; a fraction.
        last: Where it ends.
        low: First px that the kernel may see; its weights sum to 1 over [low, high).
        high: One past the last.
        stored_low: First px that the level stores, `stored_high` if there is none.
        stored_high: One past the last; until `high` the last stored px is repeated, or white.
    """

    read: AxisRead
    start: int
    side: int
    first: float
    last: float
    low: int
    high: int
    stored_low: int
    stored_high: int

    @property
    def whole(self) -> bool:
        """Whether the level stores every px of the window."""
        return self.stored_low == 0 and self.stored_high == self.side


def window_shape(step: float, n_px: int) -> tuple[int, int]:
    """Side of a window, and its part before a patch.

    Args:
        step: px of the level for a px of the result.
        n_px: Side of the result.

    Returns:
        (side, margin), px of the level.
    """
    margin = math.ceil(LANCZOS_SUPPORT * max(1.0, step))
    # One more: a patch may begin anywhere between two px.
    return math.ceil(step * n_px - 1e-6) + 1 + 2 * margin, margin


def axis_window(read: AxisRead, side: int, margin: int) -> AxisWindow:
    """Place a window around what `Slide.plan_read` plans on one axis."""
    first = read.start + read.box[0]
    start = math.floor(first) - margin
    low, high = max(read.start - start, 0), min(read.stop - start, side)
    stored_high = min(max(read.read_stop - start, low), side)
    return AxisWindow(
        read=read,
        start=start,
        side=side,
        # Without the last digits, which depend on the place, equal fractions are equal.
        first=round(first - start, 6),
        last=round(read.start + read.box[1] - start, 6),
        low=low,
        high=high,
        stored_low=min(max(read.read_start - start, low), stored_high),
        stored_high=stored_high,
    )


def fill_from_slide(
    window: np.ndarray, slide: Slide, level: int, across: AxisWindow, down: AxisWindow
) -> None:
    """Fill a window with OpenSlide's pixels.

    Args:
        window: (down.side, across.side, 3) uint8, written to.
        slide: Open.
        level: That the window is of.
        across: Columns.
        down: Rows.

    Raises:
        SlideReadError: OpenSlide could not decode it.
    """
    canvas = slide.read_canvas(level, across.read, down.read)
    top, left = down.start - down.read.start, across.start - across.read.start
    window[down.low : down.high, across.low : across.high] = canvas[
        top + down.low : top + down.high, left + across.low : left + across.high
    ]


def resample_windows(
    windows: np.ndarray, across: list[AxisWindow], down: list[AxisWindow], n_px: int
) -> np.ndarray:
    """Patches of windows by Pillow, as `Slide.read_region` gives them.

    The places of boxes are float32 in Pillow, so that a value in thousands may be rounded the other
    way.

    Args:
        windows: (B, side, side, 3) uint8.
        across: Columns of each.
        down: Rows of each.
        n_px: Side of a patch.

    Returns:
        (B, n_px, n_px, 3) uint8.
    """
    patches = np.empty((len(windows), n_px, n_px, 3), np.uint8)
    for patch, window, x, y in zip(patches, windows, across, down, strict=True):
        seen = window[y.low : y.high, x.low : x.high]
        box = (x.first - x.low, y.first - y.low, x.last - x.low, y.last - y.low)
        patch[...] = resample(seen, (n_px, n_px), box)
    return patches

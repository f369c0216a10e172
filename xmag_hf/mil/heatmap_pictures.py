"""Pictures of attention: overlay on the slide's overview, and the patches that got most of it.

Drawn on Agg canvases of their own, without pyplot, so nothing global is set or left open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from xmag_hf.reporting.pictures import png
from xmag_hf.reporting.scale_bar import scale_bar

DPI = 100
# A picture of tissue hardly shrinks beyond this, and takes three times as long to try.
COMPRESSION = 3
OPACITY = 0.5
COLOURS = "viridis"  # even steps, and told apart by colour-blind readers
UPPER_PERCENTILE = 99.0  # the brightest colour: one outlier must not turn the rest dark
_BAR_INCHES = 1.5
_HEAD_INCHES = 0.85
_FOOT_INCHES = 0.15
_PATCHES_PER_ROW = 5


@dataclass(frozen=True, eq=False)
class ColourScale:
    """Values to colours.

    Attributes:
        label: Beside the colour bar.
        low: Value of the darkest colour.
        high: Value of the brightest; above it the colour stays.
        cut: Whether values above `high` occur.
    """

    label: str
    low: float
    high: float
    cut: bool

    @property
    def colours(self) -> Colormap:
        """The colour map."""
        return colormaps[COLOURS]

    def rgb(self, values: np.ndarray) -> np.ndarray:
        """(..., 3) uint8 colours of values."""
        return self.colours(self.norm(values), bytes=True)[..., :3]

    def norm(self, values: np.ndarray) -> np.ndarray:
        """Values as shares of the scale, cut to 0..1."""
        return np.asarray(Normalize(self.low, self.high, clip=True)(values))


def colour_scale(values: np.ndarray, label: str) -> ColourScale:
    """A scale from 0 to the 99th percentile of the values (the largest of fewer than 100)."""
    high = float(np.percentile(values, UPPER_PERCENTILE, method="higher"))
    # More than 99% without attention: the largest is all there is to see.
    high = high if high > 0 else float(values.max())
    return ColourScale(label, 0.0, high, bool(values.max() > high * (1 + 1e-9)))


def pixel_means(
    coords: np.ndarray,
    width_level0: float,
    values: np.ndarray,
    pixel_level0: float,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the patches on each pixel of a picture, weighted by the area each has in it.

    A pixel that lies in four overlapping patches gets the mean of the four; one on the border of
    two gets both by their shares.

    Args:
        coords: (M, 2) top-left corners (x, y), level-0 px.
        width_level0: Side of a patch, level-0 px.
        values: (M,).
        pixel_level0: Width of a pixel of the picture, level-0 px.
        shape: (height, width) of the picture.

    Returns:
        (H, W) float64 means, NaN where no patch is, and (H, W) float64 covered area of the pixels
        in 0..1 (patches that overlap count once where they fill the pixel).
    """
    total, weight = np.zeros(shape), np.zeros(shape)
    starts = np.asarray(coords, dtype=np.float64) / pixel_level0
    side = width_level0 / pixel_level0
    for (x, y), value in zip(starts, values, strict=True):
        left, across = _shares(x, x + side, shape[1])
        top, down = _shares(y, y + side, shape[0])
        place = np.s_[top : top + len(down), left : left + len(across)]
        area = down[:, None] * across
        total[place] += area * value
        weight[place] += area
    means = np.divide(total, weight, out=np.full(shape, np.nan), where=weight > 1e-9)
    return means, np.minimum(weight, 1.0)


def _shares(start: float, end: float, n_px: int) -> tuple[int, np.ndarray]:
    """First pixel that [start, end) touches, and how much of each pixel it fills."""
    first, last = max(0, math.floor(start)), min(n_px, math.ceil(end))
    edges = np.arange(first, max(first, last) + 1)
    return first, np.diff(np.clip(edges, start, end)) if last > first else np.zeros(0)


def draw_overlay(
    picture: np.ndarray,
    means: np.ndarray,
    covered: np.ndarray,
    scale: ColourScale,
    *,
    pixel_um: float,
    title: str,
    boxes: np.ndarray | None = None,
    about: dict[str, str] | None = None,
) -> bytes:
    """The overview with attention over it, a colour bar and a scale bar.

    Args:
        picture: (H, W, 3) uint8 overview.
        means: (H, W) values, NaN where no patch is.
        covered: (H, W) 0..1, opacity of the colours there.
        scale: Values to colours.
        pixel_um: um per pixel of the picture.
        title: Above it; lines are kept.
        boxes: (k, 4) x, y, width, height in pixels of the picture: outlined and numbered.
        about: Goes into the PNG's text chunks.

    Returns:
        A PNG file; a pixel of the overview is a pixel of it.
    """
    height, width = picture.shape[:2]
    shown = OPACITY * covered[..., None]
    colours = scale.rgb(np.nan_to_num(means))
    blended = np.where(np.isnan(means)[..., None], picture, picture * (1 - shown) + colours * shown)
    inches = width / DPI, height / DPI
    total = inches[0] + _BAR_INCHES + 0.15, inches[1] + _HEAD_INCHES + _FOOT_INCHES
    figure = Figure(total, dpi=DPI)
    frame = (0.15, _FOOT_INCHES, *inches)
    axis = figure.add_axes(_share_of(frame, total))
    axis.imshow(np.rint(blended).astype(np.uint8), interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for number, (x, y, w, h) in enumerate(boxes if boxes is not None else (), 1):
        axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="black", linewidth=1.6))
        axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=0.7))
        axis.annotate(
            str(number), (x, y), (2, -2), textcoords="offset points", va="top", fontsize=7,
            color="white", bbox={"facecolor": "black", "pad": 0.8, "linewidth": 0},
        )  # fmt: skip
    _scale_bar(axis, width, height, pixel_um)
    tall = min(inches[1], 6.0)
    bar = (0.15 + inches[0] + 0.2, _FOOT_INCHES + inches[1] - tall, 0.25, tall)
    mappable = ScalarMappable(Normalize(scale.low, scale.high), scale.colours)
    figure.colorbar(
        mappable,
        cax=figure.add_axes(_share_of(bar, total)),
        label=scale.label,
        extend="max" if scale.cut else "neither",
    )
    figure.text(0.15 / total[0], 1 - 0.1 / total[1], title, va="top", fontsize=10)
    return png(figure, about, COMPRESSION)


def draw_contact_sheet(
    patches: Sequence[np.ndarray],
    captions: Sequence[str],
    colours: np.ndarray,
    *,
    patch_um: float,
    title: str,
    about: dict[str, str] | None = None,
) -> bytes:
    """Patches in reading order, each framed in its colour of the overlay.

    Args:
        patches: (S, S, 3) uint8 each, all of one size.
        captions: One each.
        colours: (k, 3) uint8.
        patch_um: Side of a patch, um: for the scale bar on the first.
        title: Above them.
        about: Goes into the PNG's text chunks.

    Returns:
        A PNG file.
    """
    columns = min(_PATCHES_PER_ROW, len(patches))
    rows = -(-len(patches) // columns)
    figure = Figure((2.4 * columns, 2.75 * rows + 0.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (axis, patch) in enumerate(zip(axes, patches, strict=False)):
        axis.imshow(patch)
        axis.set_title(captions[number], fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=colours[number] / 255, linewidth=3)
    for axis in axes[len(patches) :]:
        axis.set_axis_off()
    side = patches[0].shape[0]
    _scale_bar(axes[0], side, side, patch_um / side)
    figure.suptitle(title, fontsize=10)
    return png(figure, about, COMPRESSION)


def _scale_bar(axis, width: int, height: int, pixel_um: float) -> None:
    bar = scale_bar(width, height, pixel_um)
    shape = Rectangle((bar.left, bar.top), bar.length, bar.thickness)
    shape.set(facecolor="black", edgecolor="white", linewidth=0.6)
    axis.add_patch(shape)
    axis.annotate(
        bar.text, (bar.left + bar.length / 2, bar.top), (0, 3), textcoords="offset points",
        ha="center", va="bottom", fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.75, "pad": 1, "linewidth": 0},
    )  # fmt: skip


def _share_of(
    box: tuple[float, float, float, float], total: tuple[float, float]
) -> tuple[float, float, float, float]:
    return box[0] / total[0], box[1] / total[1], box[2] / total[0], box[3] / total[1]

"""Tissue mask of a slide from a small picture of it, and the tissue share of regions.

The rule is the field's: Otsu's threshold (Otsu 1979, doi 10.1109/TSMC.1979.4310076) on colour
saturation, between a floor (a blank slide is all noise, and Otsu would cut the noise in half) and
a ceiling (on a slide full of tissue it would cut pale stroma off dark epithelium). What is
coloured but no tissue (pen ink, by hue) and what is dark but uncoloured (borders, black pen) is
taken out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .reader import Slide

METHOD = "saturation-otsu-1"  # recorded with every output: a change of the rule changes it
MASK_MPP = 8.0  # um/px of the mask: a 448 um region is 56 px wide
BLUR_UM = 8.0  # sigma; removes scanner and JPEG noise, keeps strands of stroma
SATURATION_FLOOR = 0.04
SATURATION_CEILING = 0.07
GLASS_VALUE = 0.80  # at least this bright (max channel / 255) to count as glass
GLASS_SATURATION = 0.06  # at most: a tinted lamp, not pale tissue
MIN_OBJECT_UM2 = 10_000.0  # 100 um x 100 um: dust and cell debris are smaller
MAX_HOLE_UM2 = 60_000.0  # fat cells, lumens and tears up to about 280 um across are filled
CLOSING_UM = 24.0  # joins the membranes between fat cells
INK_HALO_UM = 40.0  # a pen line fades at its edge
MIN_INK_UM2 = 20_000.0
DARK_VALUE = 0.35  # black border and black ink; stained nuclei at 8 um/px stay above


@dataclass(frozen=True)
class TissueMask:
    """Where a slide has tissue.

    Attributes:
        mask: (H, W) bool over the whole slide.
        pixel_level0: Width of a mask pixel in level-0 px.
        mpp: um per mask pixel.
        threshold: The saturation (0 to 1) used.
        gaps: (H, W) bool, where the slide could not be decoded; no tissue in `mask`.
        method: Name of the rule.
    """

    mask: np.ndarray
    pixel_level0: float
    mpp: float
    threshold: float
    gaps: np.ndarray
    method: str = METHOD

    def fractions(
        self, xy_level0: np.ndarray, width_level0: float, *, with_gaps: bool = False
    ) -> np.ndarray:
        """Share of each square region that is tissue.

        By an integral image, interpolated, so that regions need not fall on mask pixels; what
        lies outside the slide counts as no tissue.

        Args:
            xy_level0: (N, 2) top-left corners (x, y), level-0 px.
            width_level0: Side of the regions, level-0 px.
            with_gaps: Count what could not be decoded as tissue, which it may be.

        Returns:
            (N,) float64 in 0 to 1.
        """
        mask = self.mask | self.gaps if with_gaps else self.mask
        xy = np.asarray(xy_level0, dtype=np.float64).reshape(-1, 2) / self.pixel_level0
        side = width_level0 / self.pixel_level0
        integral = np.pad(mask.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        left, top = xy.T

        def up_to(y: np.ndarray, x: np.ndarray) -> np.ndarray:
            """Tissue px in [0, y) x [0, x): exact, as the integral is bilinear within a pixel."""
            return ndimage.map_coordinates(integral, [y, x], order=1, mode="nearest")

        inside = up_to(top + side, left + side) - up_to(top, left + side)
        inside -= up_to(top + side, left) - up_to(top, left)
        return np.clip(inside / side**2, 0.0, 1.0)


def find_tissue(slide: Slide, mpp: float = MASK_MPP) -> TissueMask:
    """Tissue mask of a slide.

    Args:
        slide: Open slide.
        mpp: um per mask pixel.

    Returns:
        The mask over the whole slide, and where it could not be decoded.
    """
    picture, gaps, used = slide.thumbnail_with_gaps(mpp)
    mask, threshold = tissue_mask(picture, used)
    return TissueMask(mask & ~gaps, used / slide.mpp0, used, threshold, gaps)


def tissue_mask(rgb: np.ndarray, mpp: float) -> tuple[np.ndarray, float]:
    """Tissue in an RGB picture.

    Args:
        rgb: (H, W, 3) uint8.
        mpp: um/px of the picture.

    Returns:
        (H, W) bool, and the saturation threshold (0 to 1) used.
    """
    sigma = BLUR_UM / mpp
    colour = ndimage.gaussian_filter(rgb.astype(np.float32) / 255, (sigma, sigma, 0))
    colour = _on_white_glass(colour)
    saturation, value = _saturation_value(colour)
    dark = _dark(colour)
    ink = _ink(colour, dark, mpp)
    usable = ~(dark | ink)
    threshold = otsu(saturation[usable]) if usable.any() else SATURATION_CEILING
    threshold = float(np.clip(threshold, SATURATION_FLOOR, SATURATION_CEILING))
    mask = (saturation > threshold) & usable
    mask = _disk_op(ndimage.binary_closing, mask, CLOSING_UM / mpp)
    mask = _without_small(mask, MIN_OBJECT_UM2 / mpp**2)
    mask = ~_without_small(~mask, MAX_HOLE_UM2 / mpp**2)
    return mask & usable, threshold


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Otsu's threshold: the cut of the histogram with the largest variance between the halves.

    Args:
        values: Any shape, 0 to 1.
        bins: Number of equal bins over 0 to 1.

    Returns:
        Upper edge of the lower half's last bin; the only value's bin if all are equal.
    """
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    weight = counts / max(1, counts.sum())
    below = np.cumsum(weight)
    mean_below = np.cumsum(weight * centres)
    above = 1 - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean_below[-1] * below - mean_below) ** 2 / (below * above)
    return float(edges[1:][np.argmax(np.nan_to_num(between, nan=-1.0, posinf=-1.0))])


def _saturation_value(colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HSV saturation and value, each (H, W) in 0 to 1."""
    value = colour.max(axis=2)
    return (value - colour.min(axis=2)) / np.maximum(value, 1e-3), value


def _on_white_glass(colour: np.ndarray) -> np.ndarray:
    """The picture divided by the colour of its glass, if it shows any.

    Some scanners give grey, yellowish or pinkish glass, which has saturation of its own.
    """
    saturation, value = _saturation_value(colour)
    glass = (saturation < GLASS_SATURATION) & (value > GLASS_VALUE)
    if glass.mean() < 0.01:
        return colour
    # The brighter half: glass, not the palest tissue beside it.
    bright = glass & (value >= np.median(value[glass]))
    return np.minimum(colour / np.median(colour[bright], axis=0), 1.0)


def _dark(colour: np.ndarray) -> np.ndarray:
    """Black: dark, and without the colour that the darkest stain keeps."""
    value = colour.max(axis=2)
    chroma = value - colour.min(axis=2)
    return (value < DARK_VALUE) & (chroma < 0.12) | (value < DARK_VALUE / 2)


def _ink(colour: np.ndarray, dark: np.ndarray, mpp: float) -> np.ndarray:
    """Pen ink: hues that haematoxylin and eosin do not make, in strokes of some size.

    Stained tissue runs from blue-violet over purple to pink, so green is its lowest channel.
    Green and blue ink have green above red; red ink has blue as low as green and hardly any of
    either. A stroke is grown into its weaker edge; black ink is `dark`, and its halo goes with it.
    """
    red, green, blue = np.moveaxis(colour, 2, 0)
    saturation, _ = _saturation_value(colour)
    blue_or_green = (green - red > 0.06) & (saturation > 0.20)
    deep_blue = (blue - red > 0.30) & (red - green < 0.06)
    red_ink = (red > 0.5) & (saturation > 0.70) & (blue - green < 0.08)
    strong = _without_small(blue_or_green | deep_blue | red_ink, MIN_INK_UM2 / mpp**2)
    weak = strong | ((green > red + 0.01) & (saturation > 0.04))
    ink = ndimage.binary_propagation(strong, mask=weak)
    ink |= _without_small(dark, MIN_INK_UM2 / mpp**2)
    return _disk_op(ndimage.binary_dilation, ink, INK_HALO_UM / mpp)


def _disk_op(operation, mask: np.ndarray, radius_px: float) -> np.ndarray:  # noqa: ANN001
    """A binary morphology with a disk, away from the picture's border."""
    reach = max(1, round(radius_px))
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disk = x * x + y * y <= reach * reach + 1e-6
    padded = np.pad(mask, reach, mode="edge")
    return operation(padded, structure=disk)[reach:-reach, reach:-reach]


def _without_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    """The mask without 8-connected parts of fewer than `min_px` pixels."""
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= min_px)[labels]

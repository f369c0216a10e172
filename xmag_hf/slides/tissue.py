"""Tissue mask of a slide from a small picture of it, and the tissue share of regions.

The rule is the field's: Otsu's threshold (Otsu 1979, doi 10.1109/TSMC.1979.4310076) on colour
saturation, between a floor (a blank slide is all noise, and Otsu would cut the noise in half) and
a ceiling (on a slide full of tissue it would cut pale stroma off dark epithelium). What is
coloured but no tissue (pen ink, by hue) and what is dark but uncoloured (borders, black pen) is
taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
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
OTSU_BINS = 256
STRIP_PX = 1 << 20  # pixels looked at at once
GLASS_SAMPLE_PX = 1_000_000
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
        # Four bytes a pixel count 2,000,000,000 of them: more than any slide has at 8 um.
        integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
        inner = integral[1:, 1:]
        np.cumsum(mask, axis=0, out=inner)
        np.cumsum(inner, axis=1, out=inner)
        left, top = xy.T

        def up_to(y: np.ndarray, x: np.ndarray) -> np.ndarray:
            """Tissue px in [0, y) x [0, x): exact, as the integral is bilinear within a pixel."""
            at = (y, x)
            return ndimage.map_coordinates(integral, at, np.float64, order=1, mode="nearest")

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
    maps = _Maps.of(rgb, BLUR_UM / mpp)
    ink = _ink(maps, mpp)
    usable = ~(maps.dark | ink)
    del ink
    threshold = SATURATION_CEILING
    if usable.any():
        parts = [
            np.histogram(maps.saturation[rows][usable[rows]], OTSU_BINS, (0.0, 1.0))[0]
            for rows in _strips(usable.shape)
        ]
        threshold = otsu(np.sum(parts, axis=0), np.linspace(0.0, 1.0, OTSU_BINS + 1))
    threshold = float(np.clip(threshold, SATURATION_FLOOR, SATURATION_CEILING))
    mask = (maps.saturation > threshold) & usable
    del maps
    mask = _disk_op(ndimage.binary_closing, mask, CLOSING_UM / mpp)
    mask = _without_small(mask, MIN_OBJECT_UM2 / mpp**2)
    mask = ~_without_small(~mask, MAX_HOLE_UM2 / mpp**2)
    return mask & usable, threshold


def otsu(counts: np.ndarray, edges: np.ndarray) -> float:
    """Otsu's threshold: the cut of a histogram with the largest variance between the halves.

    Args:
        counts: (n,) of the bins.
        edges: (n + 1,) between them.

    Returns:
        Upper edge of the lower half's last bin; edges[1] if all lie in one bin.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    weight = counts / max(1, counts.sum())
    below = np.cumsum(weight)
    mean_below = np.cumsum(weight * centres)
    above = 1 - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean_below[-1] * below - mean_below) ** 2 / (below * above)
    return float(edges[1:][np.argmax(np.nan_to_num(between, nan=-1.0, posinf=-1.0))])


@dataclass(frozen=True, eq=False)
class _Maps:
    """What the rule needs to know of each pixel, all (H, W).

    Attributes:
        saturation: float32, HSV's, 0 to 1.
        dark: bool. Black: dark, and without the colour that the darkest stain keeps.
        strong_ink: bool. Hues of pen ink.
        weak_ink: bool. What fades out of a stroke.
    """

    saturation: np.ndarray
    dark: np.ndarray
    strong_ink: np.ndarray
    weak_ink: np.ndarray

    @classmethod
    def of(cls, rgb: np.ndarray, sigma: float) -> _Maps:
        """Blurred and judged strip by strip: the float copies of a whole slide are large."""
        shape = rgb.shape[:2]
        maps = cls(np.empty(shape, np.float32), *(np.empty(shape, bool) for _ in range(3)))
        glass = _glass_colour(rgb, sigma)
        for rows in _strips(shape):
            planes = _blurred(rgb, rows, sigma)
            if glass is not None:
                planes = [np.minimum(p / g, 1.0) for p, g in zip(planes, glass, strict=True)]
            maps._judge(rows, planes)
        return maps

    def _judge(self, rows: slice, planes: Sequence[np.ndarray]) -> None:
        """Stained tissue runs from blue-violet over purple to pink: green is its lowest channel.

        Green and blue ink have green above red; red ink has blue as low as green and hardly any of
        either.
        """
        red, green, blue = planes
        saturation, value, chroma = _saturation_value(planes)
        self.saturation[rows] = saturation
        self.dark[rows] = (value < DARK_VALUE) & (chroma < 0.12) | (value < DARK_VALUE / 2)
        blue_or_green = (green - red > 0.06) & (saturation > 0.20)
        deep_blue = (blue - red > 0.30) & (red - green < 0.06)
        red_ink = (red > 0.5) & (saturation > 0.70) & (blue - green < 0.08)
        self.strong_ink[rows] = blue_or_green | deep_blue | red_ink
        self.weak_ink[rows] = (green > red + 0.01) & (saturation > 0.04)


def _saturation_value(
    planes: Sequence[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HSV saturation and value, and chroma (largest minus least channel), each in 0 to 1."""
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    return chroma / np.maximum(value, 1e-3), value, chroma


def _glass_colour(rgb: np.ndarray, sigma: float) -> np.ndarray | None:
    """(3,) colour of a slide's glass, None if it shows hardly any.

    Some scanners give grey, yellowish or pinkish glass, which has saturation of its own. Of a
    large picture a regular sample of the pixels is looked at.
    """
    step = max(1, round((rgb.shape[0] * rgb.shape[1] / GLASS_SAMPLE_PX) ** 0.5))
    parts = []
    for rows in _strips(rgb.shape[:2], step):
        parts.append([plane[::step, ::step].ravel() for plane in _blurred(rgb, rows, sigma)])
    planes = [np.concatenate(part) for part in zip(*parts, strict=True)]
    saturation, value, _ = _saturation_value(planes)
    glass = (saturation < GLASS_SATURATION) & (value > GLASS_VALUE)
    if glass.mean() < 0.01:
        return None
    # The brighter half: glass, not the palest tissue beside it.
    bright = glass & (value >= np.median(value[glass]))
    return np.array([np.median(plane[bright]) for plane in planes])


def _blurred(rgb: np.ndarray, rows: slice, sigma: float) -> list[np.ndarray]:
    """Red, green and blue of some rows, blurred, float32 in 0 to 1."""
    reach = int(4 * sigma + 0.5)  # where SciPy cuts the kernel off
    top, bottom = max(0, rows.start - reach), min(rgb.shape[0], rows.stop + reach)
    inner = slice(rows.start - top, rows.stop - top)
    return [
        ndimage.gaussian_filter(rgb[top:bottom, :, channel].astype(np.float32) / 255, sigma)[inner]
        for channel in range(3)
    ]


def _strips(shape: tuple[int, ...], multiple: int = 1) -> list[slice]:
    """The rows of a picture in strips of about `STRIP_PX` pixels, starting at a multiple."""
    step = max(1, STRIP_PX // shape[1] // multiple) * multiple
    return [slice(top, min(top + step, shape[0])) for top in range(0, shape[0], step)]


def _ink(maps: _Maps, mpp: float) -> np.ndarray:
    """Pen ink: hues that haematoxylin and eosin do not make, in strokes of some size.

    A stroke is grown into its weaker edge; black ink is `dark`, and its halo goes with it.
    """
    strong = _without_small(maps.strong_ink, MIN_INK_UM2 / mpp**2)
    ink = ndimage.binary_propagation(strong, mask=strong | maps.weak_ink)
    ink |= _without_small(maps.dark, MIN_INK_UM2 / mpp**2)
    if not ink.any():
        return ink
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
    if not mask.any():
        return mask
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    # By strips: NumPy counts and looks up in eight bytes a pixel.
    sizes = np.zeros(int(labels.max()) + 1, np.int64)
    for rows in _strips(mask.shape):
        part = np.bincount(labels[rows].ravel())
        sizes[: len(part)] += part
    sizes[0] = 0
    large = sizes >= min_px
    kept = np.empty(mask.shape, bool)
    for rows in _strips(mask.shape):
        kept[rows] = large[labels[rows]]
    return kept

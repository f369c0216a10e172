"""Slide reading: open a file, report levels and um/px, return RGB regions at any um/px.

May import NumPy, Pillow, SciPy, OpenSlide and tifffile. Imports nothing of xmag_hf and no torch.

Coordinates are level-0 pixels, origin top left, (x, y); arrays are (height, width, 3) uint8 RGB.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import openslide
from PIL import Image
from scipy.signal import lfilter

from .errors import SlideOpenError, SlideReadError, SlideScaleError
from .scale import number, resolve_mpp
from .tiff import TiffHandle, check_tiles, count_images, is_ome, is_tiff, open_tiff

# Largest glass is about 100 mm x 150 mm. A header that says more is damaged (or its um/px wrong),
# and an overview of it might take all memory there is.
MAX_AREA_MM2 = 20_000.0
MAX_ENLARGEMENT = 0.10  # level 0 may be coarser than the target by this share
# A level whose um/px exceeds the target by less than this counts as "at" the target: headers give
# four digits (0.2501 for 0.25), and an enlargement by a thousandth is no invented detail.
SCALE_TOLERANCE = 1e-3
LANCZOS_SUPPORT = 3
# OpenSlide blends neighbouring pixels when a read starts between them. Fractions below this many
# pixels of the level change no 8-bit value by more than half a grey level.
BLEND_TOLERANCE = 1 / 512
BLEND_MARGIN_PX = 8  # undoing a blend by a quarter pixel forgets its start at 1/3 a pixel: 3**-8
HEAD_BYTES = 1 << 20
# Decoded tiles kept for the neighbours of a region: a row of 896 px regions of a 40x slide 10,000
# px wide. OpenSlide's own 32 MB make it decode every tile again for the next row.
CACHE_BYTES = 128_000_000
THUMBNAIL_BLOCK_PX = 2048  # side of the largest read (pixels of the level) behind a thumbnail
THUMBNAIL_LEAST_BLOCK_PX = 16  # blocks around damage are not cut smaller than this
# Nor at all after this many: each costs another opening of the file, and a slide without any
# readable tile would take hours.
THUMBNAIL_MOST_FAILURES = 400
logger = logging.getLogger(__name__)
PLAIN_TIFF = "generic-tiff"  # OpenSlide's name for a TIFF of no vendor


class Slide:
    """An open slide. Make it with `open_slide`; use it as a context manager.

    Not for sharing between processes: open the slide in each.

    Attributes:
        path: The file.
        slide_id: File stem unless the caller said otherwise.
        vendor: OpenSlide's name of the format, or `tifffile`.
        objective: Power as the file says it, '' if it does not.
        mpp0: um per pixel of level 0 (mean of x and y).
        mpp_source: `given`, `ome` (OME-XML's PhysicalSize), `openslide` (its mpp-x, mpp-y) or
            `tiff` (resolution tags).
        size_level0: (width, height) of level 0, px.
        level_sizes: (width, height) of each level, px.
        level_mpps: um/px of each level.
        level_scales: Level-0 px per px of each level, (x, y).
        origin_xy: Where the scanned area starts, level-0 px; (0, 0) unless the file has
            openslide.bounds-x and -y.
        extent_xy: Where it ends (exclusive), level-0 px; the slide's size unless bounds say less.
    """

    def __init__(
        self,
        path: Path,
        handle: openslide.OpenSlide | TiffHandle,
        slide_id: str,
        mpp: float | None,
    ):
        self.path = path
        self.slide_id = slide_id
        self._handle: openslide.OpenSlide | TiffHandle | None = handle
        # Of a damaged file OpenSlide may list a property that it cannot give.
        found = {name: handle.properties.get(name) for name in handle.properties}
        properties = {name: value for name, value in found.items() if value is not None}
        self.vendor = properties.get("openslide.vendor", "")
        self.objective = properties.get("openslide.objective-power", "")
        self.size_level0: tuple[int, int] = handle.dimensions
        self.mpp0, self.mpp_source = resolve_mpp(slide_id, properties, self.size_level0, mpp)
        self._check_area()
        self.level_sizes: tuple[tuple[int, int], ...] = handle.level_dimensions
        self._openslide_downsamples: tuple[float, ...] = handle.level_downsamples
        self.level_scales = [_level_scale(self.size_level0, size) for size in self.level_sizes]
        self.level_mpps = tuple(self.mpp0 * (sx + sy) / 2 for sx, sy in self.level_scales)
        self.origin_xy, self.extent_xy = _bounds(properties, self.size_level0)

    def _check_area(self) -> None:
        width, height = (n * self.mpp0 / 1000 for n in self.size_level0)
        if not 0 < width * height <= MAX_AREA_MM2:
            raise SlideScaleError(
                f"{self.slide_id}: {self.size_level0[0]} x {self.size_level0[1]} px of "
                f"{self.mpp0:g} um are {width:,.4g} x {height:,.4g} mm, which no glass has. Give "
                "the right um/px (--slide-mpp, or an mpp column in the slide CSV), or copy the "
                "file again."
            )

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file. Closing twice is harmless."""
        if self._handle is not None:
            self._handle.close()
        self._handle = None

    def level_for(self, mpp: float, *, allow_coarse: bool = False) -> int:
        """The coarsest level that is at or finer than `mpp`, or level 0 if that is coarser.

        Args:
            mpp: Target, um/px.
            allow_coarse: Take level 0 however coarse it is.

        Returns:
            Level number.

        Raises:
            SlideScaleError: `mpp` is no positive number, or level 0 is more than 10% coarser.
        """
        if not (math.isfinite(mpp) and mpp > 0):
            raise SlideScaleError(f"{self.slide_id}: target mpp={mpp}; it must be above 0 um/px.")
        fine = [i for i, m in enumerate(self.level_mpps) if m <= mpp * (1 + SCALE_TOLERANCE)]
        if fine:
            return max(fine, key=lambda i: self.level_mpps[i])
        if self.mpp0 > mpp * (1 + MAX_ENLARGEMENT) and not allow_coarse:
            raise SlideScaleError(
                f"{self.slide_id}: level 0 has {self.mpp0:.4f} um/px, more than "
                f"{MAX_ENLARGEMENT:.0%} coarser than the {mpp:g} um/px asked for, so its detail "
                "would be invented. Use a finer scan, or allow it (--allow-coarse, "
                "allow_coarse=True)."
            )
        return 0

    def read_region(
        self,
        xy_level0: tuple[float, float],
        size_px: int | tuple[int, int],
        mpp: float,
        *,
        allow_coarse: bool = False,
    ) -> np.ndarray:
        """Pixels of a region at exactly `mpp`, by the resampling contract.

        Read from the coarsest level at or finer than `mpp` and reduced with a Lanczos-3 kernel
        stretched by the scale factor (Pillow's LANCZOS, two-dimensional and separable), with the
        real neighbours of the region inside the kernel's reach. Transparent pixels and everything
        past the slide's edge are white.

        Args:
            xy_level0: Top-left corner (x, y), level-0 px; need not be whole.
            size_px: Side, or (width, height), in px at `mpp`.
            mpp: um/px of the result.
            allow_coarse: Enlarge level 0 by more than 10% if need be.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            SlideScaleError: See `level_for`.
            SlideReadError: OpenSlide could not decode it. The slide stays usable.
            ValueError: A size below 1 px or a position that is no number.
        """
        width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
        level, across, down = self.plan_read(xy_level0, size_px, mpp, allow_coarse=allow_coarse)
        pixels = self.read_canvas(level, across, down)
        box = (across.box[0], down.box[0], across.box[1], down.box[1])
        return resample(pixels, (width, height), box)

    def plan_read(
        self,
        xy_level0: tuple[float, float],
        size_px: int | tuple[int, int],
        mpp: float,
        *,
        allow_coarse: bool = False,
    ) -> tuple[int, AxisRead, AxisRead]:
        """Which stored pixels `read_region` resamples, without reading them.

        Args:
            xy_level0: See `read_region`, as the others.
            size_px: Of the result.
            mpp: Of the result.
            allow_coarse: Enlarge level 0 by more than 10% if need be.

        Returns:
            The level, and its pixels across and down.

        Raises:
            SlideScaleError: See `level_for`.
            ValueError: A size below 1 px or a position that is no number.
        """
        width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
        x, y = (float(v) for v in xy_level0)
        if width < 1 or height < 1 or not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(
                f"{self.slide_id}: region at ({x}, {y}) of {width} x {height} px; give finite "
                "coordinates and a size of at least 1 px."
            )
        level = self.level_for(mpp, allow_coarse=allow_coarse)
        step = mpp / self.mpp0  # level-0 px per px of the result
        across, down = (
            AxisRead.plan(start / scale, (start + n * step) / scale, n, level_px, size0 / scale)
            for start, n, scale, level_px, size0 in zip(
                (x, y),
                (width, height),
                self.level_scales[level],
                self.level_sizes[level],
                self.size_level0,
                strict=True,
            )
        )
        return level, across, down

    def thumbnail(self, mpp: float) -> tuple[np.ndarray, float]:
        """The whole slide at about `mpp`, read in blocks, so that memory stays small.

        Args:
            mpp: Wanted um/px; a slide coarser than that is given at its own scale.

        Returns:
            (H, W, 3) uint8 RGB with H, W = ceil(size_level0 * mpp0 / mpp), and the um/px used.

        Raises:
            SlideReadError: A block could not be decoded.
        """
        picture, _, used = self._thumbnail(mpp, skip_unreadable=False)
        return picture, used

    def thumbnail_with_gaps(self, mpp: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Like `thumbnail`, but what cannot be decoded is white instead of an error.

        Args:
            mpp: See `thumbnail`.

        Returns:
            (H, W, 3) uint8 RGB, (H, W) bool where nothing could be decoded, and the um/px used.
        """
        return self._thumbnail(mpp, skip_unreadable=True)

    def _thumbnail(
        self, mpp: float, *, skip_unreadable: bool
    ) -> tuple[np.ndarray, np.ndarray, float]:
        mpp = max(mpp, self.mpp0)
        step = mpp / self.mpp0
        width, height = (math.ceil(n / step) for n in self.size_level0)
        reduction = mpp / self.level_mpps[self.level_for(mpp)]
        side = max(16, int(THUMBNAIL_BLOCK_PX / reduction))
        out = np.full((height, width, 3), 255, np.uint8)
        gaps = np.zeros((height, width), dtype=bool)
        blocks = [
            (left, top, min(left + side, width), min(top + side, height))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
        failures = 0
        while blocks:
            left, top, right, bottom = blocks.pop()
            try:
                pixels = self.read_region(
                    (left * step, top * step), (right - left, bottom - top), mpp
                )
            except SlideReadError:
                if not skip_unreadable:
                    raise
                failures += 1
                # One bad tile must not hide its readable neighbours.
                large = min(right - left, bottom - top) > THUMBNAIL_LEAST_BLOCK_PX
                if large and failures < THUMBNAIL_MOST_FAILURES:
                    blocks += _quarters(left, top, right, bottom)
                else:
                    gaps[top:bottom, left:right] = True
                continue
            out[top:bottom, left:right] = pixels
        return out, gaps, mpp

    def read_canvas(self, level: int, across: AxisRead, down: AxisRead) -> np.ndarray:
        """What the kernel may see: the slide's pixels, white where the region leaves the slide.

        Args:
            level: Number of a level.
            across: Columns, from `plan_read`.
            down: Rows, likewise.

        Returns:
            (down.stop - down.start, across.stop - across.start, 3) uint8 RGB.

        Raises:
            SlideReadError: OpenSlide could not decode it. The slide stays usable.
        """
        canvas = np.full((down.stop - down.start, across.stop - across.start, 3), 255, np.uint8)
        if across.read_stop <= across.read_start or down.read_stop <= down.read_start:
            return canvas
        pixels = self.read_stored(
            level, (across.read_start, down.read_start), (across.read_stop, down.read_stop)
        )
        pad = (down.edge_px, across.edge_px)
        if any(pad):
            pixels = np.pad(pixels, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
        top, left = down.read_start - down.start, across.read_start - across.start
        canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return canvas

    def read_stored(self, level: int, start: tuple[int, int], stop: tuple[int, int]) -> np.ndarray:
        """Stored pixels of a level, on white, without OpenSlide's blending.

        Args:
            level: Its number.
            start: First (x, y), px of the level, inside it.
            stop: One past the last.

        Returns:
            (stop_y - start_y, stop_x - start_x, 3) uint8 RGB.

        Raises:
            SlideReadError: OpenSlide could not decode it. The slide stays usable.
        """
        downsample = self._openslide_downsamples[level]
        # OpenSlide takes whole level-0 pixels and divides them by a downsample that is the mean of
        # x and y, so the start of a read can fall between two pixels of the level.
        location = [round(v * downsample) for v in start]
        shift = [at / downsample - v for at, v in zip(location, start, strict=True)]
        size = (stop[0] - start[0], stop[1] - start[1])
        pixels = self._read_rgb(level, (location[0], location[1]), size)
        for axis, fraction, end, level_px in zip(
            (1, 0), shift, stop, self.level_sizes[level], strict=True
        ):
            if abs(fraction) > BLEND_TOLERANCE:
                pixels = _undo_blend(pixels, fraction, axis, white_end=end == level_px)
        return pixels

    def _read_rgb(self, level: int, at: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        handle = self._handle = self._handle or _open_handle(self.path, self.slide_id)
        try:
            image = handle.read_region(at, level, size)
        except openslide.OpenSlideError as error:
            # OpenSlide refuses every call after an error: a later region needs a new handle.
            self.close()
            raise SlideReadError(
                f"{self.slide_id}: level {level}, {size[0]} x {size[1]} px at level-0 {at}: "
                f"{error}. The file is damaged there, or stored in a way that cannot be decoded; "
                "copy or download it again, or convert it to a tiled TIFF of 8-bit RGB."
            ) from error
        if image.getchannel("A").getextrema() == (255, 255):
            return np.asarray(image.convert("RGB"))
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


class AxisRead:
    """One axis of a read, in pixels of the level.

    [start, stop) is what the kernel may see, box the region inside it (relative to start),
    [read_start, read_stop) what the level stores of it, edge_px how many pixels after that repeat
    the last one (a level's size is rounded down, so up to one pixel of the slide has no data).
    """

    __slots__ = ("box", "edge_px", "read_start", "read_stop", "start", "stop")

    @classmethod
    def plan(
        cls, first: float, last: float, n_px: int, level_px: int, slide_end: float
    ) -> AxisRead:
        """Plan for the region [first, last) that becomes `n_px`; `slide_end` ends the slide."""
        stretch = max(1.0, (last - first) / n_px)
        margin = math.ceil(LANCZOS_SUPPORT * stretch) + BLEND_MARGIN_PX
        inner_start, inner_stop = math.floor(first), math.ceil(last - 1e-9)
        end_px = math.ceil(slide_end - 1e-9)
        plan = cls()
        plan.start = max(inner_start - margin, min(0, inner_start))
        plan.stop = min(inner_stop + margin, max(end_px, inner_stop))
        plan.box = (first - plan.start, min(last, float(plan.stop)) - plan.start)
        plan.read_start = min(max(plan.start, 0), level_px)
        plan.read_stop = min(plan.stop, level_px)
        plan.edge_px = max(0, min(plan.stop, end_px) - level_px)
        return plan


def open_slide(
    path: str | os.PathLike[str], mpp: float | None = None, *, slide_id: str | None = None
) -> Slide:
    """Open a slide with OpenSlide, or a TIFF that OpenSlide refuses with tifffile.

    Args:
        path: A file that one of them reads.
        mpp: um/px of level 0; overrules the file. None: OME-XML's, else openslide.mpp-x and -y,
            else the TIFF resolution tags.
        slide_id: Name in messages and results; default the file's stem.

    Returns:
        The open slide; close it, or use it in a `with`.

    Raises:
        SlideOpenError: No such file, or it cannot be read.
        SlideScaleError: um/px missing, outside 0.05 to 20, or x and y differ by more than 5%.
    """
    path = Path(path)
    slide_id = slide_id or path.stem
    handle = _open_handle(path, slide_id)
    try:
        return Slide(path, handle, slide_id, mpp)
    except openslide.OpenSlideError as error:
        handle.close()
        raise SlideOpenError(
            f"{slide_id}: {path} cannot be read: {error}. Copy or download it again."
        ) from error
    except BaseException:
        handle.close()
        raise


def resample(
    pixels: np.ndarray, size_px: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """The box of an image at another size: Lanczos-3, stretched by the factor when reducing.

    Args:
        pixels: (H, W, 3) uint8. What lies outside the box but within the kernel's reach is used.
        size_px: (width, height) of the result.
        box: (left, top, right, bottom) in px of `pixels`, fractions allowed.

    Returns:
        (height, width, 3) uint8, within one grey level of the exact sums (Pillow rounds between
        its two passes).
    """
    image = Image.fromarray(pixels)
    (width, height), (left, top, right, bottom) = size_px, box
    # Pillow begins with the rows where an image is taller than wide. It clips and rounds between
    # the passes, so a patch would depend on how much is read around it: columns first, always.
    for size, part in (
        ((width, image.height), (left, 0, right, image.height)),
        ((width, height), (0, top, width, bottom)),
    ):
        image = image.resize(size, Image.Resampling.LANCZOS, part, reducing_gap=None)
    return np.asarray(image)


def sha256_head(path: str | os.PathLike[str]) -> str:
    """`slide_sha256_head`: sha256 over the size (decimal ASCII, newline) and the first MiB."""
    path = Path(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{path.stat().st_size}\n".encode())
        digest.update(file.read(HEAD_BYTES))
    return digest.hexdigest()


def _open_handle(path: Path, slide_id: str) -> openslide.OpenSlide | TiffHandle:
    if not os.path.isfile(path):  # False, not an error, where the folder may not be looked into
        raise SlideOpenError(f"{slide_id}: no file at {path}. Check the path, or drop the slide.")
    try:
        return _opened(path, slide_id)
    except OSError as error:
        raise SlideOpenError(
            f"{slide_id}: {path} cannot be read: {error}. Check its permissions and the disk or "
            "server that it lies on, or drop the slide."
        ) from error


def _opened(path: Path, slide_id: str) -> openslide.OpenSlide | TiffHandle:
    try:
        check_tiles(path)
        handle = openslide.OpenSlide(path)
        if handle.properties.get("openslide.vendor") == PLAIN_TIFF:
            images, below, full_size = count_images(path)
            # Of a plain TIFF OpenSlide takes the first directory and what is reduced beside it: in
            # OME-TIFF that may be a label, one channel, or a pyramid without its levels.
            ome = is_ome(handle.properties.get("tiff.ImageDescription", ""))
            if ome and (images > 1 or below):
                try:
                    opened = open_tiff(path, slide_id)
                except SlideOpenError as error:
                    if images > 1:
                        handle.close()
                        raise
                    logger.warning("%s Its levels are not used until then: slower.", error)
                else:
                    handle.close()
                    return opened
            elif full_size > 1:
                handle.close()
                raise SlideOpenError(
                    f"{slide_id}: {path} holds {full_size} pages of one size (channels, focal "
                    "planes or several images), of which one would be taken. Save the one that is "
                    "meant as a TIFF of its own."
                )
        handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return handle
    except ValueError as error:
        raise SlideOpenError(
            f"{slide_id}: {path} is damaged: {error}. Copy or download it again."
        ) from error
    except openslide.OpenSlideError as error:
        unknown = isinstance(error, openslide.OpenSlideUnsupportedFormatError)
        if (unknown or "Unsupported" in str(error)) and is_tiff(path):
            return open_tiff(path, slide_id)
        if unknown:
            raise SlideOpenError(
                f"{slide_id}: {path} ({path.stat().st_size:,} bytes) is in no format that "
                "OpenSlide reads. Convert it to a tiled TIFF, or copy it again if it should be a "
                "slide."
            ) from error
        raise SlideOpenError(
            f"{slide_id}: {path} cannot be opened: {error}. Copy or download it again, or convert "
            "it to a tiled TIFF of 8-bit RGB."
        ) from error


def _level_scale(size0: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Level-0 px per px of a level, (x, y).

    Writers reduce by a whole number and round the size down (or up), so the ratio of sizes is off
    by up to one pixel over the slide's width. Where a whole number explains both sizes it is the
    scale; otherwise the ratio is.
    """
    whole = max(1, round(max(size0) / size[size0.index(max(size0))]))
    if all(abs(full / whole - px) < 1 for full, px in zip(size0, size, strict=True)):
        return float(whole), float(whole)
    return size0[0] / size[0], size0[1] / size[1]


def _bounds(
    properties: Mapping[str, str], size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(start, end) of the scanned area, level-0 px, clipped to the slide."""
    start = [number(properties.get(f"openslide.bounds-{axis}")) for axis in "xy"]
    if any(math.isnan(v) for v in start):
        return (0, 0), size
    x, y = (min(max(0, int(v)), n) for v, n in zip(start, size, strict=True))
    spans = [number(properties.get(f"openslide.bounds-{name}")) for name in ("width", "height")]
    end_x, end_y = (
        n if math.isnan(span) else min(n, at + int(span))
        for span, at, n in zip(spans, (x, y), size, strict=True)
    )
    return (x, y), (end_x, end_y)


def _undo_blend(pixels: np.ndarray, fraction: float, axis: int, *, white_end: bool) -> np.ndarray:
    """Stored pixels a from b[i] = (1-f) a[i] + f a[i+1] (for f < 0 with a[i-1] and |f|).

    A two-tap recursion along `axis`, run from the side whose neighbour is outside the read. That
    neighbour is taken equal to the last pixel; the error shrinks by f / (1-f) a pixel and dies in
    the margin. Past the slide's end (`white_end`) it is known: OpenSlide's transparency, on white.
    """
    f = abs(fraction)
    values = pixels.astype(np.float32)
    if fraction > 0:
        values = np.flip(values, axis)
    outside = np.take(values, [0], axis=axis)
    if fraction > 0 and white_end:
        outside = np.full_like(outside, 255)
    decay = f / (1 - f)
    stored, _ = lfilter([1 / (1 - f)], [1, decay], values, axis=axis, zi=-decay * outside)
    if fraction > 0:
        stored = np.flip(stored, axis)
    return np.clip(np.rint(stored), 0, 255).astype(np.uint8)


def _quarters(left: int, top: int, right: int, bottom: int) -> list[tuple[int, int, int, int]]:
    x, y = (left + right) // 2, (top + bottom) // 2
    columns, rows = ((left, x), (x, right)), ((top, y), (y, bottom))
    return [(c[0], r[0], c[1], r[1]) for r in rows for c in columns]

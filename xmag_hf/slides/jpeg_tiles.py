"""JPEG tiles of TIFF and SVS levels, each decoded once, by libjpeg-turbo.

OpenSlide decodes a tile again for every region that touches it, and then blends it through a
32-bit canvas. Here the tiles' bytes are found with tifffile and decoded with simplejpeg, which is
strict where OpenSlide is strict: damaged data is an error, never grey pixels. What is no plain grid
of baseline JPEG tiles is left to OpenSlide (`TileLayoutError`), and so is every tile that is absent
or does not decode.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import SlideError, SlideReadError
from .reader import Slide
from .windows import WHITE, AxisWindow

VENDORS = ("aperio", "generic-tiff")  # of OpenSlide's formats those whose levels are plain grids
# TIFF's PhotometricInterpretation -> transform of the Adobe marker, which tells the decoder.
ADOBE_TRANSFORM = {2: 0, 6: 1}  # RGB, YCbCr
JPEG_COMPRESSION = 7
MAX_TILE_PX = 1 << 24  # a larger "tile" is a whole picture
# Mean difference to OpenSlide's pixels, grey levels, that is no other colour or place. Decoders
# agree to the bit; OpenSlide blends pixels of levels with uneven downsampling, which is undone to
# about half a level.
SAME_PIXELS = 1.0
HEADER_BYTES = 1 << 16
SOI, APP0, APP14 = b"\xff\xd8", b"\xff\xe0", b"\xff\xee"


class TileLayoutError(SlideError):
    """A level is no plain grid of JPEG tiles; OpenSlide can read it."""


@dataclass(frozen=True, eq=False)
class JpegLevel:
    """Where the JPEG tiles of a level lie.

    Attributes:
        path: The file.
        level: Number, as OpenSlide counts.
        size: (width, height) of the level, px.
        tile_px: (width, height) of a tile, px.
        across: Tiles in a row.
        offsets: (n_tiles,) int64, bytes; tile numbers run row by row.
        counts: (n_tiles,) int64, bytes; 0 where a tile is absent.
        header: Start of every tile's JPEG: colour space and shared tables.
    """

    path: Path
    level: int
    size: tuple[int, int]
    tile_px: tuple[int, int]
    across: int
    offsets: np.ndarray
    counts: np.ndarray
    header: bytes

    def tiles_of(self, across: AxisWindow, down: AxisWindow) -> np.ndarray:
        """Numbers of the tiles that hold a window's pixels, (n,) int64, ascending."""
        columns, rows = (
            np.arange(
                (axis.start + axis.stored_low) // px, -(-(axis.start + axis.stored_high) // px)
            )
            for axis, px in zip((across, down), self.tile_px, strict=True)
        )
        if across.stored_low == across.stored_high or down.stored_low == down.stored_high:
            return np.empty(0, np.int64)
        return (rows[:, None] * self.across + columns).ravel()


def jpeg_level(slide: Slide, level: int) -> JpegLevel:
    """Find the tiles of a level.

    Args:
        slide: Open; its file is read once more, by tifffile.
        level: Number.

    Returns:
        The level's tiles. `check_pixels` shows that they are OpenSlide's.

    Raises:
        TileLayoutError: No plain grid of JPEG tiles, or simplejpeg or tifffile is missing; it says
            which.
    """
    for module in ("simplejpeg", "tifffile"):
        if importlib.util.find_spec(module) is None:
            raise _refusal(slide, level, f"{module} is not installed (pip install {module})")
    if slide.vendor not in VENDORS:
        raise _refusal(slide, level, f"its format is {slide.vendor or 'unknown'}")
    page, offsets, counts = _page(slide, level)
    photometric = page.photometric if isinstance(page.photometric, int) else -1  # of a damaged file
    reasons = {
        "its tiles are not JPEG": page.compression != JPEG_COMPRESSION,
        "it is not 8-bit RGB or YCbCr": page.bitspersample != 8
        or page.samplesperpixel != 3
        or page.planarconfig != 1
        or int(photometric) not in ADOBE_TRANSFORM,
        "its tiles are too large": page.tilewidth * page.tilelength > MAX_TILE_PX,
    }
    for reason, true in reasons.items():
        if true:
            raise _refusal(slide, level, reason)
    across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if not len(offsets) == len(counts) == across * down:
        raise _refusal(slide, level, f"it lists {len(offsets)} of {across * down} tiles")
    return JpegLevel(
        path=slide.path,
        level=level,
        size=slide.level_sizes[level],
        tile_px=(page.tilewidth, page.tilelength),
        across=across,
        offsets=offsets,
        counts=counts,
        header=_header(page.jpegtables, ADOBE_TRANSFORM[int(photometric)]),
    )


def check_pixels(slide: Slide, jpeg: JpegLevel, places_level0: Sequence[tuple[int, int]]) -> None:
    """Show on a tile that the fast path gives OpenSlide's pixels.

    Args:
        slide: Open.
        jpeg: Of one of its levels.
        places_level0: (x, y) with tissue, level-0 px; the first whose tile both can decode decides.

    Raises:
        TileLayoutError: They differ, or no place has a tile that both can decode.
    """
    scale = [full / px for full, px in zip(slide.size_level0, jpeg.size, strict=True)]
    out = np.empty((jpeg.tile_px[1], jpeg.tile_px[0], 3), np.uint8)
    with jpeg.path.open("rb") as file:
        for place in places_level0:
            at = [int(v / s) for v, s in zip(place, scale, strict=True)]
            column, row = (v // px for v, px in zip(at, jpeg.tile_px, strict=True))
            number = row * jpeg.across + column
            inside = all(0 <= v < px for v, px in zip(at, jpeg.size, strict=True))
            if not inside or not decode_tile(jpeg, file, number, out):
                continue
            start = (column * jpeg.tile_px[0], row * jpeg.tile_px[1])
            stop = tuple(
                min(v + px, end) for v, px, end in zip(start, jpeg.tile_px, jpeg.size, strict=True)
            )
            try:
                theirs = slide.read_stored(jpeg.level, start, (stop[0], stop[1]))
            except SlideReadError:
                continue
            ours = out[: theirs.shape[0], : theirs.shape[1]]
            difference = np.abs(ours.astype(np.int16) - theirs).mean()
            if difference > SAME_PIXELS:
                raise _refusal(
                    slide, jpeg.level, f"its pixels differ from OpenSlide's by {difference:.1f}"
                )
            return
    raise _refusal(slide, jpeg.level, f"none of {len(places_level0)} tiles tried could be decoded")


def decode_tile(jpeg: JpegLevel, file: BinaryIO, number: int, out: np.ndarray) -> bool:
    """Read and decode one tile.

    Args:
        jpeg: Its level.
        file: The level's file, open for this thread alone.
        number: Of the tile.
        out: (tile height, tile width, 3) uint8, contiguous, written to.

    Returns:
        Whether it was decoded; absent, damaged and odd tiles are not, and leave rubbish in `out`.
    """
    import simplejpeg

    count = int(jpeg.counts[number])
    if not 0 < count <= 2 * out.nbytes + HEADER_BYTES:  # absent, or a damaged count
        return False
    try:
        file.seek(int(jpeg.offsets[number]))
        data = file.read(count)
        if len(data) != count or data[:2] != SOI:
            return False
        # strict: what libjpeg only warns about is damage. The size is compared with the buffer's
        # before anything is decoded.
        tile = simplejpeg.decode_jpeg(jpeg.header + _without_jfif(data), buffer=out, strict=True)
    except (ValueError, OSError):
        return False
    return tile.shape == out.shape


class TileStore:
    """Tiles shared by runs of patches: each decoded once, kept until its last run is done.

    Runs are numbered in the order in which they start. A run decodes the tiles that no earlier run
    needs, then waits for the earlier ones to have decoded theirs; so runs may work in threads, as
    long as none starts before those with lower numbers.

    Args:
        jpeg: The level.
        needs: Numbers of the tiles of each run; a tile once a run.
    """

    def __init__(self, jpeg: JpegLevel, needs: Sequence[np.ndarray]):
        self.jpeg = jpeg
        self._needs = needs
        together = np.concatenate([*needs, np.empty(0, np.int64)])
        runs = np.repeat(np.arange(len(needs)), [len(tiles) for tiles in needs])
        # Within this level only some tiles are needed: compact tables, not one entry a tile.
        self._numbers, first = np.unique(together, return_index=True)
        self._owner = runs[first]
        self._uses = np.bincount(np.searchsorted(self._numbers, together), minlength=1)
        self._decoded: dict[int, np.ndarray | None] = {}
        self._ready = np.zeros(len(needs), dtype=bool)
        self._change = threading.Condition()
        self._spare: list[np.ndarray] = []
        self._local = threading.local()
        self._files: list[BinaryIO] = []

    def prepare(self, run: int) -> None:
        """Decode a run's tiles, in file order, and wait for those that earlier runs decode.

        Raises:
            OSError: The file cannot be opened any more.
        """
        tiles = self._needs[run]
        owners = self._owner[np.searchsorted(self._numbers, tiles)]
        own = tiles[owners == run]
        try:
            for number in own[np.argsort(self.jpeg.offsets[own], kind="stable")]:
                buffer = self._buffer()
                good = decode_tile(self.jpeg, self._file(), int(number), buffer)
                self._decoded[int(number)] = buffer if good else None
                if not good:
                    self._spare.append(buffer)
        finally:
            with self._change:
                self._ready[run] = True
                self._change.notify_all()
        others = np.unique(owners[owners != run])
        with self._change:
            self._change.wait_for(lambda: self._ready[others].all())

    def fill(self, window: np.ndarray, across: AxisWindow, down: AxisWindow) -> bool:
        """Copy a window's pixels from its tiles, which `prepare` has decoded.

        Args:
            window: (down.side, across.side, 3) uint8, written to.
            across: Columns.
            down: Rows.

        Returns:
            False if one of its tiles could not be decoded; the window then holds rubbish.
        """
        numbers = self.jpeg.tiles_of(across, down).tolist()
        tiles = [self._decoded.get(number) for number in numbers]
        if any(tile is None for tile in tiles):
            return False
        if not (across.whole and down.whole):
            window[...] = WHITE
        for number, tile in zip(numbers, tiles, strict=True):
            if tile is None:
                return False
            row, column = divmod(number, self.jpeg.across)
            x0, x1, left = _overlap(across, column, self.jpeg.tile_px[0])
            y0, y1, top = _overlap(down, row, self.jpeg.tile_px[1])
            window[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        for axis, view in ((down, window), (across, window.swapaxes(0, 1))):
            end = min(axis.stored_high + axis.read.edge_px, axis.side)
            if axis.stored_low < axis.stored_high < end:
                view[axis.stored_high : end] = view[axis.stored_high - 1]
        return True

    def release(self, run: int) -> None:
        """A run is done: drop the tiles that no later run needs."""
        places = np.searchsorted(self._numbers, self._needs[run])
        with self._change:
            self._uses[places] -= 1
            finished = self._numbers[places[self._uses[places] == 0]].tolist()
        for number in finished:
            tile = self._decoded.pop(number, None)
            if tile is not None:
                self._spare.append(tile)

    def close(self) -> None:
        """Close the files; no thread reads any more."""
        for file in self._files:
            file.close()

    def _file(self) -> BinaryIO:
        if not hasattr(self._local, "file"):
            self._local.file = self.jpeg.path.open("rb")
            self._files.append(self._local.file)
        return self._local.file

    def _buffer(self) -> np.ndarray:
        try:
            return self._spare.pop()  # memory that is touched already: half the cost of decoding
        except IndexError:
            return np.empty((self.jpeg.tile_px[1], self.jpeg.tile_px[0], 3), np.uint8)


def _overlap(axis: AxisWindow, index: int, tile_px: int) -> tuple[int, int, int]:
    """(first, one past the last, where the tile begins), px of the window."""
    begin = index * tile_px - axis.start
    return max(axis.stored_low, begin), min(axis.stored_high, begin + tile_px), begin


def _page(slide: Slide, level: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The only tiled page of the level's size, its tiles' offsets and byte counts."""
    import tifffile

    width, height = slide.level_sizes[level]
    try:
        with tifffile.TiffFile(slide.path) as tiff:
            pages = [
                page
                for page in tiff.pages
                if isinstance(page, tifffile.TiffPage)
                and page.is_tiled
                and page.tilewidth * page.tilelength > 0
                and (page.imagewidth, page.imagelength) == (width, height)
            ]
            if len(pages) == 1:
                # While the file is open: tifffile looks some tags up when asked.
                _ = pages[0].jpegtables
                offsets, counts = (
                    np.asarray(numbers, dtype=np.int64)
                    for numbers in (pages[0].dataoffsets, pages[0].databytecounts)
                )
                return pages[0], offsets, counts
    except Exception as error:  # noqa: BLE001 - tifffile raises whatever damaged tags provoke
        raise _refusal(slide, level, f"tifffile cannot read it ({error})") from error
    raise _refusal(slide, level, f"{len(pages)} tiled TIFF pages have its size")


def _header(tables: bytes | None, transform: int) -> bytes:
    """Start of a tile's JPEG: SOI, an Adobe marker for the colour space, shared tables."""
    adobe = APP14 + b"\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    # Tables are a JPEG of their own: from SOI to EOI.
    return SOI + adobe + (_without_jfif(tables)[:-2] if tables else b"")


def _without_jfif(data: bytes) -> bytes:
    """A JPEG after SOI, and after its JFIF marker: that would overrule the colour space."""
    begin = 2
    if data[2:4] == APP0:
        begin = 4 + int.from_bytes(data[4:6], "big")
    return data[begin:]


def _refusal(slide: Slide, level: int, reason: str) -> TileLayoutError:
    return TileLayoutError(
        f"{slide.slide_id}: level {level} cannot be read tile by tile: {reason}. Let OpenSlide "
        "read it (--reader auto or openslide)."
    )

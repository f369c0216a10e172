"""Ways to read patches that need none of the package's pipeline, and no torch.

cuCIM was seen to hang in a process that had loaded torch, so its rows run in a process of their
own: `serve` answers requests of `read_patches.py` over standard input and output.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import simplejpeg
from PIL import Image

from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.slides import resample
from xmag_hf.slides.jpeg_tiles import JpegLevel, decode_tile
from xmag_hf.slides.windows import AxisWindow, resample_windows

try:
    from cucim import CuImage
except ImportError:
    CuImage = None

N_PX = 224
STRIP_ROWS = 4  # patch rows a strip, and side of merged patches


@dataclass
class Job:
    """A slide's patches, and what the ways of reading need to know of them.

    Attributes:
        path: The slide.
        coords: (N, 2) int64, top-left corners, level-0 px, row by row.
        tiles: Of the level.
        scale: Level-0 px per px of the level.
        side: Of a patch, px of the level, rounded as the usual way does.
        places: Windows of the patches.
        used: Numbers of the tiles that the windows touch, in file order.
    """

    path: Path
    coords: np.ndarray
    tiles: JpegLevel
    scale: float
    side: int
    places: list[tuple[AxisWindow, AxisWindow]]
    used: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """(N, 2) first px of the patches, px of the level."""
        return (self.coords / self.scale).round().astype(int)


Way = Callable[[Job, bool], np.ndarray | None]


def timed(way: Way, job: Job, resampled: bool) -> tuple[float, np.ndarray | None]:
    """Processor seconds of a way, and its patches."""
    started = time.process_time()
    pixels = way(job, resampled)
    return time.process_time() - started, pixels


# --- ways of reading: (job, resampled) -> (N, 224, 224, 3) uint8, or None if they end before ------


def usual(job: Job, resampled: bool) -> np.ndarray | None:
    """OpenSlide region of the patch alone, PIL's Lanczos."""
    out = _Out(job, resampled)
    with openslide.OpenSlide(job.path) as slide:
        for x, y in job.coords.tolist():
            region = slide.read_region((x, y), job.tiles.level, (job.side, job.side))
            out.add(np.asarray(region.convert("RGB")))
    return out.patches


def decode_only(job: Job, resampled: bool) -> np.ndarray | None:
    """The tiles that the patches touch, read and decoded into one buffer."""
    out = np.empty((job.tiles.tile_px[1], job.tiles.tile_px[0], 3), np.uint8)
    with job.path.open("rb") as file:
        for number in job.used.tolist():
            decode_tile(job.tiles, file, number, out)


def cucim_patches(job: Job, resampled: bool) -> np.ndarray | None:
    """cuCIM, a region a patch."""
    out = _Out(job, resampled)
    slide = CuImage(str(job.path))  # type: ignore[misc]
    for x, y in job.coords.tolist():
        region = slide.read_region((x, y), (job.side, job.side), level=job.tiles.level)
        out.add(np.asarray(region))
    return out.patches


def cucim_merged(job: Job, resampled: bool) -> np.ndarray | None:
    """cuCIM, patches merged 4 x 4, else 2 x 2, read as a batch: slide2vec's way."""
    out = _Out(job, resampled)
    slide = CuImage(str(job.path))  # type: ignore[misc]
    columns, rows = (np.unique(job.coords[:, axis]).tolist() for axis in (0, 1))
    cells = {
        (columns.index(x), rows.index(y)): number
        for number, (x, y) in enumerate(job.coords.tolist())
    }
    for n in (STRIP_ROWS, 2, 1):
        blocks = []
        for column, row in sorted(cells, key=lambda cell: (cell[1], cell[0])):
            block = [(column + i, row + j) for j in range(n) for i in range(n)]
            if all(cell in cells for cell in block):
                blocks.append([cells.pop(cell) for cell in block])
        places = [tuple(job.coords[block[0]].tolist()) for block in blocks]
        if not places:
            continue
        regions = slide.read_region(
            places, (job.side * n, job.side * n), level=job.tiles.level, num_workers=1
        )
        if len(places) == 1:
            regions = [regions]
        for block, region in zip(blocks, regions, strict=False):
            pixels = np.asarray(region).reshape(job.side * n, job.side * n, 3)
            for k, number in enumerate(block):
                j, i = divmod(k, n)
                cut = np.s_[j * job.side : (j + 1) * job.side, i * job.side : (i + 1) * job.side]
                out.add(pixels[cut], number)
    return out.patches


def cucim_strips(job: Job, resampled: bool) -> np.ndarray | None:
    """cuCIM, strips of four patch rows, patches cut from them."""
    out = _Out(job, resampled)
    slide = CuImage(str(job.path))  # type: ignore[misc]
    rows = np.unique(job.coords[:, 1])
    for group in [rows[k : k + STRIP_ROWS] for k in range(0, len(rows), STRIP_ROWS)]:
        inside = np.flatnonzero(np.isin(job.coords[:, 1], group))
        low, high = job.starts[inside].min(axis=0), job.starts[inside].max(axis=0) + job.side
        corner = job.coords[inside].min(axis=0).tolist()
        strip = np.asarray(
            slide.read_region(tuple(corner), tuple((high - low).tolist()), level=job.tiles.level)
        )
        for number in inside.tolist():
            x, y = job.starts[number] - low
            out.add(strip[y : y + job.side, x : x + job.side], number)
    return out.patches


def cucim_aligned(job: Job, resampled: bool) -> np.ndarray | None:
    """cuCIM, rows of storage tiles, windows with the kernel's reach cut from them."""
    slide = CuImage(str(job.path))  # type: ignore[misc]
    (tile_w, tile_h), level = job.tiles.tile_px, job.tiles
    columns = job.used % level.across
    left, right = int(columns.min()) * tile_w, int(columns.max() + 1) * tile_w
    right = min(right, level.size[0])
    held: dict[int, np.ndarray] = {}
    side = job.places[0][0].side
    window = np.empty((1, side, side, 3), np.uint8)
    patches = []
    for across, down in job.places:
        first = (down.start + down.stored_low) // tile_h
        last = (down.start + down.stored_high - 1) // tile_h
        for row in [row for row in held if row < first]:
            del held[row]
        for row in range(first, last + 1):
            top = row * tile_h
            if row not in held:
                at = (round(left * job.scale), round(top * job.scale))
                size = (right - left, min(tile_h, level.size[1] - top))
                held[row] = np.asarray(slide.read_region(at, size, level=level.level))
            y0, y1 = max(down.stored_low, top - down.start), down.stored_high
            y1 = min(y1, top + tile_h - down.start)
            x0, x1 = across.stored_low, across.stored_high
            begin = across.start - left
            window[0, y0:y1, x0:x1] = held[row][
                y0 + down.start - top : y1 + down.start - top, begin + x0 : begin + x1
            ]
        if resampled:
            patches.append(resample_windows(window, [across], [down], N_PX)[0])
    return np.stack(patches) if resampled else None


def reduced(factor: int, decode: Callable[[bytes, int, np.ndarray], None]) -> Way:
    """Tiles decoded at 1/factor of their size in the DCT domain, the rest by Lanczos."""

    def way(job: Job, resampled: bool) -> np.ndarray | None:
        level = job.tiles
        tile_w, tile_h = (px // factor for px in level.tile_px)
        height, width = (-(-size // factor) for size in reversed(level.size))
        down = -(-level.size[1] // level.tile_px[1])
        picture = np.empty((down * tile_h, level.across * tile_w, 3), np.uint8)
        tile = np.empty((tile_h, tile_w, 3), np.uint8)
        with job.path.open("rb") as file:
            for number in job.used.tolist():
                file.seek(int(level.offsets[number]))
                data = level.header + file.read(int(level.counts[number]))[2:]
                decode(data, factor, tile)
                row, column = divmod(number, level.across)
                picture[
                    row * tile_h : (row + 1) * tile_h, column * tile_w : (column + 1) * tile_w
                ] = tile
        if not resampled:
            return None
        picture = picture[:height, :width]
        patches = []
        for across, down_ in job.places:
            first = [(axis.start + axis.first) / factor for axis in (across, down_)]
            last = [(axis.start + axis.last) / factor for axis in (across, down_)]
            reach = math.ceil(3 * max(1.0, (last[0] - first[0]) / N_PX)) + 1
            x0, y0 = (max(0, math.floor(v) - reach) for v in first)
            x1, y1 = (math.ceil(v) + reach for v in last)
            box = (first[0] - x0, first[1] - y0, last[0] - x0, last[1] - y0)
            patches.append(resample(picture[y0:y1, x0:x1], (N_PX, N_PX), box))
        return np.stack(patches)

    return way


def _turbo(data: bytes, factor: int, out: np.ndarray) -> None:
    height, width = out.shape[:2]
    simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=factor, buffer=out)


def _draft(data: bytes, factor: int, out: np.ndarray) -> None:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (out.shape[1], out.shape[0]))
    out[...] = np.asarray(image)


class _Out:
    """Patches of ways that cut them without the kernel's reach."""

    def __init__(self, job: Job, resampled: bool):
        count = len(job.coords)
        self.patches = np.empty((count, N_PX, N_PX, 3), np.uint8) if resampled else None
        self._window = np.empty((job.side, job.side, 3), np.uint8)
        self._next = 0

    def add(self, pixels: np.ndarray, number: int | None = None) -> None:
        number = self._next if number is None else number
        self._next = number + 1
        if self.patches is None:
            self._window[...] = pixels
        else:
            box = (0, 0, pixels.shape[1], pixels.shape[0])
            self.patches[number] = resample(np.ascontiguousarray(pixels), (N_PX, N_PX), box)


WAYS: dict[str, Way] = {
    "usual: OpenSlide region, PIL": usual,
    "tiles decoded, nothing else": decode_only,
    "DCT 1/2 (libjpeg-turbo)": reduced(2, _turbo),
    "DCT 1/4 (libjpeg-turbo)": reduced(4, _turbo),
    "DCT 1/2 (Pillow's draft)": reduced(2, _draft),
}
CUCIM_WAYS: dict[str, Way] = {
    "cuCIM, a region a patch": cucim_patches,
    "cuCIM, merged 4 x 4 (slide2vec)": cucim_merged,
    "cuCIM, strips of four patch rows": cucim_strips,
    "cuCIM, rows of storage tiles": cucim_aligned,
}


def serve() -> None:
    """Answer (name, job, resampled) with (seconds, patches) until the input ends."""
    keep_freed_memory()
    answers = sys.stdout.buffer
    pickle.dump(CuImage is not None, answers)
    answers.flush()
    while True:
        try:
            name, job, resampled = pickle.load(sys.stdin.buffer)  # noqa: S301 - our own parent
        except EOFError:
            return
        pickle.dump(timed(CUCIM_WAYS[name], job, resampled), answers)
        answers.flush()


if __name__ == "__main__":
    serve()

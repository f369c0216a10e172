"""Slides of any size in a small file: all tile offsets point to two JPEG tiles."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 256
BLOCK = 16  # tiles a side of the squares of tissue and of glass: one tile of the last level


def write_giant(
    path: Path, side_px: int, tissue: np.ndarray, mpp: float = 0.5, every: int = 4
) -> Path:
    """A tiled BigTIFF of side_px x side_px px with levels 1, 4, 16.

    Squares of 16 x 16 tiles (of level 0) are tissue where column + row of the square divide by
    `every`, else glass. Each level has the same squares.

    Args:
        path: To write.
        side_px: Of level 0.
        tissue: (256, 256, 3) uint8.
        mpp: um/px of level 0, in the resolution tags.
        every: 1 is tissue all over.

    Returns:
        The path.
    """
    glass = np.full((TILE, TILE, 3), 243, np.uint8)
    tiles = [_jpeg(pixels) for pixels in (tissue, glass)]
    places = [16, 16 + len(tiles[0])]
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        file.write(b"".join(tiles))
        link = 8  # where the next directory's offset is written
        for scale in (1, 4, 16):
            side = side_px // scale
            link = _directory(
                file, link, side, _which(side, scale, every), places, tiles, mpp * scale
            )
    return path


def _which(side: int, scale: int, every: int) -> np.ndarray:
    """(n, n) index of each tile of a level: 0 tissue, 1 glass."""
    n = -(-side // TILE)
    square = (np.arange(n) * scale + scale // 2) // BLOCK
    return ((square[:, None] + square[None, :]) % every > 0).astype(np.int64).ravel()


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _directory(
    file: io.BufferedWriter,
    link: int,
    side: int,
    which: np.ndarray,
    places: list[int],
    tiles: list[bytes],
    mpp: float,
) -> int:
    """Write one level; returns where the offset of the next directory goes."""
    lengths = np.array([len(tile) for tile in tiles])
    offsets_at = file.seek(0, io.SEEK_END)
    file.write(np.array(places, "<u8")[which].tobytes())
    counts_at = file.tell()
    file.write(lengths.astype("<u8")[which].tobytes())
    bits = struct.pack("<3H2x", 8, 8, 8)
    resolution = struct.pack("<2I", round(1e7 / mpp), 1000)
    n = len(which)
    entries = [  # tag, type (3 short, 4 long, 5 rational, 16 long8), count, value
        (254, 4, 1, struct.pack("<Q", int(link != 8))),
        (256, 4, 1, struct.pack("<Q", side)),
        (257, 4, 1, struct.pack("<Q", side)),
        (258, 3, 3, bits),
        (259, 3, 1, struct.pack("<Q", 7)),
        (262, 3, 1, struct.pack("<Q", 6)),
        (277, 3, 1, struct.pack("<Q", 3)),
        (282, 5, 1, resolution),
        (283, 5, 1, resolution),
        (284, 3, 1, struct.pack("<Q", 1)),
        (296, 3, 1, struct.pack("<Q", 3)),
        (322, 4, 1, struct.pack("<Q", TILE)),
        (323, 4, 1, struct.pack("<Q", TILE)),
        (324, 16, n, struct.pack("<Q", offsets_at if n > 1 else places[which[0]])),
        (325, 16, n, struct.pack("<Q", counts_at if n > 1 else lengths[which[0]])),
        (530, 3, 2, struct.pack("<2H4x", 1, 1)),
    ]
    at = file.tell()
    file.write(struct.pack("<Q", len(entries)))
    for tag, kind, count, value in entries:
        file.write(struct.pack("<HHQ", tag, kind, count) + value)
    next_link = file.tell()
    file.write(bytes(8))
    file.seek(link)
    file.write(struct.pack("<Q", at))
    return next_link

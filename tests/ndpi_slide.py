"""NDPI files for tests: classic TIFF with 64-bit offsets of directories, and a JPEG in each.

Behind each directory and the offset of the next one lie the upper halves of the tags' values.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_ndpi(path: Path, levels: Sequence[np.ndarray], mpp: float, start: int = 12) -> Path:
    """Write (H, W, 3) uint8 levels, finest first, as OpenSlide reads them.

    Args:
        path: To write.
        levels: Each reduced by the same factor from the one before.
        mpp: um/px of the first.
        start: Where the first JPEG lies; what is before it takes no disk.

    Returns:
        The path.
    """
    with path.open("wb") as file:
        file.write(b"II*\0")
        link, at = 4, start  # link: where the next directory's offset is written
        for level in levels:
            scale = levels[0].shape[1] / level.shape[1]
            file.seek(at)
            Image.fromarray(level).save(file, "JPEG", quality=98, subsampling=0)
            link = _directory(file, link, at, level.shape, mpp * scale, 20 / scale)
            at = file.seek(0, io.SEEK_END)
    return path


def _directory(
    file: io.BufferedWriter, link: int, jpeg: int, shape: tuple[int, ...], mpp: float, power: float
) -> int:
    """Write one level's; returns where the offset of the next goes."""
    resolution = file.tell()
    file.write(struct.pack("<2L", round(1e7 / mpp), 1000))
    at = file.tell()
    (as_bits,) = struct.unpack("<L", struct.pack("<f", power))
    entries = [  # tag, type (3 short, 4 long, 5 rational, 9 slong, 11 float), value
        (256, 4, shape[1]),
        (257, 4, shape[0]),
        (259, 3, 7),
        (262, 3, 6),
        (273, 4, jpeg),
        (277, 3, 3),
        (278, 4, shape[0]),
        (279, 4, resolution - jpeg),
        (282, 5, resolution),
        (283, 5, resolution),
        (296, 3, 3),
        (65420, 4, 1),  # what makes it NDPI
        (65421, 11, as_bits),  # power of the objective
        (65424, 9, 0),  # focal plane
    ]
    halves = [(tag, kind, value & 0xFFFFFFFF, value >> 32) for tag, kind, value in entries]
    file.write(struct.pack("<H", len(halves)))
    file.write(b"".join(struct.pack("<HHLL", tag, kind, 1, low) for tag, kind, low, _ in halves))
    next_link = file.tell()
    file.write(bytes(8) + b"".join(struct.pack("<L", high) for *_, high in halves))
    file.seek(link)
    file.write(struct.pack("<Q", at))
    return next_link

"""Pyramidal TIFFs of JPEG tiles for tests, as scanners and converters write them, and damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tifffile

KINDS = {
    "4:2:0": {"subsampling": (2, 2)},
    "4:2:2": {"subsampling": (2, 1)},
    "4:4:4": {"subsampling": (1, 1)},
    "RGB": {"compressionargs": {"level": 85, "outcolorspace": "rgb"}},
}


def write_jpeg_tiff(
    path: Path, levels: Sequence[np.ndarray], mpp: float, *, kind: str = "4:2:0", tile: int = 256
) -> Path:
    """Write (H, W, 3) uint8 levels, finest first."""
    options = {"compressionargs": {"level": 85}} | KINDS[kind]
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                tile=(tile, tile),
                photometric="rgb",
                compression="jpeg",
                subfiletype=1 if number else 0,
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
                **options,
            )
    return path


def change_tile(
    source: Path, path: Path, number: int, change: Callable[[bytes], bytes], *, level: int = 0
) -> Path:
    """Copy a file with the bytes of one tile changed; an empty result makes the tile absent."""
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[level]
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        tag = page.tags["TileByteCounts"]
        width = {"SHORT": 2, "LONG": 4, "LONG8": 8}[tag.dtype.name]
        at, order = tag.valueoffset + width * number, tiff.byteorder
    content = bytearray(source.read_bytes())
    data = change(bytes(content[offset : offset + count]))
    assert len(data) <= count
    content[offset : offset + len(data)] = data
    content[at : at + width] = len(data).to_bytes(width, "little" if order == "<" else "big")
    path.write_bytes(content)
    return path

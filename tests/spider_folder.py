"""A folder of exactly SPIDER's layout, cut from real tissue, and its tar in parts."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TILES = 6  # a side of each "slide"
PATCH = 224
# Labelled patches (row, column) of each slide, and how many of the 24 neighbours it lacks.
LABELLED = {(0, 0): 16, (2, 2): 0, (3, 3): 0, (2, 5): 10}
CLASSES = ("Fat", "Vessels", "Adenoma low grade", "Mucus")
TRAIN = tuple(f"slide_{number}" for number in range(5))
TEST = ("slide_5",)


def origin(slide_id: str) -> tuple[int, int]:
    """(x, y) of a slide's first patch in `cmu_pixels`."""
    number = int(slide_id[-1])
    return 130 * number + 20, 290 * number + 30


def make_spider(folder: Path, pixels: np.ndarray, organ: str = "colorectal") -> Path:
    """Write `SPIDER-<organ>/` into `folder`; returns it."""
    root = folder / f"SPIDER-{organ}"
    (root / "images").mkdir(parents=True)
    records = []
    for slide_id in (*TRAIN, *TEST):
        x0, y0 = origin(slide_id)
        for row in range(TILES):
            for column in range(TILES):
                y, x = y0 + PATCH * row, x0 + PATCH * column
                (root / "images" / name_of(slide_id, row, column)).write_bytes(
                    png(pixels[y : y + PATCH, x : x + PATCH])
                )
        for (row, column), class_name in zip(LABELLED, CLASSES, strict=True):
            records.append(record(slide_id, row, column, class_name))
    (root / "metadata.json").write_text(json.dumps(records))
    return root


def record(slide_id: str, row: int, column: int, class_name: str) -> dict:
    """A line of metadata.json."""
    context = {
        f"{r}_{c}": name_of(slide_id, row + r - 2, column + c - 2)
        for r in range(5)
        for c in range(5)
        if 0 <= row + r - 2 < TILES and 0 <= column + c - 2 < TILES
    }
    return {
        "slide_id": slide_id,
        "image_name": name_of(slide_id, row, column),
        "context_info": context,
        "class": class_name,
        "split": "test" if slide_id in TEST else "train",
    }


def name_of(slide_id: str, row: int, column: int) -> str:
    return f"{slide_id}_{row}_{column}.png"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def tar_of(root: Path, extra: Sequence[tarfile.TarInfo] = ()) -> bytes:
    """The tar of a folder, metadata.json last, as one block of bytes; `extra` comes first."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in extra:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        archive.add(root, root.name, recursive=False)
        archive.add(root / "images", f"{root.name}/images")
        archive.add(root / "metadata.json", f"{root.name}/metadata.json")
    return buffer.getvalue()


def write_parts(folder: Path, content: bytes, cuts: Sequence[int], organ: str = "colorectal"):
    """Write `content` as `spider-<organ>.tar.NN`, cut at `cuts`; returns the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, len(content)], strict=True)):
        paths.append(folder / f"spider-{organ}.tar.{number:02d}")
        paths[-1].write_bytes(content[first:last])
    return paths

"""The dense probe's rows: one embedding for each cell of the 4 x 4 grid of a 5x patch.

A 5x patch is 224 px at 2.0 um/px, a cell 56 px of it (112 um), which at 0.5 um/px is a 20x patch
of 224 px. Cells that reach into the padding of a small image are left out, for all encoders alike,
so that every encoder answers for the same cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from xmag_hf.encoders import Encoder

from .errors import ProbeError
from .features import Wanted, cached_rows, check_scales, feature_identity
from .images import ImageSplit, LabelledImages
from .options import STUDENT_MPP, TEACHER_MPP
from .patches import MAX_ENLARGE, RECIPE, scaled_size, scaled_squares

PATCH_PX = 224  # at 2.0 um/px
GRID = 4
CELL_PX = PATCH_PX // GRID


def cell_boxes(
    size: tuple[int, int], mpp: float, *, max_enlarge: float = MAX_ENLARGE
) -> tuple[np.ndarray, np.ndarray]:
    """Where the grid cells of an image's 5x patches lie.

    Args:
        size: (width, height) of the image, px.
        mpp: Its um/px.
        max_enlarge: See `scaled_squares`.

    Returns:
        Boxes (k, 4) float64, (x0, y0, x1, y1) in the image's own pixels, of the k cells that lie
        wholly inside it; and inside (n * 16,) bool over all cells of its n patches, patches and
        cells row-major, so that `cells[inside]` are those of the boxes.
    """
    width, height = scaled_size(size, mpp, STUDENT_MPP, max_enlarge=max_enlarge)
    # The padding of `padded_image` and the grid of `scaled_squares`.
    spans = [_patch_starts(width), _patch_starts(height)]
    cells = np.arange(GRID) * CELL_PX
    # (rows, columns, 4, 4): patch row, patch column, cell row, cell column
    y, _, cell_y, _ = np.meshgrid(spans[1], spans[0], cells, cells, indexing="ij")
    _, x, _, cell_x = np.meshgrid(spans[1], spans[0], cells, cells, indexing="ij")
    left, top = (x + cell_x).ravel(), (y + cell_y).ravel()
    inside = (left >= 0) & (top >= 0) & (left + CELL_PX <= width) & (top + CELL_PX <= height)
    boxes = np.stack([left, top, left + CELL_PX, top + CELL_PX], axis=1).astype(np.float64)
    back = np.array([size[0] / width, size[1] / height])
    return boxes[inside] * np.tile(back, 2), inside


def _patch_starts(length: int) -> np.ndarray:
    """First px of each patch along one side, in the unpadded image; below 0 in the padding."""
    before = max(0, PATCH_PX - length) // 2
    count = max(length, PATCH_PX) // PATCH_PX
    offset = (max(length, PATCH_PX) - count * PATCH_PX) // 2
    return offset + PATCH_PX * np.arange(count) - before


def embed_cells(
    images: LabelledImages,
    encoder: Encoder,
    target_mpp: float,
    *,
    cache_dir: Path,
    batch_size: int = 64,
    num_threads: int = 2,
    max_enlarge: float = MAX_ENLARGE,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One embedding per grid cell.

    At 2.0 um/px the encoder sees the 5x patch and gives its sixteen spatial features; at 0.5 um/px
    it sees each cell as a patch of its own, resampled by Lanczos from the image around it.

    Args:
        images: Of one view.
        encoder: On its device.
        target_mpp: 2.0 or 0.5; others would be embedded at those under their own name.
        cache_dir: As in `features.embed_images`.
        batch_size: Squares per call.
        num_threads: Decode ahead.
        max_enlarge: See `scaled_squares`.
        advance: Called with the number of images finished.

    Returns:
        Split -> features (rows, D) float32 and image (rows,) int64: row r is a cell of that image,
        in the order of `cell_boxes`.

    Raises:
        ProbeError: Another scale, an input that is not 224 px, an encoder without spatial
            features at 2.0 um/px, no whole cell in any image, and what `embed_images` refuses.
    """
    coarse = check_cell_encoder(encoder.name, encoder.input_px, target_mpp)
    check_scales(images, STUDENT_MPP if coarse else TEACHER_MPP, max_enlarge)
    make = _coarse if coarse else _fine
    mpp, kind = (STUDENT_MPP, "spatial") if coarse else (TEACHER_MPP, "cells")
    identity = feature_identity(encoder, images, mpp, f"{RECIPE}; {kind} 4 x 4")
    encode = encoder.spatial_features if coarse else encoder
    return cached_rows(
        {name: make(split, max_enlarge) for name, split in images.splits.items()},
        identity,
        encoder,
        encode=encode,
        cache_dir=cache_dir,
        batch_size=batch_size,
        num_threads=num_threads,
        advance=advance,
    )


def check_cell_encoder(name: str, input_px: int, target_mpp: float) -> bool:
    """Whether an encoder gives cells by its spatial features (at 2.0 um/px), or each on its own.

    Args:
        name: Of the encoder.
        input_px: Side of its input.
        target_mpp: um/px.

    Raises:
        ProbeError: Another scale, or an input that is not 224 px.
    """
    coarse = math.isclose(target_mpp, STUDENT_MPP)
    if not coarse and not math.isclose(target_mpp, TEACHER_MPP):
        raise ProbeError(
            f"{name} at {target_mpp:g} um/px: the dense probe compares the sixteen spatial "
            f"features at {STUDENT_MPP} with sixteen patches at {TEACHER_MPP}; give one of those "
            "as its --mpp."
        )
    if input_px != PATCH_PX:
        raise ProbeError(f"{name}: takes {input_px} px; cells need {PATCH_PX}.")
    return coarse


def _coarse(split: ImageSplit, max_enlarge: float) -> Wanted:
    """5x patches in, the spatial features of whole cells out."""

    def cut(index: int) -> np.ndarray:
        image, mpp = split.image(index), float(split.mpp[index])
        return scaled_squares(image, mpp, STUDENT_MPP, PATCH_PX, max_enlarge=max_enlarge)

    def pool(index: int, cells: np.ndarray) -> np.ndarray:
        mpp = float(split.mpp[index])
        _, inside = cell_boxes(split.size(index), mpp, max_enlarge=max_enlarge)
        return cells.reshape(-1, cells.shape[-1])[inside]  # (patches, 16, D) -> (k, D)

    return Wanted(split, cut, pool)


def _fine(split: ImageSplit, max_enlarge: float) -> Wanted:
    """Each whole cell in as a 20x patch, its embedding out."""

    def cut(index: int) -> np.ndarray:
        image = split.image(index)
        boxes, _ = cell_boxes(image.size, float(split.mpp[index]), max_enlarge=max_enlarge)
        shape, lanczos = (PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS
        # Pillow's kernel reads the pixels around the box, so cells have real neighbours.
        cells = [np.asarray(image.resize(shape, lanczos, box=tuple(box))) for box in boxes]
        return np.stack(cells) if cells else np.zeros((0, *shape, 3), dtype=np.uint8)

    return Wanted(split, cut, lambda _, embeddings: embeddings)

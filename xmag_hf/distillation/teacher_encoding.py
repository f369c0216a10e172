"""What the teacher sees of a corpus, and the passes over it.

Stored images become sub-patches, of the 20x region or of the 5x view enlarged; those that pairs
have in common are encoded once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from xmag_hf.distillation.augmentation import (
    GRID,
    VIEW_PX,
    cell_permutation,
    dihedral_view,
    enlarged_cells,
    sub_patches,
)
from xmag_hf.distillation.corpus import REGION_PX, Corpus, iterate_shard
from xmag_hf.distillation.options import DistillationError

if TYPE_CHECKING:
    from xmag_hf.encoders import Encoder

CELLS = GRID * GRID


def encode_sub_patches(teacher: Encoder, patches: np.ndarray, batch_size: int) -> np.ndarray:
    """Run the teacher over 20x sub-patches.

    Args:
        teacher: Takes uint8 (B, 3, 224, 224).
        patches: (n, 224, 224, 3) uint8.
        batch_size: Sub-patches per call.

    Returns:
        (n, d_T) float32.
    """
    device = next(teacher.parameters()).device
    parts = []
    for start in range(0, len(patches), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(patches[start : start + batch_size]))
        parts.append(teacher(batch.permute(0, 3, 1, 2).to(device)).float().cpu().numpy())
    return np.concatenate(parts)


def shared_cells(corpus: Corpus, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the sub-patches that overlapping pairs have in common.

    Pairs of a slide lie on its grid of 224 px at 0.5 um/px when the stride is a multiple of it.
    Each pair's origin is rounded to a level-0 pixel, so a shared sub-patch differs from the
    pair's own by less than one level-0 pixel. Where pairs of a slide do not lie on such a grid,
    nothing of that slide is shared.

    Args:
        corpus: Whose index is used.
        rows: (n,) rows of the corpus.

    Returns:
        `first` (m,): cells to encode, each as 16 * position in `rows` + cell; `inverse` (n, 16):
        index into `first` of each pair's cells.
    """
    index = corpus.index
    slide, step = index.slide[rows], index.width0[rows] / GRID  # level-0 px of a sub-patch
    column, row = np.empty(len(rows)), np.empty(len(rows))
    on_grid = np.zeros(len(rows), dtype=bool)
    for number in np.unique(slide):
        mine = slide == number
        offset_x = index.x[rows][mine] - index.x[rows][mine].min()
        offset_y = index.y[rows][mine] - index.y[rows][mine].min()
        column[mine], row[mine] = offset_x / step[mine], offset_y / step[mine]
        shift_x = np.abs(column[mine] - column[mine].round()) * step[mine]
        shift_y = np.abs(row[mine] - row[mine].round()) * step[mine]
        on_grid[mine] = max(shift_x.max(), shift_y.max()) <= 1.0
    cell = np.arange(CELLS)
    alone = np.where(on_grid, 0, np.arange(1, len(rows) + 1))[:, None]  # its own key if unshared
    keys = np.stack(
        np.broadcast_arrays(
            slide[:, None],
            alone,
            row.round()[:, None] + cell // GRID,
            column.round()[:, None] + cell % GRID,
        ),
        axis=-1,
    ).astype(np.int64)  # (n, 16, 4)
    _, first, inverse = np.unique(
        keys.reshape(-1, 4), axis=0, return_index=True, return_inverse=True
    )
    return first, inverse.reshape(len(rows), CELLS)


def encode_shard(
    corpus: Corpus,
    rows: np.ndarray,
    teacher: Encoder,
    decoder: ShardDecoder,
    *,
    share: bool,
    batch_size: int,
) -> np.ndarray:
    """Encode every cell of one shard, in every view asked for.

    Args:
        corpus: Whose index says what is shared.
        rows: (n,) rows of the corpus that the shard holds.
        teacher: Frozen encoder.
        decoder: Of the shard.
        share: Encode a cell that several pairs have in common once.
        batch_size: Cells per teacher call.

    Returns:
        (n, n_views, 16, d_T) float16; cells row-major in the turned pair.

    Raises:
        DistillationError: An image that does not decode, or features that are not finite.
    """
    if share:
        first, inverse = shared_cells(corpus, rows)
    else:
        first = np.arange(len(rows) * CELLS)
        inverse = first.reshape(len(rows), CELLS)
    wanted: dict[int, np.ndarray] = {}
    order = np.argsort(first, kind="stable")  # file order
    for flat in np.split(first[order], np.flatnonzero(np.diff(first[order] // CELLS)) + 1):
        if len(flat):
            wanted[int(flat[0]) // CELLS] = flat % CELLS
    encoded = np.empty(
        (len(decoder.dihedral_views), len(first), teacher.embed_dim), dtype=np.float16
    )
    done, queue = 0, []
    for cells in decoder.cells(wanted):
        queue.append(cells)
        if sum(part.shape[0] * part.shape[1] for part in queue) >= batch_size:
            done = _encode_queue(teacher, queue, batch_size, encoded, order, done)
            queue = []
    if queue:
        done = _encode_queue(teacher, queue, batch_size, encoded, order, done)
    if not np.isfinite(encoded).all():
        raise DistillationError(
            f"{decoder.shard}: {teacher.name} at {teacher.precision} gives features that "
            "are not finite as float16. Try --teacher_precision fp32."
        )
    views = enumerate(decoder.dihedral_views)
    return np.stack([encoded[n][inverse[:, cell_permutation(g)]] for n, g in views], axis=1)


def _encode_queue(
    teacher: Encoder,
    queue: list[np.ndarray],
    batch_size: int,
    encoded: np.ndarray,
    order: np.ndarray,
    done: int,
) -> int:
    cells = np.concatenate(queue, axis=1)  # (n_views, k, 224, 224, 3)
    with np.errstate(over="ignore"):  # too large for float16 becomes inf, which is refused above
        features = encode_sub_patches(teacher, cells.reshape(-1, *cells.shape[2:]), batch_size)
        features = features.astype(np.float16).reshape(*cells.shape[:2], -1)
    encoded[:, order[done : done + cells.shape[1]]] = features
    return done + cells.shape[1]


@dataclass(frozen=True)
class ShardDecoder:
    """Decodes what the teacher sees of one shard, a few rows ahead of it.

    Attributes:
        shard: Path or address.
        teacher_view: 20x, or 5x for cells of the 5x view enlarged four times.
        dihedral_views: That each pair is shown in, 0 to 7.
        num_threads: That decode.
    """

    shard: str
    teacher_view: str
    dihedral_views: tuple[int, ...]
    num_threads: int

    def cells(self, wanted: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
        """Yield (n_views, k, 224, 224, 3), the k wanted cells of each row, in file order."""
        with ThreadPoolExecutor(max(1, self.num_threads)) as pool:
            ahead: list[Future[np.ndarray]] = []
            for row, values in iterate_shard(self.shard, [teacher_column(self.teacher_view)]):
                if row in wanted:
                    ahead.append(pool.submit(self._decode, row, values, wanted[row]))
                if len(ahead) > 2 * self.num_threads:
                    yield ahead.pop(0).result()
            for future in ahead:
                yield future.result()

    def _decode(self, row: int, values: dict[str, Any], cells: np.ndarray) -> np.ndarray:
        image = teacher_image(values, self.teacher_view, f"{self.shard} row {row}")
        shown = []
        for view in self.dihedral_views:
            where = np.argsort(cell_permutation(view))[cells]  # in the turned pair
            shown.append(cut_cells(image, self.teacher_view, view)[where])
        return np.stack(shown)


def teacher_column(teacher_view: str) -> str:
    """The stored image that the teacher sees at this view."""
    return f"image_{teacher_view}"


def teacher_image(values: dict[str, Any], teacher_view: str, where: str) -> np.ndarray:
    """Decode the image that the teacher's cells are cut from.

    Args:
        values: Columns of the pair, images as {"bytes", "path"}.
        teacher_view: 20x or 5x.
        where: Pair, for errors.

    Returns:
        (896, 896, 3) or (224, 224, 3) uint8.

    Raises:
        DistillationError: It does not decode or has another size.
    """
    column = teacher_column(teacher_view)
    side_px = REGION_PX if teacher_view == "20x" else VIEW_PX
    return decode_image(values[column]["bytes"], side_px, f"{where} {column}")


def cut_cells(image: np.ndarray, teacher_view: str, dihedral: int) -> np.ndarray:
    """What the teacher sees of a pair.

    Args:
        image: From `teacher_image`.
        teacher_view: 20x, or 5x for cells of the 5x view enlarged four times.
        dihedral: View 0 to 7 of the pair.

    Returns:
        (16, 224, 224, 3) uint8, row-major in the turned pair.
    """
    cut = sub_patches if teacher_view == "20x" else enlarged_cells
    return cut(dihedral_view(image, dihedral))


def decode_image(data: bytes, side_px: int | None, where: str) -> np.ndarray:
    """Decode one stored image.

    Args:
        data: JPEG or PNG.
        side_px: Width and height that it must have; None for any square.
        where: Shard, row and column, for the error.

    Returns:
        (side_px, side_px, 3) uint8.

    Raises:
        DistillationError: It does not decode, or has another size.
    """
    try:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise DistillationError(
            f"{where}: does not decode ({error}). Build that shard again."
        ) from error
    side_px = len(image) if side_px is None else side_px
    if image.shape != (side_px, side_px, 3):
        raise DistillationError(
            f"{where}: {image.shape[1]} x {image.shape[0]} px, expected {side_px} x {side_px}."
        )
    return image

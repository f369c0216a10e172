"""Teacher features of a paired corpus, computed once.

One HDF5 file per shard in `<cache>/<key>/`, row i belonging to row i of the shard. The key names
everything that the numbers depend on, so another teacher, precision or corpus cannot be mistaken
for this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from PIL import Image

from xmag_hf._version import __version__
from xmag_hf.distillation.augmentation import GRID, sub_patches
from xmag_hf.distillation.corpus import REGION_PX, Corpus, iterate_shard
from xmag_hf.distillation.options import DistillationError

if TYPE_CHECKING:
    from xmag_hf.encoders import Encoder

FORMAT_VERSION = 1
CELLS = GRID * GRID
MOST_OPEN_FILES = 64  # of thousands of shards, in every loader process
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherIdentity:
    """What the features depend on.

    Attributes:
        encoder: Table name or id of the teacher.
        revision: Of its weights.
        precision: fp32, bf16 or fp16.
        normalisation: Mean and sd as text.
        corpus_fingerprint: Of the paired corpus.
    """

    encoder: str
    revision: str
    precision: str
    normalisation: str
    corpus_fingerprint: str

    @property
    def key(self) -> str:
        """First 16 hex digits of sha256 over the five fields."""
        fields = [
            self.encoder,
            self.revision,
            self.precision,
            self.normalisation,
            self.corpus_fingerprint,
        ]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def teacher_identity(teacher: Encoder, corpus: Corpus) -> TeacherIdentity:
    """Identity of `teacher`'s features on `corpus`."""
    return TeacherIdentity(
        teacher.name,
        teacher.revision,
        teacher.precision,
        teacher.normalisation,
        corpus.fingerprint,
    )


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


def find_cache(
    cache_dir: Path,
    encoder: str,
    corpus: Corpus,
    *,
    precision: str | None = None,
    revision: str | None = None,
    share: bool = True,
) -> TeacherIdentity | None:
    """Find a complete cache of `encoder` on `corpus`, without loading the encoder.

    Args:
        cache_dir: Holds one folder per key.
        encoder: Name of the teacher.
        corpus: The features must belong to.
        precision: Wanted; None takes any.
        revision: Of the teacher's weights now; a cache of others is stale and not found. None
            (the Hub cannot be asked) takes any.
        share: Whether shared sub-patches are wanted.

    Returns:
        Its identity, or None.

    Raises:
        DistillationError: Several fit, or the only one was made with the other `share`.
    """
    found = []
    for folder in sorted(path for path in cache_dir.glob("*") if path.is_dir()):
        names = [shard_name(number, len(corpus.shards)) for number in range(len(corpus.shards))]
        if folder.suffix == ".partial" or not all((folder / name).exists() for name in names):
            continue
        attributes = _attributes(folder / names[0])
        identity = TeacherIdentity(
            *(str(attributes.get(f.name)) for f in dataclasses.fields(TeacherIdentity))
        )
        same = (identity.encoder, identity.corpus_fingerprint) == (encoder, corpus.fingerprint)
        same = same and precision in (None, identity.precision)
        if same and revision in (None, identity.revision):
            found.append(identity)
            if attributes.get("sharing") != _sharing(share):
                raise DistillationError(
                    f"{folder}: sub-patches shared: {attributes.get('sharing')}, wanted "
                    f"{_sharing(share)}. Delete that folder, or change --share-sub-patches."
                )
    if len(found) > 1:
        keys = ", ".join(f"{i.key} ({i.revision}, {i.precision})" for i in found)
        raise DistillationError(
            f"{cache_dir}: several caches of {encoder} fit: {keys}. Delete all but one, or name "
            "one with --teacher-precision."
        )
    return found[0] if found else None


def build_cache(
    corpus: Corpus,
    teacher: Encoder,
    cache_dir: Path,
    *,
    share: bool = True,
    batch_size: int = 128,
    num_threads: int = 2,
    rank: int = 0,
    world: int = 1,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Path:
    """Compute the features of every pair, shard by shard; finished shards are not done again.

    Args:
        corpus: To encode.
        teacher: Frozen 20x encoder.
        cache_dir: Holds one folder per key.
        share: Encode a sub-patch seen by several pairs of a shard once.
        batch_size: Sub-patches per teacher call.
        num_threads: Decode JPEGs ahead of the teacher.
        rank: This process does shards `rank::world`.
        world: Number of processes that build together.
        advance: Called with the number of pairs finished, for progress bars.

    Returns:
        The folder `<key>.partial`, to be given to `finish_cache` once every process is done.

    Raises:
        DistillationError: An image that does not decode (shard and row are named), or features
            that are not finite.
    """
    identity = teacher_identity(teacher, corpus)
    partial = cache_dir / f"{identity.key}.partial"
    reopen_cache(cache_dir, identity)
    partial.mkdir(parents=True, exist_ok=True)
    starts = corpus.shard_starts
    for number in range(rank, len(corpus.shards), world):
        path = partial / shard_name(number, len(corpus.shards))
        rows = np.arange(starts[number], starts[number + 1])
        if not _done_with(path, share):
            features = _encode_shard(corpus, number, rows, teacher, share, batch_size, num_threads)
            attributes = {"sharing": _sharing(share), "licence": teacher.licence}
            write_features(path, features, corpus, rows, identity, attributes)
        advance(len(rows))
    return partial


def reopen_cache(cache_dir: Path, identity: TeacherIdentity) -> None:
    """Make a folder that lacks shards (someone deleted a bad one) unfinished again."""
    final = cache_dir / identity.key
    # Another process of the same build may be the one that renames it.
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, final.with_name(f"{identity.key}.partial"))


def finish_cache(partial: Path) -> Path:
    """Give a complete cache its final name; called by one process.

    Args:
        partial: From `build_cache`.

    Returns:
        The folder of the cache.
    """
    final = partial.with_name(partial.name.removesuffix(".partial"))
    os.rename(partial, final)
    return final


def shard_name(number: int, count: int) -> str:
    """File name of the features of shard `number` of `count`."""
    return f"features-{number:05d}-of-{count:05d}.h5"


def write_features(
    path: Path,
    features: np.ndarray,
    corpus: Corpus,
    rows: np.ndarray,
    identity: TeacherIdentity,
    attributes: dict[str, Any],
) -> None:
    """Write one shard's features under a temporary name, sync, and rename.

    Args:
        path: Final name.
        features: (n, 16, d_T) float16.
        corpus: Gives slide_id, x, y of each row.
        rows: (n,) rows of the corpus.
        identity: Stored as attributes and checked on opening.
        attributes: Further attributes.
    """
    for stale in path.parent.glob(f"{path.stem}.tmp*"):  # of a killed or failed build
        stale.unlink()
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    index = corpus.index
    with h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=features, chunks=(1, *features.shape[1:]))
        names = index.slide_names[index.slide[rows]]
        file.create_dataset("slide_id", data=names.astype(object), dtype=h5py.string_dtype())
        file.create_dataset("x", data=index.x[rows])
        file.create_dataset("y", data=index.y[rows])
        for name, value in (vars(identity) | attributes).items():
            file.attrs[name] = value
        file.attrs["format"] = "xmag-teacher-features"
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["created_by"] = f"xmag_hf {__version__}"
        file.flush()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class TeacherFeatures:
    """Read access to a complete cache, by row of the corpus. Picklable: files open on first use.

    Args:
        folder: Of one key.
        corpus: That it must belong to.
        identity: That it must carry.

    Raises:
        DistillationError: A file is missing, stale or belongs to other pairs; the file, the value
            and the remedy are named.
    """

    def __init__(self, folder: Path, corpus: Corpus, identity: TeacherIdentity) -> None:
        self.folder = folder
        self.starts = corpus.shard_starts
        self.paths = [
            folder / shard_name(number, len(corpus.shards)) for number in range(len(corpus.shards))
        ]
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        dims = {_check_file(path, n, corpus, identity) for n, path in enumerate(self.paths)}
        if len(dims) != 1:
            raise DistillationError(f"{folder}: shards differ in feature width: {sorted(dims)}.")
        self.teacher_dim: int = dims.pop()

    def __getitem__(self, row: int) -> np.ndarray:
        """(16, d_T) float16 of one pair."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        if number not in self._files:
            # Rows are read once an epoch, in random order: HDF5's own cache would only fill memory.
            self._files[number] = h5py.File(self.paths[number], "r", rdcc_nbytes=0)
            if len(self._files) > MOST_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]["features"][row - self.starts[number]]  # type: ignore[index]

    @property
    def licence(self) -> str:
        """Licence of the teacher, as its card said when the features were made."""
        with h5py.File(self.paths[0], "r") as file:
            return str(file.attrs["licence"])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(n, 16, d_T) float16 of several pairs."""
        return np.stack([self[int(row)] for row in rows])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # an open HDF5 file must not cross a fork


def _sharing(share: bool) -> str:
    return "within shards" if share else "none"


def _done_with(path: Path, share: bool) -> bool:
    """Whether a shard of an unfinished cache is there, made the same way."""
    return _attributes(path).get("sharing") == _sharing(share)


def _attributes(path: Path) -> dict[str, Any]:
    """Of a file of the cache; none if it is absent or damaged."""
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except OSError:
        return {}


def _check_file(path: Path, number: int, corpus: Corpus, identity: TeacherIdentity) -> int:
    """Raise unless the file belongs to this shard and identity; return d_T."""
    remedy = f"Delete {path} and run again: only that shard is computed anew."
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DistillationError(f"{path}: missing or damaged ({error}). {remedy}") from error
    with file:
        if file.attrs.get("format_version") != FORMAT_VERSION:
            found = file.attrs.get("format_version")
            raise DistillationError(
                f"{path}: format_version is {found}, this reads {FORMAT_VERSION}. {remedy}"
            )
        for name, expected in vars(identity).items():
            if file.attrs.get(name) != expected:
                raise DistillationError(
                    f"{path}: {name} is {file.attrs.get(name)!r}, expected {expected!r}. {remedy}"
                )
        rows = np.arange(corpus.shard_starts[number], corpus.shard_starts[number + 1])
        index = corpus.index
        slide_ids = np.array(file["slide_id"].asstr()[:], dtype=object)  # type: ignore[union-attr]
        same = (
            len(slide_ids) == len(rows)
            and np.array_equal(slide_ids, index.slide_names[index.slide[rows]])
            and np.array_equal(file["x"][:], index.x[rows])  # type: ignore[index]
            and np.array_equal(file["y"][:], index.y[rows])  # type: ignore[index]
        )
        shape = file["features"].shape  # type: ignore[union-attr]
        if not same or shape[:2] != (len(rows), CELLS):
            raise DistillationError(
                f"{path}: its {shape[0]} rows are not the {len(rows)} pairs of "
                f"{corpus.shards[number]}. {remedy}"
            )
        return int(shape[2])


def _encode_shard(
    corpus: Corpus,
    number: int,
    rows: np.ndarray,
    teacher: Encoder,
    share: bool,
    batch_size: int,
    num_threads: int,
) -> np.ndarray:
    """(n, 16, d_T) float16 of one shard."""
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
    encoded = np.empty((len(first), teacher.embed_dim), dtype=np.float16)
    done, queue = 0, []
    for patches in _decoded(corpus.shards[number], wanted, num_threads):
        queue.append(patches)
        if sum(map(len, queue)) >= batch_size:
            done = _encode_queue(teacher, queue, batch_size, encoded, order, done)
            queue = []
    if queue:
        done = _encode_queue(teacher, queue, batch_size, encoded, order, done)
    if not np.isfinite(encoded).all():
        raise DistillationError(
            f"{corpus.shards[number]}: {teacher.name} at {teacher.precision} gives features that "
            "are not finite as float16. Try --teacher_precision fp32."
        )
    return encoded[inverse]


def _encode_queue(
    teacher: Encoder,
    queue: list[np.ndarray],
    batch_size: int,
    encoded: np.ndarray,
    order: np.ndarray,
    done: int,
) -> int:
    patches = np.concatenate(queue)
    with np.errstate(over="ignore"):  # too large for float16 becomes inf, which is refused above
        features = encode_sub_patches(teacher, patches, batch_size).astype(np.float16)
    encoded[order[done : done + len(patches)]] = features
    return done + len(patches)


def _decoded(shard: str, wanted: dict[int, np.ndarray], num_threads: int) -> Iterator[np.ndarray]:
    """Yield the wanted sub-patches of each row, decoded a few rows ahead."""
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        ahead: list[Future[np.ndarray]] = []
        for row, values in iterate_shard(shard, ["image_20x"]):
            if row in wanted:
                data = values["image_20x"]["bytes"]
                ahead.append(pool.submit(_decode_cells, shard, row, data, wanted[row]))
            if len(ahead) > 2 * num_threads:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def _decode_cells(shard: str, row: int, data: bytes, cells: np.ndarray) -> np.ndarray:
    return sub_patches(decode_image(data, REGION_PX, f"{shard} row {row} image_20x"))[cells]


def decode_image(data: bytes, side_px: int, where: str) -> np.ndarray:
    """Decode one stored image.

    Args:
        data: JPEG or PNG.
        side_px: Width and height that it must have.
        where: Shard, row and column, for the error.

    Returns:
        (side_px, side_px, 3) uint8.

    Raises:
        DistillationError: It does not decode or has another size.
    """
    try:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise DistillationError(
            f"{where}: does not decode ({error}). Build that shard again."
        ) from error
    if image.shape != (side_px, side_px, 3):
        raise DistillationError(
            f"{where}: {image.shape[1]} x {image.shape[0]} px, expected {side_px} x {side_px}."
        )
    return image

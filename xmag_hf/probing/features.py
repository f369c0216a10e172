"""Frozen embeddings of a data set, computed once and kept.

The key and the attributes are those of the teacher-feature cache (`distillation.teacher_cache`),
with the scale, the recipe and what a row is beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import shutil
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from xmag_hf._version import __version__
from xmag_hf.atomic_write import atomic_file
from xmag_hf.encoders import Encoder

from .errors import ProbeError
from .images import ImageSplit, LabelledImages
from .patches import MAX_ENLARGE, RECIPE, scaled_size, scaled_squares

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 2: pooling
CHUNK_IMAGES = 512  # what an interrupted run loses at most
# Index of an image -> its squares (k, side, side, 3) uint8.
Cut = Callable[[int], np.ndarray]
# Index of an image and what the encoder gave for its k squares -> (rows, D).
Pool = Callable[[int, np.ndarray], np.ndarray]


def _silent(done: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class FeatureIdentity:
    """What the features depend on.

    Attributes:
        encoder: Table name or id.
        revision: Of its weights.
        precision: fp32, bf16 or fp16.
        normalisation: Mean, sd and input size as text.
        pooling: How the encoder makes one vector of its tokens or map.
        corpus_fingerprint: Of the images.
        mpp: um/px at which the encoder saw them.
        recipe: From image to squares, and from squares to rows.
    """

    encoder: str
    revision: str
    precision: str
    normalisation: str
    pooling: str
    corpus_fingerprint: str
    mpp: float
    recipe: str

    @property
    def key(self) -> str:
        """First 16 hex digits of sha256 over the fields."""
        fields = list(dataclasses.astuple(self))
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def feature_identity(
    encoder: Encoder, images: LabelledImages, mpp: float, recipe: str
) -> FeatureIdentity:
    """Identity of `encoder`'s features of `images` at `mpp`."""
    return FeatureIdentity(
        encoder.name,
        encoder.revision,
        encoder.precision,
        encoder.normalisation,
        encoder.card.pooling,
        images.fingerprint,
        float(mpp),
        recipe,
    )


def embed_images(
    images: LabelledImages,
    encoder: Encoder,
    target_mpp: float,
    *,
    cache_dir: Path,
    batch_size: int = 64,
    num_threads: int = 2,
    max_enlarge: float = MAX_ENLARGE,
    advance: Callable[[int], None] = _silent,
    checked: Callable[[int], None] = _silent,
) -> dict[str, np.ndarray]:
    """Embed every image as the mean over its squares (`patches.scaled_squares`).

    Args:
        images: Of one view (`LabelledImages.at`).
        encoder: On its device.
        target_mpp: um/px at which the encoder sees the tissue.
        cache_dir: Holds a folder per key; read if the key is there, else filled.
        batch_size: Squares per call.
        num_threads: Decode and resample ahead.
        max_enlarge: See `scaled_squares`.
        advance: Called with the number of images finished.
        checked: Called with the number of images found to decode, which comes first.

    Returns:
        Split -> (N, D) float32, in the order of the split.

    Raises:
        ProbeError: An image that does not decode or is too coarse (found before anything is
            encoded), features that are not finite, or a cache that belongs to other images.
    """
    side = encoder.input_px
    identity = feature_identity(encoder, images, target_mpp, f"{RECIPE}; mean")
    check_scales(images, target_mpp, max_enlarge)

    def cutter(split: ImageSplit) -> Cut:
        def cut(index: int) -> np.ndarray:
            name, mpp = f"image {split.ids[index]!r}", float(split.mpp[index])
            image = split.image(index)
            return scaled_squares(image, mpp, target_mpp, side, name=name, max_enlarge=max_enlarge)

        return cut

    wanted = {
        name: Wanted(split, cutter(split), lambda _, x: x.mean(axis=0, keepdims=True))
        for name, split in images.splits.items()
    }
    found = cached_rows(
        wanted,
        identity,
        encoder,
        cache_dir=cache_dir,
        batch_size=batch_size,
        num_threads=num_threads,
        advance=advance,
        checked=checked,
    )
    return {name: features for name, (features, _) in found.items()}


def check_scales(images: LabelledImages, target_mpp: float, max_enlarge: float) -> None:
    """Refuse images that are too coarse for `target_mpp`, before one is decoded."""
    for split in images.splits.values():
        worst = int(np.argmax(split.mpp))
        mpp, name = float(split.mpp[worst]), f"image {split.ids[worst]!r}"
        scaled_size((1, 1), mpp, target_mpp, name=name, max_enlarge=max_enlarge)


@dataclass(frozen=True)
class Wanted:
    """What to compute of one split.

    Attributes:
        split: The images.
        cut: See `Cut`; called from several threads.
        pool: See `Pool`.
    """

    split: ImageSplit
    cut: Cut
    pool: Pool


def cached_rows(
    wanted: dict[str, Wanted],
    identity: FeatureIdentity,
    encoder: Encoder,
    *,
    cache_dir: Path,
    encode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    num_threads: int = 2,
    advance: Callable[[int], None] = _silent,
    checked: Callable[[int], None] = _silent,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of every split: read from the cache, or computed and put there.

    An interrupted computation leaves chunks in `<key>/<split>.partial/` and goes on from them. Of
    processes at the same work the first to end takes them away; the others read what it has made.

    Args:
        wanted: By split.
        identity: Of the features.
        encoder: On its device.
        cache_dir: Holds a folder per key.
        encode: (B, 3, S, S) uint8 on the encoder's device -> (B, ...); default the encoder.
        batch_size: Squares per call.
        num_threads: Decode ahead.
        advance: Called with the number of images finished.
        checked: As `embed_images`.

    Returns:
        Split -> features (rows, D) float32, and image (rows,) int64, the image of each row.

    Raises:
        ProbeError: As `embed_images`.
    """
    folder = cache_dir / identity.key
    paths = {name: folder / f"{name}.h5" for name in wanted}
    for name, path in paths.items():
        if not path.is_file():
            mark = cache_dir / "decoded" / f"{identity.corpus_fingerprint}-{name}.txt"
            _check_once(wanted[name].split, mark, num_threads, checked)
    for name, path in paths.items():
        if path.is_file():
            advance(len(wanted[name].split))
            continue
        partial = folder / f"{name}.partial"
        engine = _Engine(encoder, encode or encoder, batch_size, num_threads)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            features, image = _compute(wanted[name], engine, partial, advance)
            _write(path, features, image, wanted[name].split, identity)
            shutil.rmtree(partial)
        except OSError:
            if not path.is_file():  # nobody else has made it
                raise
    return {name: _read(path, wanted[name].split, identity) for name, path in paths.items()}


def _check_once(
    split: ImageSplit, mark: Path, num_threads: int, checked: Callable[[int], None]
) -> None:
    """`check_decodes`, unless an earlier row or run has found these very bytes sound.

    `mark` is named after the fingerprint, and says so.
    """
    text = f"All {len(split)} images decode with Pillow {PIL.__version__}.\n"
    if mark.is_file() and mark.read_text() == text:
        return
    check_decodes(split, num_threads, checked)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(text)


def check_decodes(
    split: ImageSplit, num_threads: int, checked: Callable[[int], None] = _silent
) -> None:
    """Decode every image once, so that a damaged one is found before hours of encoding.

    JPEGs are decoded at an eighth of their size: it reads all of the file at a third of the cost.

    Raises:
        ProbeError: The first five images that do not decode, and how many there are.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(lambda index: _damage(split, index), range(len(split)))
        errors = []
        for error in found:
            checked(1)
            if error:
                errors.append(error)
    if errors:
        more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
        raise ProbeError(f"{len(errors)} of {len(split)}: {'; '.join(errors[:5])}{more}")


def _damage(split: ImageSplit, index: int) -> str | None:
    try:
        with Image.open(io.BytesIO(split.read(index))) as image:
            if image.format == "JPEG":
                image.draft("RGB", (1, 1))
                image.load()
                return None
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        pass  # decoded again below, for the message that names the image
    try:
        split.image(index)
    except ProbeError as error:
        return str(error)
    return None


# --- computing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    encoder: Encoder
    encode: Callable[[Tensor], Tensor]
    batch_size: int
    num_threads: int

    def run(self, squares: np.ndarray) -> np.ndarray:
        """(n, S, S, 3) uint8 -> (n, ...) float32."""
        if not len(squares):
            return np.zeros((0, self.encoder.embed_dim), dtype=np.float32)
        parts = []
        for start in range(0, len(squares), self.batch_size):
            batch = torch.from_numpy(squares[start : start + self.batch_size])
            batch = batch.to(self.encoder.device).permute(0, 3, 1, 2).contiguous()
            with torch.no_grad():
                parts.append(self.encode(batch).float().cpu().numpy())
        return np.concatenate(parts)


def _compute(
    wanted: Wanted, engine: _Engine, partial: Path, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Features and image of every row, chunk by chunk; finished chunks are read back."""
    features, image = [], []
    for start in range(0, len(wanted.split), CHUNK_IMAGES):
        rows = range(start, min(start + CHUNK_IMAGES, len(wanted.split)))
        path = partial / f"{rows.start:08d}-{rows.stop:08d}.npz"
        stored = _stored_chunk(path, len(rows))
        if stored is not None:
            chunk, counts = stored
            advance(len(rows))
        else:
            chunk, counts = _compute_chunk(wanted, engine, rows, advance)
            with atomic_file(path) as stream:
                np.savez(stream, features=chunk, counts=counts)
        features.append(chunk)
        image.append(np.repeat(np.arange(rows.start, rows.stop), counts))
    return np.concatenate(features), np.concatenate(image)


def _stored_chunk(path: Path, images: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A chunk that an interrupted run left; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            chunk, counts = stored["features"], stored["counts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s: damaged (%s); computed anew.", path, error)
        return None
    if len(counts) != images or counts.sum() != len(chunk):
        logger.warning("%s: not of %d images; computed anew.", path, images)
        return None
    return chunk, counts


def _compute_chunk(
    wanted: Wanted, engine: _Engine, rows: range, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    parts: list[np.ndarray] = []
    queue: list[tuple[int, np.ndarray]] = []

    def flush() -> None:
        if not queue:
            return
        encoded = engine.run(np.concatenate([squares for _, squares in queue]))
        ends = np.cumsum([len(squares) for _, squares in queue])
        for (index, _), own in zip(queue, np.split(encoded, ends[:-1]), strict=True):
            part = wanted.pool(index, own).astype(np.float32)
            if not np.isfinite(part).all():
                raise ProbeError(
                    f"image {wanted.split.ids[index]!r}: {engine.encoder.name} at "
                    f"{engine.encoder.precision} gives features that are not finite. Try "
                    "--precision fp32."
                )
            parts.append(part)
        advance(len(queue))
        queue.clear()

    for index, squares in _ahead(wanted.cut, rows, engine.num_threads):
        queue.append((index, squares))
        if sum(len(own) for _, own in queue) >= engine.batch_size:
            flush()
    flush()
    return np.concatenate(parts), np.array([len(part) for part in parts])


def _ahead(cut: Cut, rows: range, num_threads: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each image's squares, in order, cut a few images ahead."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[int, Future[np.ndarray]]] = deque()
        try:
            for index in rows:
                waiting.append((index, pool.submit(cut, index)))
                if len(waiting) > 4 * num_threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


# --- the file --------------------------------------------------------------------------------


def _write(
    path: Path,
    features: np.ndarray,
    image: np.ndarray,
    split: ImageSplit,
    identity: FeatureIdentity,
) -> None:
    """Write one split, whole or not at all."""
    with atomic_file(path) as draft, h5py.File(draft.name, "w") as file:
        file.create_dataset("features", data=features)
        file.create_dataset("image", data=image)
        file.create_dataset("ids", data=split.ids.astype(object), dtype=h5py.string_dtype())
        for name, value in vars(identity).items():
            file.attrs[name] = value
        file.attrs["format"] = "xmag-probe-features"
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["created_by"] = f"xmag_hf {__version__}"


def _read(
    path: Path, split: ImageSplit, identity: FeatureIdentity
) -> tuple[np.ndarray, np.ndarray]:
    """Read one split's file, after checking that it is this split's."""
    remedy = f"Delete {path} and run again: only that split is embedded anew."
    try:
        with h5py.File(path, "r") as file:
            expected = vars(identity) | {"format_version": FORMAT_VERSION}
            wrong = {n: file.attrs.get(n) for n, v in expected.items() if file.attrs.get(n) != v}
            ids = np.array(file["ids"].asstr()[:], dtype=object)  # type: ignore[union-attr]
            features = np.asarray(file["features"], dtype=np.float32)
            image = np.asarray(file["image"], dtype=np.int64)
    except (OSError, KeyError) as error:
        raise ProbeError(f"{path}: damaged ({error}). {remedy}") from error
    if wrong:
        raise ProbeError(f"{path}: holds {wrong}, which is not what its key says. {remedy}")
    if not np.array_equal(ids, split.ids) or len(features) != len(image):
        raise ProbeError(f"{path}: holds {len(ids)} other images than the data set. {remedy}")
    return features, image

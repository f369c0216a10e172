"""What end-to-end training reads of a slide every epoch, computed once and kept on disk.

Without augmentation that is the output of the encoder's frozen part, so that only the trained
stages run each epoch; with it, the pixels. One HDF5 file a slide in a folder named after all that
they depend on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from xmag_hf.atomic_write import atomic_file
from xmag_hf.embedding.ahead import ahead
from xmag_hf.embedding.options import EmbedOptions
from xmag_hf.embedding.plan import PatchGeometry, SlidePlan, plan_slide
from xmag_hf.embedding.read import PatchBatch, read_patches
from xmag_hf.embedding.sources import SLIDE_FAULTS, SlideSource, changed_at, reason_of
from xmag_hf.encoder_files import tensors_digest
from xmag_hf.modeling import XMAGForSlideClassification
from xmag_hf.slides import sha256_head
from xmag_hf.slides.tissue import METHOD as TISSUE_METHOD

from .e2e_options import PIXEL_OPTIONS
from .errors import MILError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
BATCHES_AHEAD = 3
# (n, S, S, 3) uint8 -> what is kept of them, (n, ...).
Keep = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FrozenCache:
    """Where the rows of slides lie.

    Attributes:
        folder: `<cache_dir>/<key>`.
        pixels: Rows are pixels (S, S, 3) uint8, else the frozen part's output.
        dtype: Of the rows.
        geometry: Of the patches.
        options: Of reading.
    """

    folder: Path
    pixels: bool
    dtype: str
    geometry: PatchGeometry
    options: EmbedOptions

    def path(self, slide_id: str) -> Path:
        """The slide's file."""
        return self.folder / f"{slide_id}.h5"

    def rows(self, slide_id: str) -> Tensor:
        """Rows of a slide, (M, ...).

        Raises:
            MILError: The file is damaged.
        """
        path = self.path(slide_id)
        try:
            with h5py.File(path, "r") as file:
                return torch.from_numpy(file["rows"][()])  # type: ignore[index]
        except (OSError, KeyError) as error:
            raise MILError(f"{path}: damaged ({error}). Remove it and run again.") from error

    def origin(self, slide_id: str) -> tuple[str, int]:
        """What a slide's rows were made from, see `_origin`; and how many patches they lack."""
        with h5py.File(self.path(slide_id), "r") as file:
            attributes: Any = file.attrs
            return str(attributes["origin"]), int(attributes["lost"])


def frozen_cache(
    cache_dir: Path,
    model: XMAGForSlideClassification,
    geometry: PatchGeometry,
    options: EmbedOptions,
    *,
    pixels: bool,
    dtype: str,
    precision: str = "no",
) -> FrozenCache:
    """The cache of these slides' frozen part; its key names all that the rows depend on.

    Args:
        cache_dir: Holds a folder per key.
        model: Its frozen part and its encoder's normalisation are in the key.
        geometry: Of the patches.
        options: Of reading.
        pixels: Keep pixels.
        dtype: Of the frozen part's output, float16 or float32.
        precision: accelerate's name of what it is computed in.

    Returns:
        The cache; nothing is computed.
    """
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "geometry": dataclasses.asdict(geometry),
        "reading": {name: getattr(options, name) for name in PIXEL_OPTIONS},
        "tissue": TISSUE_METHOD,
        "pixels": pixels,
    }
    if not pixels:
        state = {
            f"{number}.{name}": tensor.cpu()
            for number, module in enumerate(model.frozen_modules())
            for name, tensor in module.state_dict().items()
        }
        facts |= {"frozen": tensors_digest(state), "dtype": dtype, "precision": precision}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return FrozenCache(cache_dir / key, pixels, "uint8" if pixels else dtype, geometry, options)


def fill_cache(
    cache: FrozenCache,
    sources: Sequence[SlideSource],
    keep: Keep,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    step: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Compute what is missing.

    Args:
        cache: To fill.
        sources: The slides.
        keep: Pixels of patches -> their rows.
        batch_size: Patches a call of `keep`.
        device: Where patches are resampled.
        step: Called after each slide.

    Returns:
        Slides that cannot be used -> the reason: unreadable, no scale, no tissue.

    Raises:
        MILError: The frozen part's output does not fit into the type it is kept in.
        OSError: The cache cannot be written.
    """
    cache.folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for source in sources:
        plan, origin = None, ""
        try:
            origin = _origin(cache, source)
            if not _complete(cache, source, origin):
                plan = plan_slide(source, cache.geometry, cache.options)
        except SLIDE_FAULTS as error:
            failed[source.slide_id] = reason_of(source.slide_id, error)
        if plan is not None:
            batches = read_patches(
                plan, batch_size=batch_size, threads=cache.options.threads, device=device
            )
            try:
                _write(
                    cache, plan, origin, ahead(_faults_named(batches, plan), BATCHES_AHEAD), keep
                )
            except _SlideFault as error:
                failed[source.slide_id] = str(error)
        step()
    return failed


class _SlideFault(Exception):
    """A slide that breaks while it is read, or has nothing to read: unlike a full disk."""


def _faults_named(
    batches: Iterator[PatchBatch], plan: SlidePlan
) -> Generator[PatchBatch, None, None]:
    try:
        yield from batches
    except SLIDE_FAULTS as error:
        raise _SlideFault(reason_of(plan.source.slide_id, error)) from error


def _write(
    cache: FrozenCache, plan: SlidePlan, origin: str, batches: Iterator[PatchBatch], keep: Keep
) -> None:
    """Write one slide's file, whole or not at all."""
    slide_id, path = plan.source.slide_id, cache.path(plan.source.slide_id)
    lost: list[tuple[int, str]] = []
    with atomic_file(path) as draft, h5py.File(draft.name, "w") as file:
        for batch in batches:
            lost += batch.unreadable
            if len(batch.rows):
                values = keep(torch.as_tensor(batch.pixels)).cpu().numpy()
                _append(file, _in_type(values, cache.dtype, slide_id), len(plan.coords))
        if "rows" not in file:
            first = f" First unreadable: {lost[0][1]}" if lost else ""
            raise _SlideFault(
                f"{slide_id}: no patch of {plan.grid_patches} holds enough tissue, or could be "
                f"decoded.{first} Look at it, or lower --tissue."
            )
        file.attrs.update({"origin": origin, "lost": len(lost)})
    if lost:
        _warn_of_loss(slide_id, len(lost))


def _warn_of_loss(slide_id: str, lost: int) -> None:
    logger.warning(
        "%s: %d patches could not be decoded; what is left of it is used. Copy the slide again.",
        slide_id, lost,
    )  # fmt: skip


def _append(file: h5py.File, values: np.ndarray, most: int) -> None:
    """Add rows to those that are there, of `most` at the end."""
    shape = values.shape[1:]
    if "rows" not in file:
        file.create_dataset(
            "rows", (0, *shape), values.dtype, chunks=(1, *shape), maxshape=(most, *shape)
        )
    rows: Any = file["rows"]
    rows.resize(len(rows) + len(values), axis=0)
    rows[-len(values) :] = values


def _in_type(values: np.ndarray, dtype: str, slide_id: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        kept = values.astype(dtype, copy=False)
    if dtype != "uint8" and not np.isfinite(kept).all():
        raise MILError(
            f"{slide_id}: the frozen part's output exceeds {dtype}, or is not finite. Keep it as "
            "float32 (--kept-type float32)."
        )
    return kept


def _origin(cache: FrozenCache, source: SlideSource) -> str:
    """What a slide's rows depend on beside the key: the file, a given um/px, the annotation."""
    given = cache.options.slide_mpp if source.mpp is None else source.mpp
    annotation = source.tissue_geojson
    drawn = None if annotation is None else hashlib.sha256(annotation.read_bytes()).hexdigest()
    return json.dumps([sha256_head(source.path), given, drawn])


def _complete(cache: FrozenCache, source: SlideSource, origin: str) -> bool:
    """Whether the slide's file is there, whole and of this very slide, read in this very way.

    One that lacks patches is not, if the slide was copied again since; else that is told again.
    """
    path = cache.path(source.slide_id)
    try:
        found, lost = cache.origin(source.slide_id)
    except (OSError, KeyError):
        return False  # made anew
    if found != origin or (lost and changed_at(source.path) > path.stat().st_mtime):
        return False
    if lost:
        _warn_of_loss(source.slide_id, lost)
    return True

"""Bags as training reads them: mapped from their files, checked once, padded by the batch."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from xmag_hf.embedding.bag import open_h5, own_dataset, read_bag, read_info

from .errors import MILError

logger = logging.getLogger(__name__)

_MAPPED_TYPES = (np.dtype("<f2"), np.dtype("<f4"))
# Slides are sorted by length within so many batches: less padding, and still another mix an epoch.
_SORTED_BATCHES = 16


class BagContentError(MILError):
    """A bag that no head can learn from: without patches, or with values that are not finite."""


@dataclass(frozen=True)
class BagFile:
    """Where the features of a slide lie.

    Attributes:
        path: The bag.
        patches: M.
        embed_dim: D.
        identity: What heads compare, see `BagInfo`.
        dtype: Of the features as stored.
        offset: Of the features in the file, in bytes, where they lie there in one piece; else None.
        checksum: CRC-32 of the features.
        lost: Patches of the slide that it lacks, since they could not be decoded.
    """

    path: Path
    patches: int
    embed_dim: int
    identity: dict[str, Any] = field(hash=False)
    dtype: str
    offset: int | None
    checksum: int
    lost: int = 0

    @property
    def slide_id(self) -> str:
        """The file's stem."""
        return self.path.stem

    def features(self) -> np.ndarray:
        """(M, D), mapped where it can be: pages come from the disk when they are used."""
        if self.offset is None:
            return read_bag(self.path).features
        shape = (self.patches, self.embed_dim)
        # Copy-on-write, since torch warns of memory that it must not write to.
        return np.memmap(self.path, self.dtype, "c", self.offset, shape)


def open_bag(path: Path) -> BagFile:
    """Look at a bag, and read it once: every later fault would come in the middle of a training.

    Args:
        path: Any bag that `read_bag` reads.

    Returns:
        Where its features lie.

    Raises:
        BagContentError: No patches, or features that are not finite.
        BagError: No bag.
        OSError: It cannot be opened.
    """
    info, shape = read_info(path)
    if not shape["patches"]:
        raise BagContentError(f"{path.stem}: an empty bag, without a patch.")
    with open_h5(path) as file:
        dataset = own_dataset(path, file, "features")
        dtype, offset = dataset.dtype, _mapped_offset(file, dataset)
    bag = BagFile(
        path=path,
        patches=shape["patches"],
        embed_dim=shape["embed_dim"],
        identity=info.identity,
        dtype=dtype.str,
        offset=offset,
        checksum=0,
        lost=info.unreadable_patches or 0,
    )
    features = np.ascontiguousarray(bag.features())
    bad = np.logical_not(np.isfinite(features).all(axis=1))
    if bad.any():
        raise BagContentError(
            f"{path.stem}: {int(bad.sum())} of {bag.patches} patches have NaN or infinite "
            f"features, the first is row {int(bad.argmax())}. Embed the slide again."
        )
    return replace(bag, checksum=zlib.crc32(features.view(np.uint8).data))


def spokesman(bags: Sequence[BagFile]) -> BagFile:
    """The bag that speaks for the rest: the first that says what was done to pixels, if any."""
    return next((bag for bag in bags if bag.identity["normalisation"] is not None), bags[0])


def warn_of_losses(bags: Iterable[BagFile]) -> None:
    """Tell, once, how many slides have bags that lack patches, and the first of them."""
    names = sorted({bag.slide_id for bag in bags if bag.lost})
    if names:
        logger.warning(
            "%d slides lost patches that could not be decoded (%s); what is left of them is used. "
            "Copy them again, remove their bags and embed them, or drop them from the labels.",
            len(names), ", ".join(names[:3]) + ", ..." * (len(names) > 3),
        )  # fmt: skip


def _mapped_offset(file: h5py.File, dataset: h5py.Dataset) -> int | None:
    """Where a data set lies if it lies in one piece and needs no decoding."""
    if dataset.chunks is not None or dataset.dtype not in _MAPPED_TYPES or file.userblock_size:
        return None
    return dataset.id.get_offset()  # None for one kept in the file's header


@dataclass(frozen=True, eq=False)
class LabelledBags:
    """Bags with their classes, (n,) int64."""

    files: Sequence[BagFile]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, rows: np.ndarray) -> LabelledBags:
        """Those of (k,) row numbers, or of a (n,) mask."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return LabelledBags([self.files[row] for row in rows], self.labels[rows])


def shuffled_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """All rows in random order, in batches of like length.

    Args:
        lengths: (n,) patches of each bag.
        batch_size: Bags a batch; the last may be smaller.
        rng: Of the order.

    Returns:
        Row numbers of each batch.
    """
    order = rng.permutation(len(lengths))
    window = _SORTED_BATCHES * batch_size
    batches = []
    for first in range(0, len(order), window):
        part = order[first : first + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def ordered_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All rows by length, in batches, for predictions."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def pad_bags(bags: Sequence[np.ndarray], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Ragged bags as one tensor.

    Args:
        bags: (M_i, D) each.
        dtype: Of the result.

    Returns:
        (B, M, D), 0 in the padding, and (B, M) bool, True on patches; None if no bag is padded.
    """
    lengths = torch.tensor([len(bag) for bag in bags])
    longest = int(lengths.max())
    features = torch.zeros(len(bags), longest, bags[0].shape[1], dtype=dtype)
    for row, bag in zip(features, bags, strict=True):
        row[: len(bag)] = torch.from_numpy(bag)
    if bool((lengths == longest).all()):
        return features, None
    return features, torch.arange(longest) < lengths[:, None]


def batch_tensors(
    bags: LabelledBags, batches: Sequence[np.ndarray], device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Batches as a head takes them: features (float32), mask, labels, on the device."""
    for rows in batches:
        arrays = [bags.files[row].features() for row in rows]
        half = device.type != "cpu" and all(array.dtype == np.float16 for array in arrays)
        # Half the bytes over the bus; made float32 where it is cheap.
        features, mask = pad_bags(arrays, torch.float16 if half else torch.float32)
        labels = torch.from_numpy(bags.labels[rows])
        yield (
            features.to(device).float(),
            None if mask is None else mask.to(device),
            labels.to(device),
        )

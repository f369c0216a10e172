"""A slide's embeddings: `Bag`, and the HDF5 file that holds it.

Readable by the field's tools (`features`, and `coords` with TRIDENT's attribute names); what says
which encoder saw which pixels is in attributes of the root.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from xmag_hf._version import __version__
from xmag_hf.atomic_write import write_atomically

FORMAT = "xmag-bag"
FORMAT_VERSION = 1
IDENTITY = ("encoder", "encoder_revision", "pooling", "mpp", "patch_px")
# Nominal magnifications that scanners and tools name; 10 um/px at 1x.
MAGNIFICATIONS = (1.25, 2.5, 5, 10, 20, 40, 60, 80)


class BagError(ValueError):
    """A file is no bag, or arrays make none; the message names the file."""


@dataclass(frozen=True)
class BagInfo:
    """What is known about a bag; None where a foreign file does not say.

    Attributes:
        encoder: Table id, or model_type/size.
        encoder_revision: `sha256:` and 16 hex digits of the weights' digest.
        encoder_commit: Of the Hub repository that they came from. Information only: a change of
            its page makes another commit of the same weights.
        pooling: `cls`, `mean`, `cls+mean`, or `model` (whatever the model returns).
        normalisation: What was done to pixels, as `Encoder.normalisation`.
        precision: The encoder ran in.
        mpp: um/px of the patches.
        patch_px: Side of a patch, px at `mpp`.
        overlap: px at `mpp` that neighbours share.
        input_px: Side of what the encoder saw.
        input_mpp: um/px of what the encoder saw: differs from `mpp` where patches are resampled.
        mpp0: um/px of level 0.
        mpp_source: Where mpp0 is from.
        level: Read from.
        level0_size: (width, height), px.
        reader: That read the patches.
        tissue: Method, or the digest of the annotation.
        tissue_threshold: Least share of a kept patch that is tissue.
        pad_edges: Whether patches past the edge were kept.
        unreadable_patches: Lost because they could not be decoded.
        padded_patches: That reach past the slide's edge.
        slide_sha256_head: Of the slide file.
        created_by: Program and version.
        patch_size_level0: Side of a patch in level-0 px as a file says it, rounded or not.
        magnifications: Nominal (level 0, target); TRIDENT's, where nothing better is known.
    """

    encoder: str | None = None
    encoder_revision: str | None = None
    encoder_commit: str | None = None
    pooling: str | None = None
    normalisation: str | None = None
    precision: str | None = None
    mpp: float | None = None
    patch_px: int | None = None
    overlap: int | None = None
    input_px: int | None = None
    input_mpp: float | None = None
    mpp0: float | None = None
    mpp_source: str | None = None
    level: int | None = None
    level0_size: tuple[int, int] | None = None
    reader: str | None = None
    tissue: str | None = None
    tissue_threshold: float | None = None
    pad_edges: bool | None = None
    unreadable_patches: int | None = None
    padded_patches: int | None = None
    slide_sha256_head: str | None = None
    created_by: str | None = f"xmag_hf {__version__}"
    patch_size_level0: float | None = None
    magnifications: tuple[float, float] | None = None

    @property
    def target_magnification(self) -> float | None:
        """TRIDENT's nominal one, where no um/px is known: all that such a bag says of its scale."""
        return self.magnifications[1] if self.mpp is None and self.magnifications else None

    @property
    def identity(self) -> dict[str, Any]:
        """What heads and resumed runs compare, by `not_the_same`."""
        names = (*IDENTITY, "normalisation", "target_magnification")
        return {name: getattr(self, name) for name in names}

    @property
    def width_level0(self) -> float | None:
        """Side of a patch in level-0 px, exact where the scales are known."""
        if self.mpp and self.mpp0 and self.patch_px:
            return self.patch_px * self.mpp / self.mpp0
        return self.patch_size_level0


def not_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names under which two identities differ; a normalisation that one does not say is no other.

    Bags of other programs do not say it, nor do those made before it was written down.
    """
    differing = [name for name in one if one[name] != other[name]]
    unsaid = None in (one.get("normalisation"), other.get("normalisation"))
    return [name for name in differing if name != "normalisation" or not unsaid]


# Kept beside coords, under TRIDENT's names, or derived; everything else is a root attribute.
_NOT_ROOT = ("overlap", "level0_size", "patch_size_level0", "magnifications")
_ROOT = {f.name: f for f in dataclasses.fields(BagInfo) if f.name not in _NOT_ROOT}
_WHOLE = ("patch_px", "input_px", "level", "unreadable_patches", "padded_patches")
_REAL = ("mpp", "input_mpp", "mpp0", "tissue_threshold")


@dataclass(frozen=True, eq=False)
class Bag:
    """One slide's patch embeddings.

    Attributes:
        slide_id: Name of the slide.
        features: (M, D) float16 or float32.
        coords: (M, 2) int64, top-left corners (x, y), level-0 px.
        info: What is known about them.
        tokens: (M, 16, C) float16, local features on the 4 x 4 grid, row-major; or None.

    Raises:
        BagError: Shapes or types that do not fit together.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    info: BagInfo = field(default_factory=BagInfo)
    tokens: np.ndarray | None = None

    def __post_init__(self) -> None:
        features, coords, tokens = self.features, self.coords, self.tokens
        good = features.ndim == 2 and features.dtype in (np.float16, np.float32)
        good &= coords.shape == (len(features), 2) and coords.dtype == np.int64
        if tokens is not None:
            good &= tokens.ndim == 3 and tokens.shape[:2] == (len(features), 16)
        if not good:
            shape = None if tokens is None else tokens.shape
            raise BagError(
                f"{self.slide_id}: features {features.shape} {features.dtype}, coords "
                f"{coords.shape} {coords.dtype}, tokens {shape}; a bag has (M, D) float16 or "
                "float32, (M, 2) int64, and no tokens or (M, 16, C)."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What heads and resumed runs compare."""
        return self.info.identity


def write_bag(path: str | os.PathLike[str], bag: Bag) -> Path:
    """Write a bag: under a temporary name in the same folder, fsynced, renamed.

    The file is laid out in memory first, so that a full disk is an ordinary OSError and never a
    half-closed HDF5 file.

    Args:
        path: Of the bag, `<slide_id>.h5`; the folder exists.
        bag: What to write.

    Returns:
        The path.

    Raises:
        BagError: Features that are not finite.
        OSError: The folder cannot be written, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    for name, array in (("features", bag.features), ("tokens", bag.tokens)):
        if array is not None and not np.isfinite(array).all():
            raise BagError(
                f"{bag.slide_id}: {name} hold infinite values or NaN. If they exceed float16's "
                "65504, store float32 (--features float32)."
            )
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="v110") as file:
        _fill(file, bag, path.parent)
        file.flush()
        image = file.id.get_file_image()
    write_atomically(path, image)
    return path


def read_bag(path: str | os.PathLike[str]) -> Bag:
    """Read a bag: ours, TRIDENT's (also with a leading axis of 1), or one of CLAM's h5_files.

    Args:
        path: HDF5 file.

    Returns:
        The bag; its slide_id is the file's stem, and what the file does not say is None.

    Raises:
        BagError: No HDF5 file, a damaged one, a later format, no features and coords of equal
            length, or data outside the file (links, external storage), which is not followed.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    with open_h5(path) as file, damage_named(path):
        features_set = own_dataset(path, file, "features")
        features = features_set[()].reshape(_two_axes(path, "features", features_set))
        coords_set = own_dataset(path, file, "coords")
        coords = coords_set[()].reshape(_two_axes(path, "coords", coords_set))
        coords = whole_pixels(path, coords)
        tokens = own_dataset(path, file, "tokens")[()] if "tokens" in file else None
        info = _read_info(path, file.attrs, coords_set.attrs)
    if features.dtype not in (np.float16, np.float32):
        features = features.astype(np.float32)
    return Bag(path.stem, features, coords, info, tokens)


def read_info(path: str | os.PathLike[str]) -> tuple[BagInfo, dict[str, Any]]:
    """What a bag says about itself, without reading its features.

    Returns:
        The info, and {"patches", "embed_dim", "features" (type), "tokens" (bool)}.

    Raises:
        BagError: As `read_bag`.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    with open_h5(path) as file, damage_named(path):
        features = own_dataset(path, file, "features")
        coords = own_dataset(path, file, "coords")
        patches, width = _two_axes(path, "features", features)
        if _two_axes(path, "coords", coords) != (patches, 2):
            raise BagError(
                f"{path}: features {features.shape} and coords {coords.shape}; a bag has (M, D) "
                "and (M, 2). Make it again."
            )
        shape = {
            "patches": patches,
            "embed_dim": width,
            "features": str(features.dtype),
            "tokens": "tokens" in file,
        }
        return _read_info(path, file.attrs, coords.attrs), shape


def open_h5(path: Path) -> h5py.File:
    """Open an HDF5 file to read.

    Raises:
        BagError: It is none, or is cut short.
        OSError: It cannot be read at all.
    """
    with path.open("rb"):  # missing and forbidden files keep their own errors
        pass
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise BagError(
            f"{path}: no complete HDF5 file ({error}). Remove it and make it again."
        ) from error


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what h5py raises on damaged content into a BagError that names the file."""
    try:
        yield
    except BagError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise BagError(f"{path}: damaged ({error}). Remove it and make it again.") from error


def whole_pixels(path: Path, coords: np.ndarray) -> np.ndarray:
    """Coordinates as int64.

    Raises:
        BagError: Fractions or NaN: um, or scaled coordinates, are no level-0 pixels.
    """
    if not np.issubdtype(coords.dtype, np.integer) and (coords != np.rint(coords)).any():
        raise BagError(
            f"{path}: coords are no whole numbers, so no level-0 pixels. If they are um, it is "
            "one of STAMP's files: `xmag bags import --from stamp`."
        )
    return coords.astype(np.int64)


def own_dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """A data set whose bytes lie in this very file.

    Raises:
        BagError: Missing, or its data lie elsewhere.
    """
    link = file.get(name, getlink=True) if name in file.keys() else None  # noqa: SIM118
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if dataset is None and link is None:
        raise BagError(
            f"{path}: no {name!r} in it; it has {', '.join(file.keys()) or 'nothing'}. A bag has "
            "features and coords; STAMP's files are read by `xmag bags import --from stamp`."
        )
    if not isinstance(dataset, h5py.Dataset):
        dataset = None
    if dataset is None or dataset.external or dataset.is_virtual:
        raise BagError(f"{path}: {name!r} points outside the file, which is not followed.")
    return dataset


def nominal_magnification(mpp: float) -> float | int:
    """The nearest named magnification, on a log scale; 10 um/px is 1x."""
    nearest = min(MAGNIFICATIONS, key=lambda m: abs(math.log(m * mpp / 10)))
    return int(nearest) if nearest == int(nearest) else nearest


def _fill(file: h5py.File, bag: Bag, folder: Path) -> None:
    file.create_dataset("features", data=bag.features)
    coords = file.create_dataset("coords", data=bag.coords)
    if bag.tokens is not None:
        file.create_dataset("tokens", data=bag.tokens)
    coords.attrs.update(trident_attributes(bag, folder))
    file.attrs["format"], file.attrs["format_version"] = FORMAT, FORMAT_VERSION
    for name in _ROOT:
        value = getattr(bag.info, name)
        if value is not None:
            file.attrs[name] = value


def trident_attributes(bag: Bag, folder: Path) -> dict[str, Any]:
    """Attributes of `coords` as TRIDENT writes them, as far as they are known."""
    info, width = bag.info, bag.info.width_level0
    exact = bool(info.mpp and info.mpp0 and info.patch_px)
    level0 = nominal_magnification(info.mpp0) if info.mpp0 else None
    target = nominal_magnification(info.mpp) if info.mpp else None
    if info.magnifications is not None:
        level0, target = info.magnifications
    size = info.level0_size or (None, None)
    known = {
        "patch_size": info.patch_px,
        "patch_size_level0": round(width) if width else None,
        "patch_size_level0_exact": width if exact else None,
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": info.overlap,
        "name": bag.slide_id,
        "savetodir": str(folder),
        "level0_width": size[0],
        "level0_height": size[1],
    }
    return {name: value for name, value in known.items() if value is not None}


def _read_info(path: Path, root: Mapping[str, Any], coords: Mapping[str, Any]) -> BagInfo:
    values: dict[str, Any] = dict.fromkeys(_ROOT)
    if root.get("format") == FORMAT:
        version = int(root.get("format_version", 0))
        if version > FORMAT_VERSION:
            raise BagError(
                f"{path}: bag format {version}, and this xmag_hf reads up to {FORMAT_VERSION}. "
                "Upgrade it."
            )
        values |= {name: _plain(name, root[name]) for name in _ROOT if name in root}
    else:
        values["patch_px"] = _whole(coords.get("patch_size"))
    size = _whole(coords.get("level0_width")), _whole(coords.get("level0_height"))
    magnifications = [coords.get(f"{name}_magnification") for name in ("level0", "target")]
    foreign = values["mpp"] is None and None not in magnifications
    exact = coords.get("patch_size_level0_exact", coords.get("patch_size_level0"))
    return BagInfo(
        **values,
        overlap=_whole(coords.get("overlap")),
        level0_size=None if None in size else size,  # type: ignore[arg-type]
        patch_size_level0=None if exact is None else float(exact),
        magnifications=tuple(map(float, magnifications)) if foreign else None,  # type: ignore[arg-type]
    )


def _plain(name: str, value: Any) -> Any:
    if name in _WHOLE:
        return int(value)
    if name in _REAL:
        return float(value)
    return bool(value) if name == "pad_edges" else str(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _two_axes(path: Path, name: str, dataset: h5py.Dataset) -> tuple[int, ...]:
    """Shape of a data set, without the leading axis of 1 of TRIDENT's and CLAM's converters."""
    shape = dataset.shape[1:] if dataset.ndim == 3 and dataset.shape[0] == 1 else dataset.shape
    if len(shape) != 2 or not np.issubdtype(dataset.dtype, np.number):
        raise BagError(
            f"{path}: {name} has shape {dataset.shape} and type {dataset.dtype}; expected two axes "
            "of numbers (or a third of length 1 before them)."
        )
    return shape

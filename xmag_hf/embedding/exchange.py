"""Bags to and from the layouts of TRIDENT, CLAM and STAMP."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from xmag_hf._version import __version__
from xmag_hf.atomic_write import write_atomically

from .bag import (
    Bag,
    BagError,
    BagInfo,
    damage_named,
    open_h5,
    own_dataset,
    read_bag,
    trident_attributes,
)

FORMATS = ("trident", "clam", "stamp")
# STAMP refuses files of a later version than its own; 2.1.0 is the first with these attributes.
STAMP_VERSION = "2.1.0"
# What a layout holds of `BagInfo`; whatever else a bag knows is lost, and said.
HOLDS = {
    "trident": {"patch_px", "overlap", "level0_size", "patch_size_level0", "magnifications"},
    "clam": set(),
    "stamp": {"encoder", "mpp", "patch_px"},
}
_NOT_COUNTED = {"created_by", "patch_size_level0", "magnifications"}


def export_bag(bag: Bag, out_dir: str | Path, to: str, *, overwrite: bool = False) -> list[str]:
    """Write a bag in another tool's layout.

    TRIDENT: `<slide_id>.h5` with `features`, and `coords` (int64, level-0 px) with its attributes.
    CLAM: `h5_files/<slide_id>.h5` (features float32, coords int32, level-0 px) and
    `pt_files/<slide_id>.pt` (the features, a float32 tensor).
    STAMP: `<slide_id>.h5` with `feats` float16, `coords` float32 in um, and attributes of the file.

    Args:
        bag: To write.
        out_dir: Made if need be.
        to: `trident`, `clam` or `stamp`.
        overwrite: Replace a file that is there.

    Returns:
        What the layout cannot hold and the bag knew: names of `BagInfo`, `tokens`, `float32`.

    Raises:
        BagError: A file is there, or the bag lacks what the layout must have.
        OSError: The folder cannot be written.
    """
    out_dir = Path(out_dir)
    lost = [
        field.name
        for field in dataclasses.fields(BagInfo)
        if getattr(bag.info, field.name) is not None
        and field.name not in HOLDS[_known_format(to)] | _NOT_COUNTED
    ]
    lost += ["tokens"] if bag.tokens is not None else []
    files = {"trident": _trident, "clam": _clam, "stamp": _stamp}[to](bag, out_dir)
    if to == "stamp" and bag.features.dtype == np.float32:
        lost.append("float32")
    there = [path for path in files if path.exists()]
    if there and not overwrite:
        raise BagError(f"{there[0]} exists. Choose another --out, or say --overwrite.")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return lost


def import_bag(path: str | Path, source: str, **known: Any) -> Bag:
    """Read a file of another tool as a bag.

    Args:
        path: HDF5 file: TRIDENT's features, one of CLAM's h5_files, or STAMP's.
        source: `trident`, `clam` or `stamp`.
        **known: Fields of `BagInfo` that the file does not say (encoder, mpp, patch_px, mpp0, ...).
            STAMP's coordinates are um and need `mpp0`; `encoder` wins over its `extractor`.

    Returns:
        The bag.

    Raises:
        BagError: Another layout, or `known` contradicts what the file says.
        OSError: The file cannot be read.
    """
    path = Path(path)
    for name in ("mpp", "mpp0", "patch_px"):
        value = known.get(name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BagError(f"{name}={value!r}: it must be a number above 0.")
    if _known_format(source) == "stamp":
        bag = _read_stamp(path, known.get("mpp0"))
    else:
        bag = read_bag(path)
    info = bag.info
    given = {name: value for name, value in known.items() if value is not None}
    if source == "stamp" and "encoder" in given:
        info = dataclasses.replace(info, encoder=None)  # STAMP names encoders in its own way
    for name, value in given.items():
        said = getattr(info, name)
        if said is not None and not _same(said, value):
            raise BagError(f"{path}: says {name} {said!r}, but {value!r} is given. Leave it out.")
    given["created_by"] = f"xmag_hf {__version__}, from {source}"
    merged = _scaled(path, dataclasses.replace(info, **given))
    return dataclasses.replace(bag, info=merged)


def _same(said: Any, value: Any) -> bool:
    if isinstance(said, float):
        return math.isclose(said, value, rel_tol=1e-6)
    return said == value


def _scaled(path: Path, info: BagInfo) -> BagInfo:
    """The info with the um/px that the patches really have, which the file's own sizes decide.

    Tools that cut by magnification write 512 level-0 px for 256 px at "20x" of a slide with 0.2524
    um/px: those patches are at 0.5048 um/px.

    Raises:
        BagError: The given um/px is not that of the file's sizes.
    """
    width = info.patch_size_level0
    if not (width and info.patch_px and info.mpp0):
        return info
    mpp = width * info.mpp0 / info.patch_px
    if info.mpp is None:
        return dataclasses.replace(info, mpp=_tidy(mpp))
    # TRIDENT rounds the width to whole pixels.
    if abs(info.patch_px * info.mpp / info.mpp0 - width) > 0.5 + 1e-6:
        raise BagError(
            f"{path}: its patches, {info.patch_px} px made of {width:g} level-0 px, have "
            f"{mpp:.6g} um/px where level 0 has {info.mpp0:g}, but {info.mpp:g} is given. Leave "
            "--mpp out, or correct --mpp0."
        )
    return info


def _tidy(mpp: float) -> float:
    """um/px without the last digits that a division leaves: 0.47, not 0.47000000000000003."""
    return float(f"{mpp:.12g}")


def find_files(paths: Sequence[str | Path], source: str) -> list[Path]:
    """HDF5 files of paths and folders; of a CLAM folder those in `h5_files`.

    Raises:
        BagError: A path with none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        folder = path / "h5_files" if source == "clam" and (path / "h5_files").is_dir() else path
        hits = sorted(folder.glob("*.h5")) if folder.is_dir() else [folder]
        if not hits or not hits[0].is_file():
            raise BagError(f"{path}: no .h5 file there. Name bags, or folders that hold some.")
        found += hits
    return found


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise BagError(f"{name!r}: no such layout; one of {', '.join(FORMATS)}.")
    return name


def _trident(bag: Bag, out_dir: Path) -> dict[Path, bytes]:
    attributes = trident_attributes(bag, out_dir)
    attributes.pop("patch_size_level0_exact", None)
    names = {"name": bag.slide_id, "savetodir": str(out_dir)}
    content = _h5(
        {"features": bag.features, "coords": bag.coords},
        {"features": names, "coords": attributes},
    )
    return {out_dir / f"{bag.slide_id}.h5": content}


def _clam(bag: Bag, out_dir: Path) -> dict[Path, bytes]:
    import torch

    if bag.coords.size and abs(bag.coords).max() > np.iinfo(np.int32).max:
        raise BagError(f"{bag.slide_id}: coordinates exceed CLAM's 32 bits.")
    features = bag.features.astype(np.float32)
    tensor = io.BytesIO()
    torch.save(torch.from_numpy(features), tensor)
    return {
        out_dir / "h5_files" / f"{bag.slide_id}.h5": _h5(
            {"features": features, "coords": bag.coords.astype(np.int32)}, {}
        ),
        out_dir / "pt_files" / f"{bag.slide_id}.pt": tensor.getvalue(),
    }


def _stamp(bag: Bag, out_dir: Path) -> dict[Path, bytes]:
    info = bag.info
    if info.mpp is None or info.patch_px is None or info.mpp0 is None:
        raise BagError(
            f"{bag.slide_id}: STAMP's coordinates are um, and the bag lacks mpp, patch_px or mpp0. "
            "Import it with --mpp, --patch-px and --mpp0 first."
        )
    with np.errstate(over="ignore"):
        feats = bag.features.astype(np.float16)
    if not np.isfinite(feats).all():
        raise BagError(f"{bag.slide_id}: features exceed float16's 65504, which STAMP stores.")
    attributes = {
        "stamp_version": STAMP_VERSION,
        "extractor": info.encoder or "unknown",
        "unit": "um",
        "tile_size_um": info.mpp * info.patch_px,
        "tile_size_px": info.patch_px,
        "feat_type": "tile",
    }
    coords = (bag.coords * info.mpp0).astype(np.float32)
    content = _h5({"feats": feats, "coords": coords}, {"/": attributes})
    return {out_dir / f"{bag.slide_id}.h5": content}


def stamp_extractor(path: Path) -> str | None:
    """What one of STAMP's files calls its encoder: a name of STAMP's own. None if it says nothing.

    Raises:
        BagError: It is damaged.
        OSError: It cannot be read.
    """
    with open_h5(path) as file, damage_named(path):
        name = str(file.attrs.get("extractor", "unknown"))
    return None if name == "unknown" else name


def _read_stamp(path: Path, mpp0: float | None) -> Bag:
    encoder = stamp_extractor(path)
    with open_h5(path) as file, damage_named(path):
        if "feats" not in file:
            raise BagError(f"{path}: no 'feats' in it, so it is not one of STAMP's files.")
        feats, coords_um = (own_dataset(path, file, name)[()] for name in ("feats", "coords"))
        unit, kind = file.attrs.get("unit"), file.attrs.get("feat_type", "tile")
        if unit != "um" or kind != "tile":
            raise BagError(f"{path}: unit {unit!r}, feat_type {kind!r}; need tiles in um.")
        sides = {name: file.attrs.get(name) for name in ("tile_size_px", "tile_size_um")}
        for name, side in sides.items():
            if side is not None and not (math.isfinite(float(side)) and float(side) > 0):
                raise BagError(f"{path}: {name} {side!r}; it must be a number above 0.")
        if not np.isfinite(coords_um).all():
            raise BagError(f"{path}: coordinates that are no numbers.")
    if mpp0 is None:
        raise BagError(
            f"{path}: STAMP's coordinates are um. Say the um/px of the slide's level 0 with --mpp0."
        )
    side_px, side_um = sides.values()
    info = BagInfo(
        encoder=encoder,
        patch_px=None if side_px is None else int(side_px),
        mpp=None if side_px is None or side_um is None else _tidy(float(side_um) / int(side_px)),
    )
    coords = np.rint(coords_um.astype(np.float64) / mpp0).astype(np.int64)
    if feats.dtype not in (np.float16, np.float32):
        feats = feats.astype(np.float32)
    return Bag(path.stem, feats, coords, info)


def _h5(data: dict[str, np.ndarray], attributes: dict[str, dict[str, Any]]) -> bytes:
    """An HDF5 file as bytes."""
    with h5py.File("layout", "w", driver="core", backing_store=False) as file:
        for name, array in data.items():
            file.create_dataset(name, data=array)
        for name, values in attributes.items():
            file[name].attrs.update(values)
        file.flush()
        return file.id.get_file_image()

"""Labelled images at a known scale: a `datasets` data set, or a folder of files with a CSV.

`datasets` is imported where it is used.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xmag_hf.reporting.tables import MISSING, doubled_heading

from .errors import ProbeError
from .options import ProbeOptions

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
FILE_COLUMNS = ("file", "file_name", "image")
GROUP_COLUMNS = ("patient_id", "slide_id")
# Columns that this project's own data sets give one tissue at two scales in, and their um/px.
SCALED_COLUMNS = {"image_20x": 0.5, "image_5x": 2.0}
SCALE_COLUMNS = {"image_5x": "mpp_5x"}  # the um/px of other image columns is in `mpp`
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_NAMES = {
    **{name: TRAIN for name in ("train", "training")},
    **{name: VALIDATION for name in ("validation", "val", "valid", "dev")},
    **{name: TEST for name in ("test", "testing")},
}
NO_GROUPS = "-"
# Tissue arrays and whole resections are legitimate; Pillow takes half of this for an attack.
MAX_PIXELS = 2**30  # 3 GB as RGB
_MOST_SHOWN = 5
_DAMAGE = (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError)


def _silent(done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split; nothing is decoded before it is asked for.

    Attributes:
        ids: (n,) str, unique within the split.
        labels: (n,) int64, index into the data set's classes; None without labels.
        groups: (n,) str, patient or slide; None without.
        mpp: (n,) float64, um/px.
        read: Index -> the encoded file's bytes. Safe to call from several threads.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    groups: np.ndarray | None
    mpp: np.ndarray
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.ids)

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of one image in px, from its header; errors as `image`."""
        return self._decoded(index, lambda image: image.size)

    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Args:
            index: 0 to n - 1.

        Returns:
            RGB; what is transparent is white, as glass is.

        Raises:
            ProbeError: Its bytes are no image, are cut short, or hold more than 8 bits of grey,
                which have no agreed way to 8; the id is named.
        """
        return self._decoded(index, lambda image: _rgb(image, f"image {self.ids[index]!r}"))

    def _decoded(self, index: int, take: Callable[[Image.Image], Any]) -> Any:
        try:
            with Image.open(io.BytesIO(self.read(index))) as image:
                return take(image)
        except ProbeError:
            raise
        except Image.DecompressionBombError as error:
            raise ProbeError(
                f"image {self.ids[index]!r}: {error} Cut it into parts, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
            ) from error
        # Pillow raises all of these on damaged files, depending on the format.
        except _DAMAGE as error:
            raise ProbeError(
                f"image {self.ids[index]!r} does not decode: {error}. Repair it or "
                "leave it out of the data set."
            ) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        raise ProbeError(
            f"{name}: grey values of more than 8 bits (mode {image.mode}); which of them are black "
            "and white is not known. Convert it to 8-bit RGB."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class LabelledImages:
    """A data set.

    Attributes:
        name: As it was asked for, without the folders above it.
        fingerprint: sha256 over ids, um/px and bytes of all images (not over labels, so that
            embeddings outlive a corrected label).
        splits: Name -> images.
        classes: Names of the labels; empty without labels.
        views: The same images at several scales, where the data set has them.
    """

    name: str
    fingerprint: str
    splits: dict[str, ImageSplit]
    classes: tuple[str, ...]
    views: tuple[LabelledImages, ...] = ()

    def at(self, target_mpp: float) -> LabelledImages:
        """The view to resample from: the coarsest that is at or finer than `target_mpp`.

        Args:
            target_mpp: um/px wanted.

        Returns:
            A view (itself when there is one only); the finest when all are coarser.
        """
        scales = {float(np.max(next(iter(v.splits.values())).mpp)): v for v in self.views}
        if not scales:
            return self
        fitting = [mpp for mpp in scales if mpp <= 1.1 * target_mpp]
        return scales[max(fitting) if fitting else min(scales)]


@dataclass
class _Table:
    """Rows of one split before they are checked: columns by name, and the bytes of a row."""

    columns: dict[str, list[Any]]
    stems: list[str | None]
    read: Callable[[int], bytes]


def split_name(name: str) -> str:
    """`train`, `validation` or `test` for what means it, in any case; another name as it is."""
    name = name.strip()
    return SPLIT_NAMES.get(name.lower(), name)


def pooled_ids(splits: dict[str, ImageSplit]) -> np.ndarray:
    """(N,) ids over all splits in their order; SPLIT/ID for all where two splits share one."""
    ids = np.concatenate([split.ids for split in splits.values()])
    if len(set(ids)) == len(ids):
        return ids
    told = [f"{name}/{own}" for name, split in splits.items() for own in split.ids]
    return np.array(told, dtype=object)


def open_images(
    options: ProbeOptions, step: Callable[[int, int], None] = _silent
) -> LabelledImages:
    """Open a data set, check its columns, and take its fingerprint.

    Args:
        options: Data, columns, scale.
        step: Called while the fingerprint is taken: images read since the last call, and in all.

    Returns:
        The images, with labels unless `options.nuclei_csv` asks for counts. Whatever they come
        from, they are sorted naturally by id (img2 before img10): folds depend on the order.

    Raises:
        ProbeError: No such data, column, label or scale, doubled ids, or a missing file; the
            subject, the value and the remedy are named.
    """
    folder = Path(options.data).expanduser()
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or MAX_PIXELS, MAX_PIXELS // 2)
    if options.labels_csv is not None:
        path = Path(options.labels_csv).expanduser()
        return _open_view(options, _tables_of_csv(folder, path, options), step)
    if options.nuclei_csv is not None and folder.is_dir() and _image_files(folder):
        return _open_view(options, {"all": _table_of_folder(folder)}, step)
    dataset = _load(options, folder)
    first = next(iter(dataset.values()))
    names = _class_names(first, options.label_column or "label")
    views: list[LabelledImages] = []
    ids: dict[str, np.ndarray] | None = None
    for column in _image_columns(options, first):
        tables = {name: _table_of_dataset(split, column) for name, split in dataset.items()}
        if ids is None:  # of the first view for all: they decide the order
            ids = {name: _ids(options, name, table) for name, table in tables.items()}
        views.append(_open_view(options, tables, step, names, column, ids))
    return dataclasses.replace(views[0], views=tuple(views) if len(views) > 1 else ())


def _open_view(
    options: ProbeOptions,
    tables: dict[str, _Table],
    step: Callable[[int, int], None],
    names: list[str] | None = None,
    image_column: str = "",
    ids: dict[str, np.ndarray] | None = None,
) -> LabelledImages:
    classes: tuple[str, ...] = ()
    labels: dict[str, np.ndarray | None] = dict.fromkeys(tables)
    if options.nuclei_csv is None:
        classes, labels = _labels(options, tables, names)
    splits = {}
    for name, table in tables.items():
        if not table.stems:
            raise ProbeError(f"{options.data}: split {name!r} has no images.")
        split = ImageSplit(
            ids=_ids(options, name, table) if ids is None else ids[name],
            labels=labels[name],
            groups=_groups(options, name, table),
            mpp=_scales(options, name, table, image_column),
            read=table.read,
        )
        splits[name] = _sorted(split)
    name = options.data.rstrip("/").rsplit("/", 1)[-1]
    return LabelledImages(name, _fingerprint(splits, options.num_threads, step), splits, classes)


def _sorted(split: ImageSplit) -> ImageSplit:
    """The split in natural order of its ids."""
    keys = [natural_key(str(name)) for name in split.ids]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return ImageSplit(
        ids=split.ids[order],
        labels=None if split.labels is None else split.labels[order],
        groups=None if split.groups is None else split.groups[order],
        mpp=split.mpp[order],
        read=lambda index: split.read(int(order[index])),
    )


# --- where rows come from --------------------------------------------------------------------


def _tables_of_csv(folder: Path, path: Path, options: ProbeOptions) -> dict[str, _Table]:
    """One table a value of the column split; without that column, one."""
    header, rows = _csv_rows(path)
    wanted = [options.image_column] if options.image_column else FILE_COLUMNS
    column = next((name for name in wanted if name in header), None)
    if column is None or not rows:
        raise ProbeError(
            f"{path}: {len(rows)} lines, columns {', '.join(header) or 'none'}; need a header with "
            f"one of {', '.join(wanted)}."
        )
    short = [n for n, row in enumerate(rows, start=2) if None in row or None in row.values()]
    if short:
        raise ProbeError(f"{path} line {short[0]}: not {len(header)} values as its header.")
    files = [folder / row[column] for row in rows]
    twice = [str(file) for file, count in Counter(f.resolve() for f in files).items() if count > 1]
    if twice:
        raise ProbeError(
            f"{path}: names {', '.join(twice[:_MOST_SHOWN])} more than once ({len(twice)} such "
            "files); an image has one line."
        )
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ProbeError(
            f"{path}: {len(missing)} of {len(files)} files are not there: "
            f"{', '.join(missing[:_MOST_SHOWN])}. {column} is taken relative to --data {folder}."
        )
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        split = split_name(row["split"]) if "split" in header else "all"
        if _blank(split):
            raise ProbeError(f"{path} line {number + 2}: split is empty; fill it or drop the line.")
        places.setdefault(split, []).append(number)
    tables = {}
    for split, own in places.items():
        columns = {name: [rows[n][name] for n in own] for name in header if name != column}
        chosen = [files[n] for n in own]
        tables[split] = _Table(columns, [file.stem for file in chosen], _file_reader(chosen))
    return tables


def _csv_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and lines."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            header = list(reader.fieldnames or ())
    except FileNotFoundError as error:
        raise ProbeError(f"--labels-csv {path}: no such file.") from error
    except UnicodeDecodeError as error:
        raise ProbeError(f"--labels-csv {path}: {error}. Save it as UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise ProbeError(f"--labels-csv {path}: cannot be read as CSV: {error}.") from error
    twice = doubled_heading(header)
    if twice is not None:
        raise ProbeError(f"{path}: column {twice} stands there twice. Drop or rename one.")
    return header, rows


def _table_of_folder(folder: Path) -> _Table:
    files = _image_files(folder)
    return _Table({}, [file.stem for file in files], _file_reader(files))


def _image_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files, key=lambda file: natural_key(file.name))


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Key that puts img2 before img10, and img02 and img2 in an order of their own."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], name


def _file_reader(files: Sequence[Path]) -> Callable[[int], bytes]:
    return lambda index: files[index].read_bytes()


def _load(options: ProbeOptions, folder: Path) -> dict[str, Any]:
    """Split name -> `datasets.Dataset`, images not decoded."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            where = str(folder) if folder.exists() else options.data
            loaded = datasets.load_dataset(
                where, name=options.data_config, revision=options.data_revision
            )
    except (OSError, ValueError, DatasetsError) as error:
        raise ProbeError(
            f"--data {options.data}: `datasets` cannot load it ({error}). Give a Hub data set, a "
            "folder of Parquet or one folder per class, or a folder of images with --labels-csv."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "all"): loaded}
    splits: dict[str, Any] = {split_name(str(name)): split for name, split in loaded.items()}
    if len(splits) < len(loaded):
        raise ProbeError(
            f"--data {options.data}: {', '.join(map(str, loaded))} are one split twice."
        )
    if not splits:
        raise ProbeError(f"--data {options.data}: no splits in it.")
    return splits


def _image_columns(options: ProbeOptions, dataset: Any) -> list[str]:
    """Columns of images; several are views."""
    import datasets

    columns = [n for n, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if options.image_column is not None:
        if options.image_column not in dataset.features:
            raise ProbeError(
                f"--image-column {options.image_column}: {options.data} has "
                f"{', '.join(dataset.features)}."
            )
        return [options.image_column]
    if set(columns) == set(SCALED_COLUMNS):
        if options.data_mpp is not None:
            raise ProbeError(
                f"--data-mpp {options.data_mpp:g}: {options.data} holds "
                f"{', '.join(SCALED_COLUMNS)}, whose scales are known. Leave it out, or name one "
                "column with --image-column."
            )
        return list(SCALED_COLUMNS)
    if len(columns) != 1:
        raise ProbeError(
            f"{options.data}: {len(columns)} image columns ({', '.join(columns) or 'none'} of "
            f"{', '.join(dataset.features)}); name one with --image-column."
        )
    return columns


def _table_of_dataset(dataset: Any, column: str) -> _Table:
    import datasets

    if column not in dataset.features:
        raise ProbeError(f"split {dataset.split}: no column {column!r}.")
    images = dataset.select_columns([column]).with_format(None)
    images = images.cast_column(column, datasets.Image(decode=False))

    def read(index: int) -> bytes:
        value = images[int(index)][column]
        if value is None:
            raise ProbeError(f"row {index} of split {dataset.split}: no image in {column!r}.")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    others = [n for n, kind in dataset.features.items() if not isinstance(kind, datasets.Image)]
    others = [name for name in others if _is_scalar(dataset.features[name])]
    table: Any = dataset.select_columns(others).with_format("arrow")[:] if others else {}
    columns = {name: table[name].to_pylist() for name in others}
    stems: list[str | None] = [None] * len(images)
    # Rows selected or shuffled lie behind an index; only the plain table can be read in one go.
    if images._indices is None:
        paths = [p for c in images.data.column(column).chunks for p in c.field("path").to_pylist()]
        stems = [Path(path).stem if path else None for path in paths]
    return _Table(columns, stems, read)


def _is_scalar(feature: Any) -> bool:
    return hasattr(feature, "dtype") and not hasattr(feature, "feature")


def _class_names(dataset: Any, column: str) -> list[str] | None:
    """Names of a ClassLabel column."""
    names = getattr(dataset.features.get(column), "names", None)
    return list(names) if names else None


# --- columns ---------------------------------------------------------------------------------


def _labels(
    options: ProbeOptions, tables: dict[str, _Table], names: list[str] | None
) -> tuple[tuple[str, ...], dict[str, np.ndarray | None]]:
    column = options.label_column or "label"
    values: dict[str, list[Any]] = {}
    for split, table in tables.items():
        found = _column(options, table, column, "--label-column", split)
        missing = [i for i, v in enumerate(found) if _blank(v) or (names and v < 0)]
        if missing:
            raise ProbeError(
                f"{options.data}: {len(missing)} of {len(found)} images of split {split!r} have no "
                f"{column} (first: row {missing[0]}). Leave them out of the data set."
            )
        values[split] = [v.strip() if isinstance(v, str) else v for v in found]
    if names is not None:  # stored as indices already
        arrays = {split: np.asarray(v, dtype=np.int64) for split, v in values.items()}
        return tuple(names), dict(arrays)
    present = sorted({v for found in values.values() for v in found}, key=_sortable)
    if any(isinstance(v, float) and not v.is_integer() for v in present):
        raise ProbeError(
            f"{options.data}: {column} holds numbers such as {present[0]}; a probe predicts "
            "classes. Name another --label-column."
        )
    if len(present) < 2:
        raise ProbeError(f"{options.data}: {column} is {present} everywhere; need two classes.")
    index = {value: number for number, value in enumerate(present)}
    arrays = {s: np.array([index[v] for v in found], dtype=np.int64) for s, found in values.items()}
    return tuple(str(value) for value in present), dict(arrays)


def _sortable(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))


def _column(options: ProbeOptions, table: _Table, column: str, flag: str, split: str) -> list[Any]:
    if column not in table.columns:
        raise ProbeError(
            f"{options.data}: split {split!r} has no column {column!r} (it has "
            f"{', '.join(table.columns) or 'none'}); name it with {flag}."
        )
    return table.columns[column]


def _ids(options: ProbeOptions, split: str, table: _Table) -> np.ndarray:
    if options.id_column is not None:
        values = _column(options, table, options.id_column, "--id-column", split)
        ids = np.array([str(value) for value in values], dtype=object)
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise ProbeError(
                f"{options.data}: --id-column {options.id_column} holds "
                f"{', '.join(twice[:_MOST_SHOWN])} more than once in split {split!r}."
            )
        return ids
    stems = table.stems
    if None not in stems and len(set(stems)) == len(stems):
        return np.array(stems, dtype=object)
    return np.array([f"{split}-{row:06d}" for row in range(len(stems))], dtype=object)


def _groups(options: ProbeOptions, split: str, table: _Table) -> np.ndarray | None:
    column = options.group_column
    if column == NO_GROUPS:
        return None
    if column is None:
        column = next((name for name in GROUP_COLUMNS if name in table.columns), None)
        if column is None:
            return None
    values = _column(options, table, column, "--group-column", split)
    missing = [row for row, value in enumerate(values) if _blank(value)]
    if missing:
        shown = ", ".join(map(str, missing[:_MOST_SHOWN])) + ", ..." * (len(missing) > _MOST_SHOWN)
        raise ProbeError(
            f"{options.data}: {len(missing)} images of split {split!r} have no {column} (rows "
            f"{shown}). Fill it, or say --group-column {NO_GROUPS}."
        )
    return np.array([str(value).strip() for value in values], dtype=object)


def _blank(value: Any) -> bool:
    """None, NaN, nothing but space, or what tables write instead."""
    return value is None or str(value).strip().lower() in MISSING


def _scales(options: ProbeOptions, split: str, table: _Table, image_column: str) -> np.ndarray:
    """um/px of each image: the column mpp (mpp_5x), else --data-mpp, else the column's name.

    --data-mpp fills a column that says nothing; it does not overrule one that does.
    """
    column = SCALE_COLUMNS.get(image_column, "mpp")
    nominal = SCALED_COLUMNS.get(image_column)
    if column not in table.columns and "mpp" in table.columns and nominal is not None:
        # `mpp` may be that of an image_20x beside it; then the name is all there is.
        found = np.array([_number(value) for value in table.columns["mpp"]])
        column = "mpp" if (abs(np.log2(found / nominal)) < 1).all() else column
    if column not in table.columns:
        given = options.data_mpp or nominal
        if given is None:
            raise ProbeError(
                f"{options.data}: the um/px of its images is not known. Give --data-mpp F, or a "
                "column mpp; without a scale no encoder can be shown the tissue at its own."
            )
        return np.full(len(table.stems), given)
    values = table.columns[column]
    scales = np.array([_number(value) for value in values])
    good = np.isfinite(scales) & (scales > 0)
    if options.data_mpp is not None:
        other = np.flatnonzero(good & ~np.isclose(scales, options.data_mpp, rtol=0.01))
        if len(other):
            raise ProbeError(
                f"--data-mpp {options.data_mpp:g}: column {column} says {values[other[0]]} in row "
                f"{other[0]} of split {split!r} ({len(other)} rows differ). Leave --data-mpp out, "
                "or correct the column."
            )
        return np.where(good, scales, options.data_mpp)
    wrong = np.flatnonzero(~good)
    if len(wrong):
        raise ProbeError(
            f"{options.data}: {column} is {values[wrong[0]]!r} in row {wrong[0]} of split "
            f"{split!r} ({len(wrong)} rows); need um/px above 0. Fix it, or give --data-mpp F."
        )
    return scales


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _fingerprint(
    splits: dict[str, ImageSplit], num_threads: int, step: Callable[[int, int], None]
) -> str:
    digest, total = hashlib.sha256(), sum(len(split) for split in splits.values())
    with ThreadPoolExecutor(num_threads) as pool:
        for name, split in sorted(splits.items()):
            digest.update(f"{name} {len(split)}\n".encode())
            digest.update("\n".join(map(str, split.ids)).encode())
            digest.update(np.ascontiguousarray(split.mpp, dtype="<f8").tobytes())
            for part in _hashes(split, pool):
                digest.update(part)
                step(1, total)
    return digest.hexdigest()


def _hashes(split: ImageSplit, pool: ThreadPoolExecutor, ahead: int = 256) -> Iterable[bytes]:
    """sha256 of each image's bytes, in order; at most `ahead` wait in memory."""
    for start in range(0, len(split), ahead):
        rows = range(start, min(start + ahead, len(split)))
        yield from pool.map(lambda row: hashlib.sha256(split.read(row)).digest(), rows)

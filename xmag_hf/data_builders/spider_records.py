"""SPIDER's records: checked, split by slide, and made into rows. Needs no `datasets`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from xmag_hf.slides import resample

from .corpus_options import REGION_PX, STUDENT_MPP, STUDENT_PX, TEACHER_MPP
from .pairs import encode
from .spider_source import FolderReader, Location, OpenSource, PartsReader, SpiderError

ORGANS = ("breast", "colorectal", "skin", "thorax")
SPLITS = ("train", "validation", "test")
MISSING = ("white", "reflect", "drop")
GRID = 5  # patches a side around the labelled one
CENTRE = GRID // 2
PATCH_PX = 224
CANVAS_PX = GRID * PATCH_PX
MARGIN_PX = (CANVAS_PX - REGION_PX) // 2
PLACES = tuple(f"{row}_{column}" for row in range(GRID) for column in range(GRID))
CENTRE_INDEX = CENTRE * GRID + CENTRE
CENTRE_PLACE = PLACES[CENTRE_INDEX]
WHITE = 255
CHUNK = 16  # records handed to a worker at once, about 3 MB of result
# Where SPIDER names its classes; the other organs' names come from the data.
CLASSES = {
    "colorectal": (
        "Adenocarcinoma high grade",
        "Adenocarcinoma low grade",
        "Adenoma high grade",
        "Adenoma low grade",
        "Fat",
        "Hyperplastic polyp",
        "Inflammation",
        "Mucus",
        "Muscle",
        "Necrosis",
        "Sessile serrated lesion",
        "Stroma healthy",
        "Vessels",
    )
}
# (classes, training records, test records) as published; skin and thorax are only counted.
PUBLISHED = {"colorectal": (13, 63_989, 13_193), "breast": (18, 80_858, 12_034)}


@dataclass(frozen=True)
class SpiderOptions:
    """What decides the rows. A change makes another data set.

    Raises:
        SpiderError: A value outside its range, named.
    """

    missing: str = field(
        default="white",
        metadata={
            "help": "what stands for missing context: white glass, the mirrored neighbours, or "
            "drop the record",
            "choices": MISSING,
        },
    )
    validation: float = field(
        default=0.2, metadata={"help": "share of the training slides set aside", "metavar": "F"}
    )
    seed: int = field(default=0, metadata={"help": "of the choice of validation slides"})
    max_shard_mb: int = field(
        default=500, metadata={"help": "largest Parquet file, 10^6 bytes", "metavar": "MB"}
    )

    def __post_init__(self) -> None:
        checks = (
            ("missing", self.missing in MISSING, f"one of {', '.join(MISSING)}"),
            ("validation", 0 <= self.validation < 1, "from 0 to below 1"),
            ("max_shard_mb", self.max_shard_mb >= 1, "at least 1"),
        )
        for name, good, rule in checks:
            if not good:
                raise SpiderError(f"{name}={getattr(self, name)!r}: it must be {rule}.")


@dataclass(frozen=True)
class SpiderRecord:
    """One labelled patch and its surroundings.

    Attributes:
        index: Position in metadata.json.
        slide_id: Of the patch.
        split: `train`, `validation` or `test`.
        label: Index of the class.
        names: 25 file names, row-major; None where SPIDER has no neighbour. 12 is the labelled one.
    """

    index: int
    slide_id: str
    split: str
    label: int
    names: tuple[str | None, ...]

    @property
    def image_name(self) -> str:
        """File name of the labelled patch."""
        return str(self.names[CENTRE_INDEX])


@dataclass(frozen=True)
class SpiderRecords:
    """All records of an organ.

    Attributes:
        classes: Names; a label is an index.
        records: In the order of metadata.json.
        warnings: Differences from the published counts, slides in both train and test, ...
    """

    classes: tuple[str, ...]
    records: tuple[SpiderRecord, ...]
    warnings: tuple[str, ...]

    def of(self, split: str) -> list[SpiderRecord]:
        """The records of a split."""
        return [record for record in self.records if record.split == split]


# --- metadata.json ----------------------------------------------------------------------------


def read_records(organ: str, metadata: bytes, options: SpiderOptions) -> SpiderRecords:
    """Check metadata.json and split it.

    Args:
        organ: One of `ORGANS`.
        metadata: Content of the file.
        options: Share and seed of the validation slides.

    Raises:
        SpiderError: Not SPIDER's layout: the record, the value and what was expected are named.
    """
    try:
        lines = json.loads(metadata)
    except ValueError as error:  # also undecodable text
        raise SpiderError(
            f"SPIDER-{organ}/metadata.json is no JSON ({error}). Download it again."
        ) from error
    if not isinstance(lines, list) or not lines:
        raise SpiderError(f"SPIDER-{organ}/metadata.json: expected a list of records.")
    for index, line in enumerate(lines):
        _check(index, line)
    _refuse_duplicates(lines)
    classes = _classes(organ, lines)
    label = {name: number for number, name in enumerate(classes)}
    aside = validation_slides(
        [str(line["slide_id"]) for line in lines if line["split"] == "train"],
        options.validation,
        options.seed,
    )
    records = tuple(
        SpiderRecord(
            index,
            str(line["slide_id"]),
            "validation"
            if line["split"] == "train" and str(line["slide_id"]) in aside
            else line["split"],
            label[line["class"]],
            _grid(line),
        )
        for index, line in enumerate(lines)
    )
    return SpiderRecords(classes, records, tuple(_warnings(organ, classes, records)))


def validation_slides(slide_ids: Iterable[str], share: float, seed: int) -> set[str]:
    """The slides set aside: the first `share` of them, ordered by a hash of seed and name.

    So the choice depends on no library's random numbers.

    Args:
        slide_ids: Of the training records, repeated or not.
        share: Of the slides, rounded to a whole number of them.
        seed: Another seed, another choice.
    """
    slides = sorted(
        set(slide_ids), key=lambda slide: hashlib.sha256(f"{seed}/{slide}".encode()).digest()
    )
    return set(slides[: round(share * len(slides))])


def _check(index: int, line: Any) -> None:
    """Refuse a record that is not of SPIDER's form."""

    def refuse(what: str) -> SpiderError:
        return SpiderError(f"metadata.json, record {index}: {what}. Check the file, or its source.")

    if not isinstance(line, dict):
        raise refuse(f"{line!r:.80} is no record")
    for name in ("slide_id", "image_name", "class", "split"):
        value = line.get(name)
        if not (isinstance(value, str) and value) and not (
            name == "slide_id" and isinstance(value, int)
        ):
            raise refuse(f"{name} is {value!r}, expected a text")
    if line["split"] not in ("train", "test"):
        raise refuse(f"{line['image_name']}: split {line['split']!r}, expected 'train' or 'test'")
    context = line.get("context_info") or {}
    if not isinstance(context, dict):
        raise refuse(f"{line['image_name']}: context_info is no table of 'row_col' to file name")
    for place, name in context.items():
        if place not in PLACES:
            raise refuse(f"{line['image_name']}: context {place!r}, expected '0_0' to '4_4'")
        if name is not None and not isinstance(name, str):
            raise refuse(f"{line['image_name']}: context {place} is {name!r}, expected a file name")
    centre = context.get(CENTRE_PLACE)
    if centre and centre != line["image_name"]:
        raise refuse(f"{line['image_name']}: the centre of its context is another image, {centre}")
    for name in (line["image_name"], *context.values()):
        if name and (name in (".", "..") or set(name) & set("/\\:\0")):
            raise refuse(f"{name!r} is no plain file name: it climbs out of the folder of images")


def _grid(line: dict[str, Any]) -> tuple[str | None, ...]:
    context = (line.get("context_info") or {}) | {CENTRE_PLACE: line["image_name"]}
    return tuple(context.get(place) or None for place in PLACES)


def _refuse_duplicates(lines: Sequence[dict[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for index, line in enumerate(lines):
        first = seen.setdefault(line["image_name"], index)
        if first != index:
            raise SpiderError(
                f"metadata.json: records {first} and {index} are both of {line['image_name']} "
                f"({lines[first]['class']!r}, {line['class']!r}). Remove one."
            )


def _classes(organ: str, lines: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    found = sorted({line["class"] for line in lines})
    known = CLASSES.get(organ)
    if known is None:
        return tuple(found)
    strange = [name for name in found if name not in known]
    if strange:
        index = next(i for i, line in enumerate(lines) if line["class"] in strange)
        raise SpiderError(
            f"metadata.json, record {index}: class {lines[index]['class']!r} is none of "
            f"SPIDER-{organ}'s {len(known)}: {', '.join(known)}. Check that this is SPIDER-{organ}."
        )
    return known


def _warnings(organ: str, classes: Sequence[str], records: Sequence[SpiderRecord]) -> Iterable[str]:
    tests = {record.slide_id for record in records if record.split == "test"}
    others = {record.slide_id for record in records if record.split != "test"}
    if tests & others:
        names = sorted(tests & others)
        yield (
            f"{len(names)} slides are in both train and test, so test scores may be too good: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        )
    absent = set(range(len(classes))) - {record.label for record in records}
    if absent:
        yield f"no record of {', '.join(classes[label] for label in sorted(absent))}"
    if organ in PUBLISHED:
        n_test = sum(record.split == "test" for record in records)
        found = (len({r.label for r in records}), len(records) - n_test, n_test)
        names = ("classes", "training records", "test records")
        for name, count, published in zip(names, found, PUBLISHED[organ], strict=True):
            if count != published:
                yield f"{count:,} {name}, published: {published:,}"


# --- from record to row -----------------------------------------------------------------------


@dataclass(frozen=True)
class SpiderTask:
    """A record, and where its images are.

    Attributes:
        record: Which.
        locations: 25, row-major; None where there is no such file.
    """

    record: SpiderRecord
    locations: tuple[Location | None, ...]


@dataclass(frozen=True)
class SpiderRow:
    """What became of a record.

    Attributes:
        row: Columns of the data set; None if the record is left out.
        problems: Files that are absent or cannot be decoded.
        lost: Left out because its labelled patch cannot be had, not for want of context.
    """

    row: dict[str, Any] | None
    problems: tuple[str, ...] = ()
    lost: bool = False


def locate(source: OpenSource, record: SpiderRecord) -> SpiderTask:
    """Look up the places of a record's images."""
    places = tuple(source.locations.get(name) if name else None for name in record.names)
    return SpiderTask(record, places)


def make_rows(
    reader: FolderReader | PartsReader, tasks: Sequence[SpiderTask], missing: str
) -> list[SpiderRow]:
    """Rows of some records; a worker process runs this."""
    return [make_row(reader, task, missing) for task in tasks]


def make_row(reader: FolderReader | PartsReader, task: SpiderTask, missing: str) -> SpiderRow:
    """Read a record's images and make its row.

    Without its labelled patch a record is left out; a neighbour that cannot be had counts as
    missing. Either is reported.

    Args:
        reader: Of the source.
        task: Record and places.
        missing: One of `MISSING`.

    Raises:
        SpiderError: The source cannot be read, which is no fault of the image.
    """
    record = task.record
    if missing == "drop" and None in record.names:
        return SpiderRow(None)  # before 25 images are decoded
    tiles: list[np.ndarray | None] = []
    problems = []
    content = b""
    for place, name, location in zip(PLACES, record.names, task.locations, strict=True):
        tile = None
        if name is not None:
            where = f"record {record.index} ({record.slide_id}), {place} {name}"
            try:
                if location is None:
                    raise ValueError("no such file")
                found = reader.read(location)
                tile = _decode(found)
                content = found if place == CENTRE_PLACE else content
            except SpiderError:
                raise
            except ValueError as error:
                problems.append(f"{where}: {error}")
            except OSError as error:
                raise SpiderError(
                    f"{where}: {error}. That says nothing of the image, so no record is left out "
                    "for it. Run the same command again once it can be read: finished shards are "
                    "kept. If it never will be, remove the file, and its record is left out."
                ) from error
        tiles.append(tile)
    if tiles[CENTRE_INDEX] is None:
        text = f"record {record.index} left out: its labelled patch cannot be had"
        return SpiderRow(None, (*problems, text), lost=True)
    n_missing = sum(tile is None for tile in tiles)
    if n_missing and missing == "drop":
        return SpiderRow(None, tuple(problems))
    row = {
        "image_20x": {"bytes": content, "path": record.image_name},
        "image_5x": encode(view_5x(tiles, missing), "png"),
        "label": record.label,
        "slide_id": record.slide_id,
        "num_missing_context": n_missing,
        "mpp": TEACHER_MPP,
        "mpp_5x": STUDENT_MPP,
    }
    return SpiderRow(row, tuple(problems))


def _decode(content: bytes) -> np.ndarray:
    """A PNG of 224 x 224 px as (224, 224, 3) uint8.

    Raises:
        ValueError: It is none, or broken.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            # Before decoding: a header may claim any size.
            if image.size != (PATCH_PX, PATCH_PX):
                raise ValueError(f"{image.size[0]} x {image.size[1]} px, expected 224 x 224")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"does not decode as PNG ({error})") from error


def view_5x(tiles: Sequence[np.ndarray | None], missing: str) -> np.ndarray:
    """The 5x view: the 5 x 5 patches stitched, the central 896 px reduced by 4.

    The resampling kernel reaches 12 px beyond the 896, into the neighbours that were cropped.

    Args:
        tiles: 25, row-major, each (224, 224, 3) uint8 or None; the centre is there.
        missing: `white` or `reflect`.

    Returns:
        (224, 224, 3) uint8 at 2.0 um/px.
    """
    rows = [list(tiles[GRID * row : GRID * (row + 1)]) for row in range(GRID)]
    if missing == "reflect":
        rows = mirror_missing(rows)
    white = np.full((PATCH_PX, PATCH_PX, 3), WHITE, np.uint8)
    canvas = np.concatenate(
        [np.concatenate([white if t is None else t for t in row], axis=1) for row in rows], axis=0
    )  # (1120, 1120, 3)
    end = MARGIN_PX + REGION_PX
    return resample(canvas, (STUDENT_PX, STUDENT_PX), (MARGIN_PX, MARGIN_PX, end, end))


def mirror_missing(rows: Sequence[Sequence[np.ndarray | None]]) -> list[list[np.ndarray | None]]:
    """Fill missing patches with the mirror image of the tissue beside them.

    Down the columns first, then along the rows. Where whole rows and columns are missing, as at
    a slide's edge, this is numpy's `pad(mode="symmetric")` of what is there.

    Args:
        rows: 5 x 5; the centre is there.

    Returns:
        5 x 5, none missing.
    """
    columns = [_mirror_line([row[c] for row in rows], axis=0) for c in range(GRID)]
    return [_mirror_line([column[r] for column in columns], axis=1) for r in range(GRID)]


def _mirror_line(line: Sequence[np.ndarray | None], axis: int) -> list[np.ndarray | None]:
    """Fill one row or column of patches; left as it is if all are missing."""
    there = [i for i, tile in enumerate(line) if tile is not None]
    filled = list(line)
    for i, tile in enumerate(line):
        if tile is not None or not there:
            continue
        near = min(there, key=lambda j, i=i: (abs(j - i), abs(j - CENTRE)))
        distance = abs(near - i)
        # The patch as far behind the edge as this one is before it; else fold the edge's own.
        behind = near + (distance - 1) * (1 if near > i else -1)
        if behind in there:
            source, flipped = line[behind], True
        else:
            source, flipped = line[near], distance % 2 == 1
        filled[i] = np.flip(source, axis) if flipped and source is not None else source
    return filled

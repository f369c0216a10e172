"""Labels joined with bags: who is in a study, and who is left out and why."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xmag_hf.embedding.bag import BagError, not_the_same
from xmag_hf.reporting.tables import MISSING, doubled_heading

from .bags import BagContentError, BagFile, LabelledBags, open_bag, spokesman
from .errors import MILError

REST = "rest"
# (what is counted, steps done since the last call, steps in all)
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LabelRow:
    """A line of a label CSV."""

    slide_id: str
    patient_id: str
    label: str


@dataclass(frozen=True)
class Exclusion:
    """A slide that is left out of a cohort, and why."""

    slide_id: str
    reason: str


@dataclass(frozen=True, eq=False)
class Cohort:
    """Slides that have a label, and a good bag in every folder; by slide_id.

    Attributes:
        name: For tables.
        slide_ids: (n,) str, ascending.
        patient_ids: (n,) str.
        labels: (n,) int64, numbers of `classes`.
        classes: Names.
        bags: n files for each folder, in the order of the folders.
        exclusions: Slides left out.
    """

    name: str
    slide_ids: np.ndarray
    patient_ids: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    bags: tuple[tuple[BagFile, ...], ...]
    exclusions: tuple[Exclusion, ...]

    def __len__(self) -> int:
        return len(self.slide_ids)

    def labelled(self, folder: int) -> LabelledBags:
        """The bags of one folder with the labels."""
        return LabelledBags(self.bags[folder], self.labels)

    def rows(self, keep: np.ndarray, reason: str) -> Cohort:
        """The slides of a (n,) mask; the others are left out for `reason`."""
        dropped = tuple(Exclusion(str(name), reason) for name in self.slide_ids[~keep])
        return replace(
            self,
            slide_ids=self.slide_ids[keep],
            patient_ids=self.patient_ids[keep],
            labels=self.labels[keep],
            bags=tuple(tuple(np.array(files, object)[keep]) for files in self.bags),
            exclusions=(*self.exclusions, *dropped),
        )


def read_labels(
    path: Path, column: str = "label", against_rest: str | None = None
) -> list[LabelRow]:
    """Read a label CSV: slide_id, patient_id and a column of classes.

    Args:
        path: UTF-8, with a header; other columns are ignored.
        column: Of the classes.
        against_rest: Keep this class, and call all others `rest`.

    Returns:
        A row a line.

    Raises:
        MILError: A missing column, an empty or ragged line, a slide_id given twice, or a class
            that no line has.
        OSError: The file cannot be read.
    """
    rows = []
    for number, line in read_lines(path, ("slide_id", "patient_id", column)):
        needed = ("slide_id", "patient_id", column)
        empty = [name for name in needed if line[name].lower() in MISSING]
        if empty:
            raise MILError(
                f"{path}, line {number}: no {empty[0]}. Fill it in, or drop the line; where each "
                "slide is its own patient, repeat the slide_id as patient_id."
            )
        rows.append(LabelRow(line["slide_id"], line["patient_id"], line[column]))
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if first.setdefault(row.slide_id, number) != number:
            raise MILError(
                f"{path}: slide_id {row.slide_id!r} stands in rows {first[row.slide_id]} and "
                f"{number}. Keep one of them."
            )
    if against_rest is None:
        return rows
    if against_rest not in {row.label for row in rows}:
        found = ", ".join(sorted({row.label for row in rows}))
        raise MILError(f"--against-rest {against_rest!r}: {path} has the classes {found}.")
    return [
        row if row.label == against_rest else LabelRow(row.slide_id, row.patient_id, REST)
        for row in rows
    ]


def read_lines(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> text) of a CSV that has `columns`; blanks around text are dropped.

    Raises:
        MILError: No such file, a column is missing or there twice, no lines, or one with another
            number of fields.
        OSError: The file cannot be read.
    """
    if not Path(path).is_file():
        raise MILError(f"{path}: no such CSV file.")
    with Path(path).open(newline="", encoding="utf-8-sig") as stream:
        try:
            reader = csv.DictReader(stream)
            lines = [(reader.line_num, line) for line in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise MILError(f"{path}: cannot be read as CSV: {error}.") from error
        header = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in columns if name not in header]
    if missing:
        raise MILError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(header) or 'nothing'}."
        )
    twice = doubled_heading([name for name in header if name in columns])
    if twice is not None:
        raise MILError(f"{path}: column {twice} stands there twice. Drop or rename one.")
    for number, line in lines:
        if None in line or None in line.values():
            raise MILError(
                f"{path}, line {number}: not as many fields as the header. Quote those that hold "
                "commas."
            )
    if not lines:
        raise MILError(f"{path}: a header without lines.")
    return [(n, {key.strip(): text.strip() for key, text in line.items()}) for n, line in lines]


def class_names(rows: Sequence[LabelRow]) -> tuple[str, ...]:
    """Classes in order: whole numbers by value, names by letter, `rest` first.

    Raises:
        MILError: One class only, or numbers with fractions that hardly repeat.
    """
    names = {row.label for row in rows}
    if len(names) < 2:
        raise MILError(
            f"labels: all {len(rows)} slides are {names.pop()!r}; two classes are needed."
        )
    if all(name.lstrip("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    if all(map(_is_number, names)) and len(names) > len(rows) / 2:
        raise MILError(
            f"labels: {len(names)} values ({', '.join(sorted(names)[:3])}, ...) in {len(rows)} "
            "slides are measurements, not classes. Name another column (--label-column), or cut "
            "the values into classes in the CSV."
        )
    return tuple(sorted(names, key=lambda name: (name != REST, name)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def join(
    name: str,
    rows: Sequence[LabelRow],
    folders: Sequence[Path],
    classes: Sequence[str],
    advance: Advance | None = None,
) -> Cohort:
    """Find and check the bags of labelled slides.

    A slide must have a good bag in every folder, so that encoders are compared on the same slides.

    Args:
        name: Of the cohort.
        rows: Of its label CSV.
        folders: Of bags, `<slide_id>.h5`, one for each encoder.
        classes: All that labels may be.
        advance: Told of each bag that was read.

    Returns:
        The cohort. A label without a bag, a bag without a label, an empty or damaged bag and one
        with values that are not finite are among its exclusions.

    Raises:
        MILError: A folder without bags, or with bags of several encoders; a label outside
            `classes`; or no slide is left.
    """
    unknown = sorted({row.label for row in rows} - set(classes))
    if unknown:
        raise MILError(
            f"{name}: labels {', '.join(unknown)} are none of the classes {', '.join(classes)}."
        )
    found = [bag_paths(folder) for folder in folders]
    excluded: dict[str, str] = {}
    wanted = sorted(rows, key=lambda row: row.slide_id)
    labelled = {row.slide_id for row in rows}
    for folder, paths in zip(folders, found, strict=True):
        for row in wanted:
            if row.slide_id not in paths:
                reason = f"a label, and no bag in {folder.name}"
                if (stem := Path(row.slide_id).stem) in paths.keys() - labelled:
                    reason += f"; {stem}.h5 is there: call it {stem} in the CSV"
                excluded.setdefault(row.slide_id, reason)
        for slide_id in sorted(paths.keys() - labelled):
            excluded.setdefault(slide_id, f"a bag in {folder.name}, and no label")
    kept = [row for row in wanted if row.slide_id not in excluded]
    bags: list[dict[str, BagFile]] = []
    for paths in found:
        bags.append({})
        for row in kept:
            try:
                bags[-1][row.slide_id] = open_bag(paths[row.slide_id])
            except (BagContentError, BagError) as error:
                excluded.setdefault(row.slide_id, str(error))
            if advance is not None:
                advance(f"{name}: bags checked", 1, len(kept) * len(folders))
        check_same_encoder(list(bags[-1].values()))
    kept = [row for row in kept if row.slide_id not in excluded]
    if not kept:
        reasons = "; ".join(f"{who}: {why}" for who, why in list(excluded.items())[:3])
        raise MILError(f"{name}: no slide has both a label and a good bag ({reasons}; ...).")
    return Cohort(
        name=name,
        slide_ids=np.array([row.slide_id for row in kept]),
        patient_ids=np.array([row.patient_id for row in kept]),
        labels=np.array([list(classes).index(row.label) for row in kept]),
        classes=tuple(classes),
        bags=tuple(tuple(files[row.slide_id] for row in kept) for files in bags),
        exclusions=tuple(Exclusion(*item) for item in sorted(excluded.items())),
    )


def bag_paths(folder: Path) -> dict[str, Path]:
    """slide_id -> bag, of the bags that lie in a folder.

    Raises:
        MILError: No such folder, or no bags in it.
    """
    paths = {}
    if folder.is_dir():
        paths = {path.stem: path for path in folder.glob("*.h5") if not path.name.startswith(".")}
    if not paths:
        raise MILError(f"{folder}: no folder of bags (SLIDE_ID.h5). Make them with `xmag embed`.")
    return paths


def check_same_encoder(bags: Sequence[BagFile]) -> None:
    """Refuse bags of several encoders, scales or widths in one folder.

    Raises:
        MILError: Names two slides that differ, and in what.
    """
    if not bags:
        return
    first = spokesman(bags)
    for bag in bags:
        told = differences(first, bag)
        if told:
            raise MILError(
                f"{bag.path.parent}: {first.slide_id} and {bag.slide_id} are not of one encoder: "
                f"{told}. Keep one folder for each encoder."
            )


def differences(one: BagFile, other: BagFile) -> str:
    """In what two bags' encoders differ, with both values; empty if they are the same."""
    ours, theirs = (bag.identity | {"embed_dim": bag.embed_dim} for bag in (one, other))
    return ", ".join(
        f"{name} {ours[name]!r} and {theirs[name]!r}" for name in not_the_same(ours, theirs)
    )

"""Which slides, and what is known about each: paths, folders, globs and the slide CSV."""

from __future__ import annotations

import csv
import glob
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from xmag_hf.slides.dicom import series_uid

from .corpus_options import CorpusError

# What OpenSlide 4 reads; a folder is searched for these. A file named outright is tried whatever
# its suffix.
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn"),
    *(".bif", ".svslide", ".vms", ".vmu", ".dcm", ".czi"),
)
DICOM_SUFFIX = ".dcm"
OWN_COLUMNS = ("slide", "slide_id", "patient_id", "cancer_type", "mpp", "source")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideRow:
    """A slide and its metadata.

    Attributes:
        path: The file.
        slide_id: Default the file's stem; see `find_slides` for DICOM.
        patient_id: Default the slide_id: every slide its own patient, so that slides of one
            patient may come on both sides of a split. Give it where patients have several.
        cancer_type: Empty if unknown.
        mpp: um/px of level 0 if the file's own must be overruled.
        source: Where the slide is from; default the file's name.
        extra: Other columns of the CSV, carried into the manifest.
    """

    path: Path
    slide_id: str = ""
    patient_id: str = ""
    cancer_type: str = ""
    mpp: float | None = None
    source: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = Path(self.path)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "slide_id", self.slide_id or path.stem)
        object.__setattr__(self, "patient_id", self.patient_id or self.slide_id)
        object.__setattr__(self, "source", self.source or path.name)


def find_slides(patterns: Iterable[str | os.PathLike[str]]) -> list[SlideRow]:
    """Slides of paths, globs (`**` allowed) and folders (searched through, sorted).

    Of a DICOM series, which has a file for each level, the largest file stands for all. It is named
    after the folder where several files are of this series and no other slide lies beside them,
    else after its own file.

    Args:
        patterns: What the user named.

    Returns:
        Rows, each slide once, in the order named.

    Raises:
        CorpusError: A pattern that finds nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            hits = _slides_under(path)
        elif path.exists():
            hits = [path]
        else:
            hits = sorted(Path(hit) for hit in glob.glob(str(pattern), recursive=True))
        if not hits:
            what = "no slide in this folder" if path.is_dir() else "no such file or folder"
            raise CorpusError(
                f"{pattern}: {what}. Give files (PNG and JPEG too), globs, or folders with "
                f"{' '.join(SLIDE_SUFFIXES)}."
            )
        found.update(dict.fromkeys(hits))
    return _rows(found)


def read_slides_csv(
    path: str | os.PathLike[str], slides_dir: str | os.PathLike[str] | None = None
) -> list[SlideRow]:
    """Rows of a slide CSV.

    Args:
        path: CSV with a header. Column `slide` (a path, relative to `slides_dir` or else to the
            CSV's folder), or `slide_id` together with `slides_dir` (files are found by stem).
            Known: slide_id, patient_id, cancer_type, mpp, source. Others are carried along.
        slides_dir: Folder of the slides, searched through.

    Returns:
        One row a line, in the file's order.

    Raises:
        CorpusError: No UTF-8, no usable column, an empty or ambiguous slide, an mpp that is no
            number; the line is named.
        OSError: The CSV cannot be read.
    """
    path = Path(path)
    lines = _read_table(path)
    columns = set(lines[0][1]) if lines else set()
    by_path = "slide" in columns
    if not by_path and not ("slide_id" in columns and slides_dir is not None):
        raise CorpusError(
            f"{path}: columns {', '.join(sorted(columns)) or 'none'}. It needs a column `slide` "
            "with paths, or `slide_id` together with --slides-dir."
        )
    root = Path(slides_dir) if slides_dir is not None else path.parent
    stems = {} if by_path else _by_stem(root)
    files = []
    for number, line in lines:
        where = f"{path}, line {number}"
        file = root / _needed(line, "slide", where) if by_path else None
        files.append(file or _unique_file(stems, _needed(line, "slide_id", where), root, where))
    series = _dicom_series(files)
    return [
        _row(SlideRow(*series.get(file, (file, ""))), line, f"{path}, line {number}")
        for file, (number, line) in zip(files, lines, strict=True)
    ]


def with_csv_metadata(
    slides: Sequence[SlideRow], csv_path: str | os.PathLike[str]
) -> list[SlideRow]:
    """Slides named by the user, with the metadata of a slide CSV, matched by name or stem.

    Args:
        slides: As `find_slides` gives them.
        csv_path: CSV with `slide_id` or `slide`; lines for other slides are ignored.

    Returns:
        A row for each; a slide without a line gets the defaults, and a warning says so.

    Raises:
        CorpusError: As `read_slides_csv`, two lines for one stem, or no line for any file.
    """
    csv_path = Path(csv_path)
    lines = _lines_by_name(
        csv_path, lambda line: _stem(line) if line.get("slide") else line.get("slide_id", "")
    )
    if not any(name in lines for slide in slides for name in _names(slide)):
        raise CorpusError(
            f"{csv_path}: no line is for any of the {len(slides)} slides ({slides[0].slide_id}, "
            "...). Its `slide_id` (or the stem of `slide`) must be the stem of the file."
        )
    rows = []
    for slide in slides:
        number, line = next((lines[n] for n in _names(slide) if n in lines), (0, {}))
        rows.append(_row(slide, line, f"{csv_path}, line {number}"))
    _warn_unmatched(csv_path, slides, lines)
    return rows


def read_mpp(csv_path: str | os.PathLike[str]) -> dict[str, float]:
    """um/px of level 0 of a slide CSV's slides, where it gives them.

    Args:
        csv_path: CSV with `mpp`, and `slide_id` or `slide` (its stem counts).

    Returns:
        slide_id -> um/px.

    Raises:
        CorpusError: A line without a slide or with an mpp that is no number above 0, two lines
            for one slide, or no line with an mpp.
        OSError: The CSV cannot be read.
    """
    csv_path = Path(csv_path)
    found: dict[str, float] = {}
    lines = _lines_by_name(csv_path, lambda line: line.get("slide_id") or _stem(line))
    for name, (number, line) in lines.items():
        where = f"{csv_path}, line {number}"
        mpp = _row(SlideRow(Path(name)), line, where).mpp
        if mpp is not None and not 0 < mpp < math.inf:
            raise CorpusError(f"{where}: mpp {mpp:g} must be above 0.")
        if mpp is not None:
            found[name] = mpp
    if not found:
        raise CorpusError(f"{csv_path}: no line has an mpp. It needs columns slide_id and mpp.")
    return found


def check_unique(slides: Sequence[SlideRow]) -> None:
    """Refuse an empty list and slides that share a slide_id.

    Raises:
        CorpusError: Names the ids and their files.
    """
    if not slides:
        raise CorpusError("No slides given. Name files, folders, globs, or a slide CSV.")
    twice = [name for name, n in Counter(row.slide_id for row in slides).items() if n > 1]
    if twice:
        files = [str(row.path) for row in slides if row.slide_id == twice[0]]
        raise CorpusError(
            f"slide_id {twice[0]!r} stands for {len(files)} slides: {', '.join(files)}"
            + (f" (and {len(twice) - 1} more ids)" if len(twice) > 1 else "")
            + ". Give each its own slide_id in the slide CSV."
        )


@contextmanager
def open_table(path: Path, *, remedy: str, delimiter: str = ",") -> Iterator[csv.DictReader]:
    """Open a CSV with a header for reading.

    Args:
        path: Of the file.
        remedy: What to do about one that is no UTF-8, or no CSV.
        delimiter: Between fields.

    Yields:
        Its lines.

    Raises:
        CorpusError: Bytes or quotes that cannot be read, while the block reads on.
        OSError: The file cannot be read.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            yield reader
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: not UTF-8 text ({error}). {remedy}") from error
        except csv.Error as error:
            line = reader.reader.line_num
            raise CorpusError(f"{path}, line {line}: {error}. {remedy}") from error


def absolute(row: SlideRow) -> SlideRow:
    """The row with an absolute path, for workers and records."""
    return replace(row, path=row.path.absolute())


def _lines_by_name(
    path: Path, name_of: Callable[[dict[str, str]], str]
) -> dict[str, tuple[int, dict[str, str]]]:
    """Name of a slide -> (line number, line); a line without a name or a name twice is refused."""
    lines: dict[str, tuple[int, dict[str, str]]] = {}
    for number, line in _read_table(path):
        where, name = f"{path}, line {number}", name_of(line)
        if not name:
            raise CorpusError(f"{where}: neither `slide` nor `slide_id`. Fill in one of them.")
        if name in lines:
            raise CorpusError(f"{where}: {name} again, first on line {lines[name][0]}. Drop one.")
        lines[name] = (number, line)
    return lines


def _warn_unmatched(csv_path: Path, slides: Sequence[SlideRow], lines: Collection[str]) -> None:
    """Name slides without a line: a name misspelt there costs a slide its patient and um/px."""
    without = [slide.slide_id for slide in slides if not any(n in lines for n in _names(slide))]
    if not without:
        return  # lines for other slides are usual: a glob takes some of them
    named = {name for slide in slides for name in _names(slide)}
    unused = [name for name in lines if name not in named]
    logger.warning(
        "%s: no line for %d of %d slides (%s): each counts as a patient of its own, at its file's "
        "um/px. %d lines are for no slide here%s. Correct the names, or add lines.",
        csv_path,
        len(without),
        len(slides),
        _first(without),
        len(unused),
        f" ({_first(unused)})" if unused else "",
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _stem(line: dict[str, str]) -> str:
    """Of the file that a line names; empty if it names none."""
    return Path(line.get("slide", "")).stem


def _read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> text) of a CSV; surrounding blanks and empty lines are dropped."""
    lines = []
    with open_table(path, remedy="Save it as `CSV UTF-8`, which Excel offers, too.") as reader:
        for line in reader:
            if None in line or None in line.values():
                raise CorpusError(
                    f"{path}, line {reader.line_num}: not as many fields as the header. Quote "
                    "fields that hold commas."
                )
            clean = {key.strip(): text.strip() for key, text in line.items()}
            if any(clean.values()):
                lines.append((reader.line_num, clean))
    return lines


def _row(slide: SlideRow, line: dict[str, str], where: str) -> SlideRow:
    """The slide with what a line says of it."""
    text = line.get("mpp", "")
    try:
        mpp = float(text) if text else None
    except ValueError:
        raise CorpusError(
            f"{where}: mpp {text!r} is no number. Give um/px, or leave it empty."
        ) from None
    return SlideRow(
        path=slide.path,
        slide_id=line.get("slide_id", "") or slide.slide_id,
        patient_id=line.get("patient_id", ""),
        cancer_type=line.get("cancer_type", ""),
        mpp=mpp,
        source=line.get("source", ""),
        extra={key: value for key, value in line.items() if key not in OWN_COLUMNS},
    )


def _needed(line: dict[str, str], column: str, where: str) -> str:
    if not line[column]:
        raise CorpusError(f"{where}: column `{column}` is empty. Fill it in, or drop the line.")
    return line[column]


def _slides_under(folder: Path) -> list[Path]:
    """Slides in a folder and those below it. Links to folders are followed, each folder once."""
    found: list[Path] = []
    seen: set[str] = set()  # real paths: links may lead in a circle
    starts = [folder]  # what links lead to comes last, so that a folder goes by its own name
    for start in starts:
        for root, names, files in os.walk(start):
            real = os.path.realpath(root)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            found += [Path(root, name) for name in files]
            starts += [Path(root, name) for name in names if os.path.islink(Path(root, name))]
    return sorted(path for path in found if _is_slide(path))


def _is_slide(path: Path) -> bool:
    known = path.suffix.lower() in SLIDE_SUFFIXES
    return known and not path.name.startswith(".") and path.is_file()


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() == DICOM_SUFFIX


def _rows(paths: Iterable[Path]) -> list[SlideRow]:
    """A row for each file, and for each DICOM series one."""
    series = _dicom_series(paths)
    slides = dict(series.get(path, (path, "")) for path in paths)
    return [SlideRow(path, slide_id) for path, slide_id in slides.items()]


def _dicom_series(paths: Iterable[Path]) -> dict[Path, tuple[Path, str]]:
    """DICOM file -> the file that stands for its series, and the series' name ('': the file's).

    Only the folders of DICOM files are looked at, and these whole: a slide must not be called
    otherwise because one of its files was named and not its folder.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for folder in {path.parent for path in paths if _is_dicom(path) and path.is_file()}:
        slides = sorted(path for path in folder.iterdir() if _is_slide(path))
        series: dict[str, list[Path]] = defaultdict(list)
        for file in filter(_is_dicom, slides):
            uid = series_uid(file)
            if uid is not None:
                series[uid].append(file)
        alone = len(series) == 1 and all(map(_is_dicom, slides))
        for files in series.values():
            largest = max(files, key=lambda file: file.stat().st_size)  # level 0
            name = folder.resolve().name if alone and len(files) > 1 else ""
            found |= dict.fromkeys(files, (largest, name))
    folders = Counter(name for _, name in set(found.values()))
    # Several folders of one name (patient1/WSI, patient2/WSI) name nothing.
    return {file: (shown, name * (folders[name] == 1)) for file, (shown, name) in found.items()}


def _names(slide: SlideRow) -> tuple[str, ...]:
    """What a CSV may call a slide."""
    return slide.slide_id, slide.path.stem


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = defaultdict(list)
    for slide in _rows(_slides_under(folder)):
        for name in dict.fromkeys(_names(slide)):
            stems[name].append(slide.path)
    return stems


def _unique_file(stems: dict[str, list[Path]], slide_id: str, root: Path, where: str) -> Path:
    files = stems.get(slide_id, [])
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} files: {', '.join(map(str, files))}" if files else "no file"
    raise CorpusError(
        f"{where}: slide_id {slide_id!r} has {found} under {root}. Add a column `slide` with the "
        "path, or correct --slides-dir."
    )

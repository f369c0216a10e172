"""From the label files that sources hand out to the label CSV of a study.

A file is known by its columns: a GDC sample sheet, PANDA's train.csv, TCIA's slide tables of CPTAC,
DHMC's metadata, and a table of recurrence scores by patient.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xmag_hf.atomic_write import write_atomically
from xmag_hf.data_builders.tcga import parse_barcode, read_sample_sheet
from xmag_hf.reporting.tables import MISSING, doubled_heading

from .errors import MILError
from .options import EXTERNAL, StudyOptions
from .presets import Preset, load_preset

logger = logging.getLogger(__name__)

HIGH_SCORE = 25.0  # Oncotype DX: above it chemotherapy is advised (TAILORx); the paper's cut
# Columns by which files are known: one of each tuple must be there. Releases spell them variously.
GDC_COLUMNS = (("File Name",), ("Project ID",), ("Case ID",))
PANDA_COLUMNS = (("image_id",), ("isup_grade",))
CPTAC_COLUMNS = (("Slide_ID", "slide_id"), ("Case_ID", "case_id"))
CPTAC_TUMOUR = ("Tumor", "tumor_code", "Tumor_Code")
CPTAC_TISSUE = ("Specimen_Type", "tissue_type", "Tissue_Type")
DHMC_COLUMNS = (("File Name", "file_name"), ("Diagnosis", "diagnosis", "Class", "class"))
SCORE_COLUMNS = (
    ("patient_id", "patient", "Case ID", "bcr_patient_barcode", "PATIENT_ID"),
    ("recurrence_score", "odx_score", "GHI_RS_Model_NJEM.2004_PMID.15591335"),
)
# In order: a GDC sheet also has "File Name", a CPTAC table no image_id.
_KINDS = {
    "gdc": GDC_COLUMNS,
    "panda": PANDA_COLUMNS,
    "scores": SCORE_COLUMNS,
    "cptac": CPTAC_COLUMNS,
    "dhmc": DHMC_COLUMNS,
}
_READ = {  # all columns that are looked at
    name
    for columns in (*_KINDS.values(), (CPTAC_TUMOUR, CPTAC_TISSUE))
    for names in columns
    for name in names
}
_CPTAC_CASE = re.compile(r"^(C3[LN]-\d{5})(?:-\d{2})?$")


@dataclass(frozen=True)
class LabelRow:
    """A slide with its label.

    Attributes:
        slide_id: Name of its bag: the file's name without suffix.
        patient_id: Person.
        label: One of the preset's classes.
        cohort: Name of the preset's cohort.
    """

    slide_id: str
    patient_id: str
    label: str
    cohort: str


def preset_labels(name: str, files: Sequence[Path]) -> list[LabelRow]:
    """Rows of a preset's slides from the sources' own label files.

    Args:
        name: Of the preset.
        files: Label files of its cohorts, in any order; a cohort without a file is left out.

    Returns:
        Rows sorted by cohort and slide; what has no class of the preset is left out and logged.

    Raises:
        MILError: A file of no known kind or of another preset, a needed file that is not given, a
            column that stands twice, no row left, or a slide with two labels.
        CorpusError: A GDC sample sheet that contradicts its barcodes.
        OSError: A file cannot be read.
    """
    preset = load_preset(name)
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        by_kind.setdefault(_kind(file), []).append(file)
    cohort_of = {cohort.source: cohort.name for cohort in preset.cohorts if cohort.available}
    found: list[tuple[LabelRow, Path]] = []
    for kind, paths in by_kind.items():
        if kind == "gdc" and "scores" in cohort_of:
            continue  # names the slides of the patients who have scores
        if kind not in cohort_of:
            raise MILError(
                f"{paths[0]}: columns of kind {kind!r}, and preset {name} takes "
                f"{', '.join(cohort_of)}. Give label files of its cohorts: "
                f"{', '.join(cohort.name for cohort in preset.cohorts)}."
            )
        for path in paths:
            rows = (
                _scored(preset, path, by_kind.get("gdc", []), cohort_of[kind])
                if kind == "scores"
                else _labelled(preset, path, kind, cohort_of[kind])
            )
            found += [(row, path) for row in rows]
    return _unique(preset, found)


def write_preset_labels(name: str, files: Sequence[Path], out: Path) -> dict[str, Path]:
    """Write a label CSV for each cohort: `<out>/<preset>-<cohort>.csv`.

    Args:
        name: Of the preset.
        files: See `preset_labels`.
        out: Folder; made if need be.

    Returns:
        Cohort -> its CSV with columns slide_id, patient_id, label.

    Raises:
        MILError: See `preset_labels`.
        OSError: See `preset_labels`.
    """
    rows = preset_labels(name, files)
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for cohort in sorted({row.cohort for row in rows}):
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["slide_id", "patient_id", "label"])
        table.writerows((r.slide_id, r.patient_id, r.label) for r in rows if r.cohort == cohort)
        written[cohort] = out / f"{name}-{cohort}.csv"
        write_atomically(written[cohort], text.getvalue().encode())
    return written


def with_preset(options: StudyOptions) -> StudyOptions:
    """Options of a study with the label CSVs of its preset, which are written beside its folder.

    The cohort that trains is cross-validated; the one that tests is the external cohort where its
    bags are given.

    Args:
        options: With `preset` and `preset_files`.

    Returns:
        The same with labels and external_labels, and external_name where none was chosen.

    Raises:
        MILError: See `preset_labels`; label CSVs are given too; or no label file for the cohort
            that trains, or for the one whose bags are given.
        OSError: See `preset_labels`.
    """
    if options.labels or options.external_labels:
        raise MILError("--labels and --external-labels: --preset makes them from --preset-files.")
    preset = load_preset(str(options.preset))
    out = Path(options.out).expanduser().resolve()
    files = [Path(name) for name in options.preset_files]
    written = write_preset_labels(preset.name, files, out.with_name(f"{out.name}-labels"))
    wanted = {cohort.role: cohort.name for cohort in preset.cohorts if cohort.available}
    if options.external_bags and "test" not in wanted:
        raise MILError(
            f"preset {preset.name}: no cohort to test on that can be had. Leave --external-bags "
            "out, or give --labels and --external-labels without --preset."
        )
    needed = ["train", "test"] if options.external_bags else ["train"]
    for role in needed:
        if wanted.get(role) not in written:
            raise MILError(
                f"preset {preset.name}: no labels of the cohort that is to {role} "
                f"({wanted[role]}). Give its label file with --preset-files."
            )
    name = options.external_name
    if not options.external_bags:
        return replace(options, labels=str(written[wanted["train"]]))
    return replace(
        options,
        labels=str(written[wanted["train"]]),
        external_labels=str(written[wanted["test"]]),
        external_name=wanted["test"] if name == EXTERNAL else name,
    )


def _unique(preset: Preset, found: Sequence[tuple[LabelRow, Path]]) -> list[LabelRow]:
    if not found:
        raise MILError(
            f"preset {preset.name}: no slide with one of its classes "
            f"({', '.join(preset.classes)}). Give its label files: "
            + " ".join(f"{cohort.name}: {cohort.obtain}" for cohort in preset.cohorts)
        )
    known: dict[str, LabelRow] = {}
    for row, path in found:
        if known.setdefault(row.slide_id, row) != row:
            raise MILError(
                f"{path}: slide {row.slide_id} is {row.label} here and "
                f"{known[row.slide_id].label} before. Keep one of the two."
            )
    rows = sorted(known.values(), key=lambda row: (row.cohort, row.slide_id))
    counts = Counter((row.cohort, row.label) for row in rows)
    for cohort in preset.cohorts:
        own = {label: counts[cohort.name, label] for label in preset.classes}
        if sum(own.values()):
            told = ", ".join(f"{label} {n:,}" for label, n in own.items())
            logger.info("%s: %s (the paper: %d slides)", cohort.name, told, cohort.slides)
    return rows


# --- kinds of files --------------------------------------------------------------------------


def _kind(path: Path) -> str:
    _, header = _dialect(path)
    for kind, columns in _KINDS.items():
        if all(any(name in header for name in names) for names in columns):
            return kind
    raise MILError(
        f"{path}: columns {', '.join(header) or 'none'}; known label files are a GDC sample sheet "
        "(File Name, Project ID, Case ID), PANDA's train.csv (image_id, isup_grade), TCIA's slide "
        "table of CPTAC (Slide_ID, Case_ID, Tumor), DHMC's metadata (File Name, Diagnosis), or "
        "scores (patient_id, recurrence_score)."
    )


def _dialect(path: Path) -> tuple[str, list[str]]:
    """Delimiter and header of a table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
    except UnicodeDecodeError as error:
        raise MILError(f"{path}: no text table ({error}). Save it as CSV.") from error
    delimiter = "\t" if "\t" in first else ","
    return delimiter, [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter, header = _dialect(path)
    twice = doubled_heading([name for name in header if name in _READ])
    if twice is not None:
        raise MILError(f"{path}: column {twice} stands there twice. Drop or rename one.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        next(reader)
        for line in reader:
            if not line:
                continue
            if len(line) < len(header):
                raise MILError(f"{path}, line {reader.line_num}: cut short. Download it again.")
            yield reader.line_num, dict(zip(header, map(str.strip, line), strict=False))


def _pick(line: dict[str, str], names: Sequence[str]) -> str | None:
    return next((line[name] for name in names if name in line), None)


def _labelled(preset: Preset, path: Path, kind: str, cohort: str) -> list[LabelRow]:
    """Rows of a file that names each slide's label; others are counted and left out."""
    rows, left_out = [], Counter()
    for slide_id, patient_id, text in _READERS[kind](path):
        label = preset.label_map.get(_folded(text))
        if label is None:
            left_out[text] += 1
        else:
            rows.append(LabelRow(slide_id, patient_id, label, cohort))
    for text, count in left_out.most_common():
        logger.info("%s: %d slides of %r left out: no class of %s", path, count, text, preset.name)
    return rows


def _folded(text: str) -> str:
    """Case, punctuation and a trailing word do not make another diagnosis."""
    text = re.sub(r"[_\s]+", " ", text.strip().lower())
    return text.replace("renal cell carcinoma", "rcc")


def _gdc_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Diagnostic slides of a GDC sample sheet with their project."""
    other = 0
    for filename, project in read_sample_sheet(path).items():
        if not filename.startswith("TCGA-") or Path(filename).suffix.lower() not in (
            ".svs",
            ".tif",
        ):
            other += 1
            continue
        barcode = parse_barcode(filename)
        if barcode.slide_kind == "DX":
            yield Path(filename).stem, barcode.patient_id, project
        else:
            other += 1
    if other:
        logger.info("%s: %d files are no diagnostic slides of TCGA and are left out", path, other)


def _panda_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in _lines(path):
        if line["isup_grade"] not in set("012345"):
            raise MILError(f"{path}, line {number}: isup_grade {line['isup_grade']!r}; 0 to 5.")
        yield line["image_id"], line["image_id"], line["isup_grade"]


def _cptac_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Slides with their tumour: a column, or in the file's name; other tissue is no class."""
    named = [code for code in ("LUAD", "LSCC") if code in path.name.upper()]
    for number, line in _lines(path):
        slide_id = Path(str(_pick(line, CPTAC_COLUMNS[0]))).name.removesuffix(".svs")
        case = str(_pick(line, CPTAC_COLUMNS[1]))
        match = _CPTAC_CASE.match(slide_id)
        if match is not None and match[1] != case:
            raise MILError(
                f"{path}, line {number}: slide {slide_id} has case {case!r}, not that of its "
                "barcode. Download the table again."
            )
        tumour = _pick(line, CPTAC_TUMOUR) or (named[0] if len(named) == 1 else None)
        if tumour is None:
            raise MILError(
                f"{path}: neither a column {' or '.join(CPTAC_TUMOUR)} nor LUAD or LSCC in its "
                "name: whose slides are these?"
            )
        tissue = _pick(line, CPTAC_TISSUE)
        if tissue is None:
            raise MILError(
                f"{path}: no column {' or '.join(CPTAC_TISSUE)}, so normal tissue would pass for "
                "tumour. Download the slide table with it."
            )
        if tissue.lower() in MISSING:
            tumour = f"{tumour}, tissue unknown"
        elif "normal" in tissue.lower():
            tumour = f"{tumour}, normal"
        yield slide_id, case, tumour


def _dhmc_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    for _, line in _lines(path):
        slide_id = Path(str(_pick(line, DHMC_COLUMNS[0]))).stem
        # It names no patients.
        yield slide_id, slide_id, str(_pick(line, DHMC_COLUMNS[1]))


_READERS = {"gdc": _gdc_rows, "panda": _panda_rows, "cptac": _cptac_rows, "dhmc": _dhmc_rows}


def _scored(preset: Preset, path: Path, sheets: Sequence[Path], cohort: str) -> list[LabelRow]:
    """Slides of a GDC sample sheet whose patient has a score; `high` is above 25."""
    if not sheets:
        raise MILError(
            f"{path}: scores are of patients. Give the GDC sample sheet of TCGA-BRCA too: it names "
            "their slides."
        )
    scores: dict[str, float] = {}
    for number, line in _lines(path):
        patient, text = str(_pick(line, SCORE_COLUMNS[0])), str(_pick(line, SCORE_COLUMNS[1]))
        if text.lower() in MISSING:
            continue
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 100:
            raise MILError(
                f"{path}, line {number}: score {text!r} of {patient}; recurrence scores are 0 to "
                "100. Scores on another scale have no cut at 25."
            )
        if scores.setdefault(patient[:12], score) != score:
            raise MILError(f"{path}, line {number}: {patient} has two scores. Keep one.")
    slides = [row for sheet in sheets for row in _gdc_rows(sheet)]
    slides = [row for row in slides if row[2] == "TCGA-BRCA"]
    rows = [
        LabelRow(slide_id, patient, preset.classes[int(scores[patient] > HIGH_SCORE)], cohort)
        for slide_id, patient, _ in slides
        if patient in scores
    ]
    if len(slides) > len(rows):
        logger.info("%s: %d slides without a score left out", path, len(slides) - len(rows))
    return rows

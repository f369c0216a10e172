"""How the paper's corpus is made: TCGA diagnostic slides, from a GDC manifest to slide rows.

On portal.gdc.cancer.gov put the diagnostic slides (Data Type "Slide Image", Experimental Strategy
"Diagnostic Slide") of the projects in a cart, download its manifest and its sample sheet, fetch
the slides with `gdc-client download -m MANIFEST -d DIR`, and run

    xmag corpus --preset tcga --manifest M --sample-sheet S --slides-dir DIR --out corpus

What is known of the paper's choice stands in `TCGA_CORPUS`. Which projects its 16 cancer types
are, and which 6,703 of the diagnostic slides, it does not say (its Figure 1's text counts 15), so
no list is made up here: the default takes every slide of the manifest, and `projects` narrows it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .corpus_options import CorpusError
from .slide_list import SlideRow, open_table

logger = logging.getLogger(__name__)

# Project id -> disease, as the GDC names them (gdc.cancer.gov, TCGA study abbreviations).
TCGA_PROJECTS = {
    "TCGA-ACC": "adrenocortical carcinoma",
    "TCGA-BLCA": "bladder urothelial carcinoma",
    "TCGA-BRCA": "breast invasive carcinoma",
    "TCGA-CESC": "cervical squamous cell carcinoma and endocervical adenocarcinoma",
    "TCGA-CHOL": "cholangiocarcinoma",
    "TCGA-COAD": "colon adenocarcinoma",
    "TCGA-DLBC": "lymphoid neoplasm diffuse large B-cell lymphoma",
    "TCGA-ESCA": "esophageal carcinoma",
    "TCGA-GBM": "glioblastoma multiforme",
    "TCGA-HNSC": "head and neck squamous cell carcinoma",
    "TCGA-KICH": "kidney chromophobe",
    "TCGA-KIRC": "kidney renal clear cell carcinoma",
    "TCGA-KIRP": "kidney renal papillary cell carcinoma",
    "TCGA-LAML": "acute myeloid leukemia",
    "TCGA-LGG": "brain lower grade glioma",
    "TCGA-LIHC": "liver hepatocellular carcinoma",
    "TCGA-LUAD": "lung adenocarcinoma",
    "TCGA-LUSC": "lung squamous cell carcinoma",
    "TCGA-MESO": "mesothelioma",
    "TCGA-OV": "ovarian serous cystadenocarcinoma",
    "TCGA-PAAD": "pancreatic adenocarcinoma",
    "TCGA-PCPG": "pheochromocytoma and paraganglioma",
    "TCGA-PRAD": "prostate adenocarcinoma",
    "TCGA-READ": "rectum adenocarcinoma",
    "TCGA-SARC": "sarcoma",
    "TCGA-SKCM": "skin cutaneous melanoma",
    "TCGA-STAD": "stomach adenocarcinoma",
    "TCGA-TGCT": "testicular germ cell tumors",
    "TCGA-THCA": "thyroid carcinoma",
    "TCGA-THYM": "thymoma",
    "TCGA-UCEC": "uterine corpus endometrial carcinoma",
    "TCGA-UCS": "uterine carcinosarcoma",
    "TCGA-UVM": "uveal melanoma",
}
SAMPLE_TYPES = {
    "01": "primary solid tumor",
    "02": "recurrent solid tumor",
    "05": "additional new primary",
    "06": "metastatic",
    "07": "additional metastatic",
    "11": "solid tissue normal",
}
# TCGA-<site>-<participant>-<sample><vial>-<portion>-<slide>, then the file's own id.
_BARCODE = re.compile(
    r"^(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})-(\d{2})([A-Z])-(\d{2})-([A-Z]{2})([A-Z0-9]{1,2})(?=\.|$)"
)
_MANIFEST_COLUMNS = ("id", "filename", "size")
_SHEET_COLUMNS = ("File Name", "Project ID", "Case ID")


@dataclass(frozen=True)
class PublishedCorpus:
    """What a paper says about its corpus."""

    source: str
    slides: int
    pairs: int
    cancer_types: int
    slide_kind: str
    note: str


TCGA_CORPUS = PublishedCorpus(
    source="arXiv 2509.23097",
    slides=6_703,
    pairs=3_490_000,
    cancer_types=16,
    slide_kind="DX",
    note="The paper's corpus: 6,703 diagnostic slides, 3.49M pairs, 16 cancer types (15 in the "
    "text of its Figure 1). It does not name the projects; all of the manifest are taken.",
)


@dataclass(frozen=True)
class Barcode:
    """Parts of a TCGA slide barcode.

    Attributes:
        patient_id: Project, tissue source site and participant: TCGA-A1-A0SB.
        sample_type: Two digits, see `SAMPLE_TYPES`.
        slide_kind: DX diagnostic (paraffin), TS, MS or BS top, middle, bottom (frozen).
    """

    patient_id: str
    sample_type: str
    slide_kind: str


@dataclass(frozen=True)
class GdcFile:
    """A line of a GDC manifest: id (UUID), filename, size in bytes."""

    file_id: str
    filename: str
    size: int


def parse_barcode(filename: str) -> Barcode:
    """Patient, sample type and slide kind of a TCGA slide file.

    Args:
        filename: TCGA-A1-A0SB-01Z-00-DX1.B34C267B-....svs

    Raises:
        CorpusError: No TCGA slide barcode.
    """
    match = _BARCODE.match(filename)
    if match is None:
        raise CorpusError(
            f"{filename}: no TCGA slide barcode (TCGA-XX-XXXX-01Z-00-DX1...). Use a slide CSV for "
            "other slides."
        )
    return Barcode(match[1], match[2], match[5])


def read_gdc_manifest(path: str | Path) -> list[GdcFile]:
    """Lines of a GDC manifest (tab separated: id, filename, md5, size, state).

    Raises:
        CorpusError: Columns are missing or a size is no number.
        OSError: It cannot be read.
    """
    path = Path(path)
    files = []
    for number, line in _read_tsv(path, _MANIFEST_COLUMNS, "GDC manifest"):
        if not line["size"].isdigit():
            raise CorpusError(f"{path}, line {number}: size {line['size']!r} is no number.")
        files.append(GdcFile(line["id"], line["filename"], int(line["size"])))
    return files


def read_sample_sheet(path: str | Path) -> dict[str, str]:
    """Project of each file of a GDC sample sheet (columns File Name, Project ID, Case ID).

    Returns:
        File name -> project id.

    Raises:
        CorpusError: Columns are missing, or the case is not the one of the file's barcode.
        OSError: It cannot be read.
    """
    path = Path(path)
    projects = {}
    for number, line in _read_tsv(path, _SHEET_COLUMNS, "GDC sample sheet"):
        name = line["File Name"]
        # A file of several samples repeats its case: "TCGA-A1-A0SB, TCGA-A1-A0SB".
        case = line["Case ID"].split(",")[0].strip()
        if name.startswith("TCGA-") and case != name[:12]:
            raise CorpusError(
                f"{path}, line {number}: {name} has case {case!r}, not that of its barcode. "
                "Download the sheet again."
            )
        projects[name] = line["Project ID"].split(",")[0].strip()
    return projects


def tcga_slides(
    manifest: str | Path,
    slides_dir: str | Path,
    *,
    sample_sheet: str | Path | None = None,
    projects: Sequence[str] = (),
    skip_missing: bool = False,
) -> list[SlideRow]:
    """Rows of the diagnostic slides of a manifest, sorted by slide_id.

    Args:
        manifest: GDC manifest.
        slides_dir: `DIR/<file id>/<file name>` as gdc-client writes, or `DIR/<file name>`.
        sample_sheet: GDC sample sheet; without it cancer types stay empty.
        projects: Take these only, e.g. TCGA-BRCA; needs the sheet.
        skip_missing: Leave out slides that are not there, or whose size is not the manifest's.

    Returns:
        Rows with slide_id (file name without suffix), patient_id (first 12 characters of the
        barcode), cancer_type (the project without "TCGA-"), sample type and GDC id.

    Raises:
        CorpusError: No diagnostic slide, unknown projects, a file that the sheet lacks, or slides
            missing on disk.
    """
    _check_projects(projects, sample_sheet)
    project_of = read_sample_sheet(sample_sheet) if sample_sheet is not None else None
    files = [
        (file, parse_barcode(file.filename))
        for file in read_gdc_manifest(manifest)
        if file.filename.startswith("TCGA-") and file.filename.lower().endswith((".svs", ".tif"))
    ]
    diagnostic = [(f, barcode) for f, barcode in files if barcode.slide_kind == "DX"]
    if len(files) > len(diagnostic):
        logger.info("%d frozen-section slides left out", len(files) - len(diagnostic))
    rows, missing = [], []
    for file, barcode in sorted(diagnostic, key=lambda pair: pair[0].filename):
        project = _project(file, project_of, sample_sheet)
        if projects and project not in projects:
            continue
        path = _downloaded(file, Path(slides_dir))
        if path is None:
            missing.append(file)
        else:
            rows.append(_tcga_row(file, barcode, project, path))
    if missing and not skip_missing:
        raise CorpusError(
            f"{manifest}: {len(missing)} of {len(missing) + len(rows)} slides are not under "
            f"{slides_dir} in full size, first {missing[0].filename}. Fetch them with gdc-client "
            f"download -m {manifest} -d {slides_dir}, or go without (--skip-missing)."
        )
    if not rows:
        raise CorpusError(
            f"{manifest}: no diagnostic slide (barcode ...-DX1) to use"
            f"{' of ' + ', '.join(projects) if projects else ''}. Choose Experimental Strategy "
            "'Diagnostic Slide' on the GDC portal."
        )
    return rows


def _check_projects(projects: Sequence[str], sample_sheet: str | Path | None) -> None:
    unknown = sorted(set(projects) - set(TCGA_PROJECTS))
    if unknown:
        raise CorpusError(
            f"{', '.join(unknown)}: no TCGA project. Known: {' '.join(TCGA_PROJECTS)}"
        )
    if projects and sample_sheet is None:
        raise CorpusError(
            "Projects cannot be told from barcodes alone. Give the GDC sample sheet "
            "(--sample-sheet), or leave --projects out."
        )


def _project(file: GdcFile, projects: dict[str, str] | None, sheet: str | Path | None) -> str:
    if projects is None:
        return ""
    if file.filename not in projects:
        raise CorpusError(
            f"{file.filename} is in the manifest but not in {sheet}. Download both from one cart."
        )
    return projects[file.filename]


def _downloaded(file: GdcFile, folder: Path) -> Path | None:
    """The slide on disk; None if absent or cut short."""
    for path in (folder / file.file_id / file.filename, folder / file.filename):
        if path.is_file() and path.stat().st_size == file.size:
            return path
    return None


def _tcga_row(file: GdcFile, barcode: Barcode, project: str, path: Path) -> SlideRow:
    return SlideRow(
        path=path,
        slide_id=Path(file.filename).stem,
        patient_id=barcode.patient_id,
        cancer_type=project.removeprefix("TCGA-"),
        source=f"GDC {file.file_id}",
        extra={
            "sample_type": SAMPLE_TYPES.get(barcode.sample_type, barcode.sample_type),
            "gdc_id": file.file_id,
        },
    )


def _read_tsv(path: Path, columns: tuple[str, ...], what: str) -> list[tuple[int, dict[str, str]]]:
    with open_table(path, remedy="Download it again.", delimiter="\t") as reader:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise CorpusError(
                f"{path}: no column {', '.join(missing)}. It should be a {what}, tab separated."
            )
        lines = []
        for line in reader:
            if any(line[name] is None for name in columns):
                raise CorpusError(f"{path}, line {reader.line_num}: cut short. Download it again.")
            lines.append((reader.line_num, {name: line[name].strip() for name in columns}))
    return lines

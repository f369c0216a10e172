"""The TCGA preset: manifest, sample sheet, barcodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from xmag_hf.data_builders import CorpusError
from xmag_hf.data_builders.tcga import Barcode, parse_barcode, tcga_slides

BREAST = "TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAFE-4EB6-9C26-2B4C9F1A3F10.svs"
LUNG = "TCGA-05-4244-01Z-00-DX2.d4ff32cd-38cf-40ea-8213-45c2b100ac01.svs"
FROZEN = "TCGA-A1-A0SB-01A-01-TS1.8552c075-9be1-4a8b-9f1e-4f9f4b2b8c3e.svs"
SHEET_HEAD = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\n"


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """A GDC download: a folder a file, and manifest and sheet in the GDC's columns."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    for number, name in enumerate((LUNG, FROZEN, BREAST)):
        path = tmp_path / "slides" / f"uuid-{number}" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * (10 + number))
        lines.append(f"uuid-{number}\t{name}\tmd5\t{10 + number}\treleased")
    (tmp_path / "manifest.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "sheet.tsv").write_text(
        SHEET_HEAD
        + f"uuid-0\t{LUNG}\tBiospecimen\tSlide Image\tTCGA-LUAD\tTCGA-05-4244\tTCGA-05-4244-01Z\n"
        + f"uuid-2\t{BREAST}\tBiospecimen\tSlide Image\tTCGA-BRCA, TCGA-BRCA\t"
        "TCGA-A1-A0SB, TCGA-A1-A0SB\tTCGA-A1-A0SB-01Z\n"
    )
    return tmp_path


def test_barcode():
    assert parse_barcode(BREAST) == Barcode("TCGA-A1-A0SB", "01", "DX")
    assert parse_barcode(FROZEN).slide_kind == "TS"
    for wrong in ("CMU-1.svs", "TCGA-A1-A0SB.svs", "TCGA-A1-A0SB-01Z-00.svs", ""):
        with pytest.raises(CorpusError, match="barcode"):
            parse_barcode(wrong)


def test_one_command_worth_of_rows(download):
    manifest, slides, sheet = (download / n for n in ("manifest.txt", "slides", "sheet.tsv"))
    lung, breast = tcga_slides(manifest, slides, sample_sheet=sheet)
    assert (lung.slide_id, lung.patient_id, lung.cancer_type) == (
        LUNG.removesuffix(".svs"),
        "TCGA-05-4244",
        "LUAD",
    )
    assert (breast.patient_id, breast.cancer_type) == ("TCGA-A1-A0SB", "BRCA")
    assert breast.path == slides / "uuid-2" / BREAST
    assert breast.extra == {"sample_type": "primary solid tumor", "gdc_id": "uuid-2"}
    (only,) = tcga_slides(manifest, slides, sample_sheet=sheet, projects=["TCGA-BRCA"])
    assert only == breast
    assert {row.cancer_type for row in tcga_slides(manifest, slides)} == {""}


def test_what_is_missing_is_said(download):
    manifest, slides, sheet = (download / n for n in ("manifest.txt", "slides", "sheet.tsv"))
    with pytest.raises(CorpusError, match="TCGA-XXXX"):
        tcga_slides(manifest, slides, sample_sheet=sheet, projects=["TCGA-XXXX"])
    with pytest.raises(CorpusError, match="sample-sheet"):
        tcga_slides(manifest, slides, projects=["TCGA-BRCA"])
    with pytest.raises(CorpusError, match="no diagnostic slide"):
        tcga_slides(manifest, slides, sample_sheet=sheet, projects=["TCGA-OV"])
    (slides / "uuid-2" / BREAST).write_bytes(b"cut")  # a download cut short
    with pytest.raises(CorpusError, match="1 of 2 slides.*A0SB.*gdc-client"):
        tcga_slides(manifest, slides, sample_sheet=sheet)
    assert len(tcga_slides(manifest, slides, sample_sheet=sheet, skip_missing=True)) == 1
    with pytest.raises(CorpusError, match="no column id, filename"):
        tcga_slides(sheet, slides)
    text = sheet.read_text().replace("Slide Image", "Schnittbild von Müller")
    sheet.write_bytes(text.encode("cp1252"))
    with pytest.raises(CorpusError, match="sheet.tsv.*not UTF-8.*Download it again"):
        tcga_slides(manifest, slides, sample_sheet=sheet)
    sheet.write_text(SHEET_HEAD + "x" * 200_000)
    with pytest.raises(CorpusError, match="sheet.tsv, line 2.*field larger than"):
        tcga_slides(manifest, slides, sample_sheet=sheet)
    sheet.write_text(SHEET_HEAD)
    with pytest.raises(CorpusError, match="not in"):
        tcga_slides(manifest, slides, sample_sheet=sheet)
    sheet.write_text(SHEET_HEAD + f"uuid-0\t{LUNG}\tb\ts\tTCGA-LUAD\tTCGA-99-9999\tx\n")
    with pytest.raises(CorpusError, match="line 2.*TCGA-99-9999"):
        tcga_slides(manifest, slides, sample_sheet=sheet)

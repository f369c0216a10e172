"""Presets: the paper's numbers hold together; label files of the sources become label CSVs."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from xmag_hf.data_builders import CorpusError
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.options import StudyOptions
from xmag_hf.mil.preset_labels import preset_labels, with_preset, write_preset_labels
from xmag_hf.mil.presets import PRESETS, load_preset

# Diagnostic slides as the GDC names them.
LUAD = "TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf-40ea-8213-45c2b100ac01.svs"
LUSC = "TCGA-21-1070-01Z-00-DX1.06363f8a-ef29-4d73-95da-a3172d7873c0.svs"
KICH = "TCGA-KL-8323-01Z-00-DX1.01d72f6a-cc87-4082-8af4-738250ec4d9c.svs"
HIGH = "TCGA-GM-A2DM-01Z-00-DX1.652038F4-C370-40EB-A545-51062783C74C.svs"
LOW = "TCGA-E9-A3QA-01Z-00-DX1.9D664AF3-9ABD-4EED-B826-4C4FBFC33F3E.svs"
FROZEN = "TCGA-A1-A0SB-01A-01-TS1.8552c075-9be1-4a8b-9f1e-4f9f4b2b8c3e.svs"


def sheet(path: Path, *slides: tuple[str, str]) -> Path:
    """A GDC sample sheet of file names and projects."""
    lines = ["File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID"]
    lines += [
        f"uuid\t{name}\tBiospecimen\tSlide Image\t{project}\t{name[:12]}\t{name[:16]}"
        for name, project in slides
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_papers_numbers_hold_together() -> None:
    """Counts add up, every preset has the three models, and one cohort to train on."""
    assert set(PRESETS) == {"nsclc", "rcc", "panda-isup", "brca-odx"}
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert [cohort.role for cohort in preset.cohorts].count("train") == 1
        assert {"Phikon", "UNI2", "XMAG"} <= {row.model for row in preset.paper}
        assert set(preset.label_map.values()) <= set(preset.classes)
        for cohort in preset.cohorts:
            if cohort.class_slides:
                assert sum(cohort.class_slides.values()) == cohort.slides
                assert set(cohort.class_slides) == set(preset.classes)
    # Mean AUC of the four tasks as tables S1 to S4 have it: 0.903, 0.905, 0.911.
    for model, mean in (("XMAG", 0.903), ("Phikon", 0.905), ("UNI2", 0.911)):
        rows = [row for preset in PRESETS.values() for row in preset.paper if row.model == model]
        assert len(rows) == 4 and sum(row.auc[0] for row in rows) / 4 == pytest.approx(
            mean, abs=7e-4
        )
    assert [c.available for c in load_preset("brca-odx").cohorts] == [True, False]


def test_tcga_projects_become_classes(tmp_path: Path) -> None:
    path = sheet(
        tmp_path / "sheet.tsv",
        (LUSC, "TCGA-LUSC"), (LUAD, "TCGA-LUAD"), (KICH, "TCGA-KICH"),
        (FROZEN, "TCGA-LUAD"),
    )  # fmt: skip
    rows = preset_labels("nsclc", [path])
    assert [(row.slide_id, row.patient_id, row.label, row.cohort) for row in rows] == [
        (LUAD.removesuffix(".svs"), "TCGA-05-4244", "LUAD", "tcga"),
        (LUSC.removesuffix(".svs"), "TCGA-21-1070", "LUSC", "tcga"),
    ]
    (kidney,) = preset_labels("rcc", [path])
    assert (kidney.patient_id, kidney.label) == ("TCGA-KL-8323", "ChRCC")


def test_cptac_tables(tmp_path: Path) -> None:
    """Real case ids; the tumour as a column, or in the file's name; normal tissue left out."""
    whole = tmp_path / "cohort.csv"
    whole.write_text(
        "Tumor,Case_ID,Slide_ID,Specimen_Type\n"
        "LUAD,C3L-00001,C3L-00001-21,tumor_tissue\n"
        "LUAD,C3L-00001,C3L-00001-26,normal_tissue\n"
        "LSCC,C3N-00211,C3N-00211-21,tumor_tissue\n"
        "CCRCC,C3L-00004,C3L-00004-21,tumor_tissue\n"
    )
    rows = preset_labels("nsclc", [whole])
    assert [(row.slide_id, row.patient_id, row.label, row.cohort) for row in rows] == [
        ("C3L-00001-21", "C3L-00001", "LUAD", "cptac"),
        ("C3N-00211-21", "C3N-00211", "LUSC", "cptac"),
    ]
    named = tmp_path / "TCIA_CPTAC_LSCC_Pathology_Data_Table.csv"
    named.write_text("Case_ID,Slide_ID,Specimen_Type\nC3N-00211,C3N-00211-22,tumor_tissue\n")
    assert preset_labels("nsclc", [named])[0].label == "LUSC"
    unnamed = tmp_path / "table.csv"
    unnamed.write_text(named.read_text())
    with pytest.raises(MILError, match="whose slides are these"):
        preset_labels("nsclc", [unnamed])
    silent = tmp_path / "TCIA_CPTAC_LUAD.csv"
    silent.write_text("Case_ID,Slide_ID\nC3L-00001,C3L-00001-26\n")
    with pytest.raises(MILError, match="normal tissue would pass for tumour"):
        preset_labels("nsclc", [silent])
    named.write_text("Case_ID,Slide_ID\nC3N-00999,C3N-00211-22\n")
    with pytest.raises(MILError, match="line 2: slide C3N-00211-22 has case 'C3N-00999'"):
        preset_labels("nsclc", [named])


@pytest.mark.parametrize("tissue", ["", "NA", "n/a"])
def test_cptac_slides_of_unknown_tissue_are_no_tumours(tissue: str, tmp_path: Path, caplog) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(
        "Tumor,Case_ID,Slide_ID,Specimen_Type\n"
        "LUAD,C3L-00001,C3L-00001-21,tumor_tissue\n"
        f"LUAD,C3L-00001,C3L-00001-26,{tissue}\n"
        f"LSCC,C3N-00211,C3N-00211-21,{tissue}\n"
    )
    caplog.set_level("INFO", "xmag_hf")
    assert [row.slide_id for row in preset_labels("nsclc", [table])] == ["C3L-00001-21"]
    for tumour in ("LUAD", "LSCC"):
        assert f"1 slides of '{tumour}, tissue unknown' left out" in caplog.text


def test_a_heading_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("image_id,isup_grade,isup_grade\nabc,1,2\n")
    with pytest.raises(MILError, match=r"train\.csv: column isup_grade stands there twice"):
        preset_labels("panda-isup", [path])
    path.write_text("image_id,isup_grade,note,note,\nabc,1,x,y,\n")
    assert preset_labels("panda-isup", [path])[0].label == "ISUP-1"


def test_the_external_cohort_is_called_as_one_says(tmp_path: Path) -> None:
    gdc = sheet(tmp_path / "sheet.tsv", (LUAD, "TCGA-LUAD"))
    cptac = tmp_path / "luad.csv"
    cptac.write_text("Case_ID,Slide_ID,Specimen_Type\nC3L-00001,C3L-00001-21,tumor_tissue\n")
    given = StudyOptions(
        out=str(tmp_path / "o"), preset="nsclc", preset_files=(str(gdc), str(cptac)),
        external_bags=("b",),
    )  # fmt: skip
    assert with_preset(given).external_name == "cptac"
    assert with_preset(replace(given, external_name="lung-2")).external_name == "lung-2"


def test_panda(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(
        "image_id,data_provider,isup_grade,gleason_score\n"
        "0005f7aaab2800f6170c399693a96917,karolinska,0,0+0\n"
        "0018ae58b01bdadc8e347995b69f99aa,radboud,4,4+4\n"
    )
    rows = preset_labels("panda-isup", [path])
    assert [(row.slide_id[:4], row.label) for row in rows] == [
        ("0005", "ISUP-0"),
        ("0018", "ISUP-4"),
    ]
    assert rows[0].patient_id == rows[0].slide_id  # PANDA names no patients
    path.write_text("image_id,isup_grade\nabc,6\n")
    with pytest.raises(MILError, match="line 2: isup_grade '6'"):
        preset_labels("panda-isup", [path])


def test_dhmc_leaves_out_what_tcga_has_no_class_for(tmp_path: Path, caplog) -> None:
    path = tmp_path / "MetaData.csv"
    path.write_text(
        "File Name,Diagnosis,Split\nDHMC_0001.png,Oncocytoma,Train\n"
        "DHMC_0006.png,Chromophobe,Test\nDHMC_0011.png,Clearcell,Train\n"
        "DHMC_0020.png,Papillary,Train\nDHMC_0030.png,Benign,Test\n"
    )
    caplog.set_level("INFO", "xmag_hf")
    rows = preset_labels("rcc", [path])
    assert [(row.slide_id, row.label) for row in rows] == [
        ("DHMC_0006", "ChRCC"), ("DHMC_0011", "CCRCC"), ("DHMC_0020", "PRCC"),
    ]  # fmt: skip
    assert "1 slides of 'Oncocytoma' left out" in caplog.text


def test_scores_of_patients_become_labels_of_slides(tmp_path: Path) -> None:
    slides = sheet(tmp_path / "sheet.tsv", (HIGH, "TCGA-BRCA"), (LOW, "TCGA-BRCA"),
                   (LUAD, "TCGA-LUAD"))  # fmt: skip
    scores = tmp_path / "scores.csv"
    scores.write_text(
        "patient_id,recurrence_score\nTCGA-GM-A2DM,25.01\nTCGA-E9-A3QA,25\nTCGA-05-4244,80\n"
        "TCGA-A1-A0SB,NA\n"
    )
    rows = preset_labels("brca-odx", [scores, slides])
    assert {row.patient_id: row.label for row in rows} == {
        "TCGA-GM-A2DM": "high",
        "TCGA-E9-A3QA": "low",  # 25 is not above 25
    }
    with pytest.raises(MILError, match="Give the GDC sample sheet of TCGA-BRCA too"):
        preset_labels("brca-odx", [scores])
    for value in ("-0.7", "high", "250"):  # a z-score has no cut at 25
        scores.write_text(f"patient_id,recurrence_score\nTCGA-GM-A2DM,{value}\n")
        with pytest.raises(MILError, match=f"line 2: score '{value}'"):
            preset_labels("brca-odx", [scores, slides])
    scores.write_text("patient_id,recurrence_score\nTCGA-GM-A2DM,30\nTCGA-GM-A2DM-01,20\n")
    with pytest.raises(MILError, match="has two scores"):
        preset_labels("brca-odx", [scores, slides])


def test_label_csvs_are_written_by_cohort(tmp_path: Path) -> None:
    gdc = sheet(tmp_path / "sheet.tsv", (LUAD, "TCGA-LUAD"))
    cptac = tmp_path / "luad.csv"
    cptac.write_text("Case_ID,Slide_ID,Specimen_Type\nC3L-00001,C3L-00001-21.svs,tumor_tissue\n")
    written = write_preset_labels("nsclc", [cptac, gdc], tmp_path / "labels")
    assert {cohort: path.name for cohort, path in written.items()} == {
        "tcga": "nsclc-tcga.csv",
        "cptac": "nsclc-cptac.csv",
    }
    with written["cptac"].open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {"slide_id": "C3L-00001-21", "patient_id": "C3L-00001", "label": "LUAD"}
        ]


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    gdc = sheet(tmp_path / "sheet.tsv", (KICH, "TCGA-KICH"))
    with pytest.raises(MILError, match="no slide with one of its classes.*portal.gdc.cancer.gov"):
        preset_labels("nsclc", [gdc])
    panda = tmp_path / "train.csv"
    panda.write_text("image_id,isup_grade\nabc,1\n")
    with pytest.raises(MILError, match="kind 'panda', and preset nsclc takes gdc, cptac"):
        preset_labels("nsclc", [panda])
    other = tmp_path / "other.csv"
    other.write_text("slide,class\na,b\n")
    with pytest.raises(MILError, match="columns slide, class; known label files"):
        preset_labels("nsclc", [other])
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(MILError, match="columns none"):
        preset_labels("nsclc", [tmp_path / "empty.csv"])
    with pytest.raises(MILError, match="preset 'lung': none of nsclc, rcc"):
        preset_labels("lung", [gdc])
    again = sheet(tmp_path / "again.tsv", (KICH, "TCGA-KIRP"))
    with pytest.raises(MILError, match="is PRCC here and ChRCC before"):
        preset_labels("rcc", [gdc, again])
    torn = tmp_path / "torn.csv"
    torn.write_text("Case_ID,Slide_ID,Tumor\nC3L-00001\n")
    with pytest.raises(MILError, match="line 2: cut short"):
        preset_labels("nsclc", [torn])
    text = gdc.read_text().replace(f"\t{KICH[:12]}\t", "\tTCGA-99-9999\t")
    gdc.write_text(text)
    with pytest.raises(CorpusError, match="TCGA-99-9999"):
        preset_labels("rcc", [gdc])

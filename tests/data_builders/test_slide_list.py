"""Paths, globs, folders and the slide CSV."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_slide import write_dicom
from pydicom.uid import generate_uid

from xmag_hf.data_builders import CorpusError, SlideRow, find_slides, read_slides_csv
from xmag_hf.data_builders.slide_list import with_csv_metadata
from xmag_hf.slides import open_slide


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/one.svs", "a/two.TIFF", "three.ndpi", "a/notes.txt", "b/.hidden.svs"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_patterns(folder, monkeypatch):
    names = [slide.path.relative_to(folder).as_posix() for slide in find_slides([folder])]
    assert names == ["a/two.TIFF", "b/one.svs", "three.ndpi"]
    monkeypatch.chdir(folder)
    found = find_slides(["three.ndpi", "**/*.svs", "a/notes.txt", "b"])
    assert [str(slide.path) for slide in found] == ["three.ndpi", "b/one.svs", "a/notes.txt"]
    for nothing in ("*.scn", "absent.svs"):
        with pytest.raises(CorpusError, match="no such file or folder"):
            find_slides([nothing])
    (folder / "empty").mkdir()
    with pytest.raises(CorpusError, match="empty: no slide in this folder"):
        find_slides(["empty"])


def test_links_to_folders_are_followed_once(folder, tmp_path_factory):
    """To a folder elsewhere, to one that is seen anyway, and back up (a circle)."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "four.svs").touch()
    (elsewhere / "back").symlink_to(folder)
    (folder / "a" / "linked").symlink_to(elsewhere)
    (folder / "a" / "again").symlink_to(folder / "b")
    (folder / "b" / "up").symlink_to(folder)
    names = [slide.path.relative_to(folder).as_posix() for slide in find_slides([folder])]
    assert names == ["a/linked/four.svs", "a/two.TIFF", "b/one.svs", "three.ndpi"]
    csv = folder / "slides.csv"
    csv.write_text("slide_id\nfour\n")
    (row,) = read_slides_csv(csv, folder)
    assert row.path == folder / "a" / "linked" / "four.svs"


def test_csv_by_path_and_by_stem(folder):
    csv = folder / "slides.csv"
    csv.write_text(
        "\ufeffslide,patient_id,cancer_type,mpp,scanner\n"
        "b/one.svs,p1,BRCA,0.25,Leica\n\na/two.TIFF,,,,\n",
        encoding="utf-8",
    )
    first, second = read_slides_csv(csv)
    assert first == SlideRow(
        folder / "b/one.svs", "one", "p1", "BRCA", 0.25, "one.svs", {"scanner": "Leica"}
    )
    assert (second.slide_id, second.patient_id, second.mpp) == ("two", "two", None)
    csv.write_text("slide_id,cancer_type\none,LUAD\n")
    (row,) = read_slides_csv(csv, folder)
    assert (row.path, row.cancer_type) == (folder / "b/one.svs", "LUAD")
    rows = with_csv_metadata([SlideRow(folder / "three.ndpi"), SlideRow(folder / "b/one.svs")], csv)
    assert [row.cancer_type for row in rows] == ["", "LUAD"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name\nx\n", "slide"),
        ("", "none"),
        ("slide_id\nabsent\n", "line 2.*no file"),
        ("slide_id\ntwin\n", "2 files"),
        ("slide,mpp\none.svs,0.25 um\n", "line 2.*0.25 um"),
        ("slide,mpp\n,0.5\n", "line 2.*empty"),
        ("slide,patient_id\na.svs,Smith, John\n", "line 2.*fields"),
    ],
)
def test_csv_mistakes_name_the_line(folder, text, said):
    for place in ("a", "b"):
        (folder / place / "twin.svs").touch()
    csv = folder / "slides.csv"
    csv.write_text(text)
    with pytest.raises(CorpusError, match=said) as caught:
        read_slides_csv(csv, folder)
    assert "slides.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("slide_id,patient_id\none,Müller\n".encode("cp1252"), "not UTF-8.*CSV UTF-8"),  # Excel's
        ("slide_id,patient_id\none,Müller\n".encode("utf-16"), "not UTF-8.*CSV UTF-8"),
        (b"slide_id\n" + b"x" * 200_000, "line 2.*field larger than"),
    ],
)
def test_what_is_no_csv_is_named(folder, content: bytes, said: str) -> None:
    csv = folder / "slides.csv"
    csv.write_bytes(content)
    for read in (lambda: read_slides_csv(csv, folder),
                 lambda: with_csv_metadata([SlideRow(folder / "b/one.svs")], csv)):  # fmt: skip
        with pytest.raises(CorpusError, match=f"slides.csv.*{said}"):
            read()


def test_a_csv_for_other_slides_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text("slide_id,cancer_type\nother,LUAD\n")
    with pytest.raises(CorpusError, match="no line is for any of the 1 slides"):
        with_csv_metadata([SlideRow(tmp_path / "mine.svs")], tmp_path / "slides.csv")


def test_slides_without_a_line_are_named(tmp_path: Path, caplog) -> None:
    """P1_B is misspelt: unsaid, it would be a patient of its own on the other side of a split."""
    slides = [SlideRow(tmp_path / f"{name}.svs") for name in ("P1_A", "P1_B", "P2_A")]
    csv = tmp_path / "slides.csv"
    csv.write_text("slide_id,patient_id\nP1_A,P1\nP1-B,P1\nP2_A,P2\n")
    rows = with_csv_metadata(slides, csv)
    assert [row.patient_id for row in rows] == ["P1", "P1_B", "P2"]
    (said,) = caplog.messages
    assert str(csv) in said and "no line for 1 of 3 slides (P1_B)" in said
    assert "1 lines are for no slide here (P1-B)" in said
    caplog.clear()
    with_csv_metadata([slides[0], slides[2]], csv)  # a glob that takes some of the slides
    assert not caplog.messages
    many = [SlideRow(tmp_path / f"s{number}.svs") for number in range(7)]
    with_csv_metadata([slides[0], *many], csv)
    assert "no line for 7 of 8 slides (s0, s1, s2, s3, s4, ...)" in caplog.text
    assert "2 lines are for no slide here (P1-B, P2_A)" in caplog.text


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of three files in `case`; in `flat` two slides of two, one of one, and a TIFF."""
    root = tmp_path_factory.mktemp("dicoms")
    rng = np.random.default_rng(0)
    full = rng.integers(0, 255, (512, 512, 3), dtype=np.uint8)
    derived = ("DERIVED", "VOLUME", "RESAMPLED")
    for folder, prefix in (("case", ""), ("flat", "a-"), ("flat", "b-")):
        (root / folder).mkdir(exist_ok=True)
        uid, start = generate_uid(), root / folder / prefix
        # The full level is not the first by name.
        write_dicom(Path(f"{start}2.dcm") if prefix else start / "2.dcm", full, 0.5, series=uid)
        small = Path(f"{start}1.dcm") if prefix else start / "1.dcm"
        write_dicom(small, full[::2, ::2], 1.0, series=uid, kind=derived)
        if not prefix:
            label = ("ORIGINAL", "LABEL", "NONE")
            write_dicom(start / "0.dcm", full[:90, :90], None, series=uid, kind=label)
    write_dicom(root / "flat" / "lone.dcm", full, 0.5)
    (root / "flat" / "broken.dcm").write_bytes(b"no DICOM")
    (root / "flat" / "other.tif").touch()
    return root


@pytest.mark.parametrize("reader", ["pydicom", "openslide"])
def test_a_dicom_series_is_one_slide(dicoms, monkeypatch, reader):
    """Whatever is named of it: its folder, some of its files, or one that is not level 0."""
    if reader == "openslide":
        monkeypatch.setitem(sys.modules, "pydicom.filereader", None)
    case = SlideRow(dicoms / "case" / "2.dcm", "case")
    assert find_slides([dicoms / "case"]) == [case]
    assert find_slides([dicoms / "case" / "1.dcm"]) == [case]
    assert find_slides([str(dicoms / "case" / "[01].dcm"), dicoms / "case"]) == [case]
    with open_slide(case.path) as slide:  # OpenSlide finds the other files
        assert slide.level_mpps == (0.5, 1.0)
    monkeypatch.chdir(dicoms / "case")
    assert find_slides(["."]) == [SlideRow(Path("2.dcm"), "case")]
    flat = [(slide.path.name, slide.slide_id) for slide in find_slides([dicoms / "flat"])]
    named = {"a-2.dcm", "b-2.dcm", "broken.dcm", "lone.dcm", "other.tif"}
    assert {name for name, _ in flat} == named and len(flat) == len(named)
    assert all(Path(name).stem == slide_id for name, slide_id in flat)


def test_folders_of_one_name_name_no_slide(tmp_path):
    for patient in ("patient1", "patient2"):
        (tmp_path / patient / "WSI").mkdir(parents=True)
        uid = generate_uid()
        for name, side in (("1", 300), ("2", 600)):
            pixels = np.full((side, side, 3), 200, np.uint8)
            file = tmp_path / patient / "WSI" / f"{patient}-{name}.dcm"
            write_dicom(file, pixels, 300 / side, series=uid)
    assert {row.slide_id for row in find_slides([tmp_path])} == {"patient1-2", "patient2-2"}
    assert [row.slide_id for row in find_slides([tmp_path / "patient1"])] == ["WSI"]


@pytest.mark.parametrize("reader", ["pydicom", "openslide"])
def test_a_dicom_file_that_is_no_slide_does_not_rename_the_one_beside_it(
    dicoms, tmp_path, monkeypatch, reader
):
    """An annotation: another series, and no whole slide image."""
    folder = tmp_path / "case"
    shutil.copytree(dicoms / "case", folder)
    note = pydicom.dcmread(folder / "1.dcm")
    note.SOPClassUID = note.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.91.1"
    note.SeriesInstanceUID = generate_uid()
    note.save_as(folder / "note.dcm")
    if reader == "openslide":
        monkeypatch.setitem(sys.modules, "pydicom.filereader", None)
    named = [(row.path.name, row.slide_id) for row in find_slides([folder])]
    assert sorted(named) == [("2.dcm", "case"), ("note.dcm", "note")]


def test_a_csv_names_a_dicom_series(dicoms, tmp_path):
    """By folder or by file, and its own slide_id goes before both."""
    csv = tmp_path / "slides.csv"
    csv.write_text("slide_id,cancer_type\ncase,BRCA\na-2,LUAD\n")
    by_name = {row.slide_id: row for row in read_slides_csv(csv, dicoms)}
    assert by_name["case"].path == dicoms / "case" / "2.dcm"
    assert by_name["a-2"].path == dicoms / "flat" / "a-2.dcm"
    rows = {row.slide_id: row for row in with_csv_metadata(find_slides([dicoms]), csv)}
    assert (rows["case"].cancer_type, rows["a-2"].cancer_type) == ("BRCA", "LUAD")
    csv.write_text(f"slide,slide_id\n{dicoms}/case/1.dcm,\n{dicoms}/flat/a-1.dcm,mine\n")
    assert [(row.path.name, row.slide_id) for row in read_slides_csv(csv)] == [
        ("2.dcm", "case"),
        ("a-2.dcm", "mine"),
    ]
    csv.write_text(f"slide\n{dicoms}/none/1.dcm\n")  # told when it is opened
    assert read_slides_csv(csv)[0].slide_id == "1"


def test_folders_without_dicom_are_not_looked_into(folder, monkeypatch):
    monkeypatch.setattr("xmag_hf.data_builders.slide_list.series_uid", pytest.fail)
    assert len(find_slides([folder])) == 3

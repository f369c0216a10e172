"""Paths, globs, folders and the slide CSV."""

from __future__ import annotations

from pathlib import Path

import pytest

from xmag_hf.data_builders import CorpusError, SlideRow, find_slides, read_slides_csv
from xmag_hf.data_builders.slide_list import with_csv_metadata


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/one.svs", "a/two.TIFF", "three.ndpi", "a/notes.txt", "b/.hidden.svs"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_patterns(folder, monkeypatch):
    names = [path.relative_to(folder).as_posix() for path in find_slides([folder])]
    assert names == ["a/two.TIFF", "b/one.svs", "three.ndpi"]
    monkeypatch.chdir(folder)
    found = find_slides(["three.ndpi", "**/*.svs", "a/notes.txt", "b"])
    assert [str(p) for p in found] == ["three.ndpi", "b/one.svs", "a/notes.txt"]
    for nothing in ("*.scn", "absent.svs"):
        with pytest.raises(CorpusError, match="no such file or folder"):
            find_slides([nothing])


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
    rows = with_csv_metadata([folder / "three.ndpi", folder / "b/one.svs"], csv)
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


def test_a_csv_for_other_slides_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text("slide_id,cancer_type\nother,LUAD\n")
    with pytest.raises(CorpusError, match="no line is for any of the 1 slides"):
        with_csv_metadata([tmp_path / "mine.svs"], tmp_path / "slides.csv")

"""What a study refuses before it reads a bag, what it warns of, and what its ROC picture counts."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from xmag_hf.embedding import EmbedError
from xmag_hf.mil import HeadOptions, MILError, StudyOptions, run_study
from xmag_hf.mil.e2e_options import E2EOptions
from xmag_hf.mil.end_to_end import _folds
from xmag_hf.mil.folds import warn_rare
from xmag_hf.mil.labels import Cohort, LabelRow, class_names, join
from xmag_hf.mil.pictures import draw_roc
from xmag_hf.mil.predictions import CohortPredictions, FoldPredictions

HEADER = "slide_id,patient_id,label\n"


def labels_of(path: Path, classes: str) -> Path:
    """A slide for each letter, which is its class; each of its own patient."""
    lines = [f"s{number},p{number},{name}\n" for number, name in enumerate(classes)]
    path.write_text(HEADER + "".join(lines))
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"external_bags": ("none",)}, "none: no folder of bags"),
        ({"external_bags": ("bags", "bags")}, "2 folders for 1 of BAGS"),
        ({"folds_csv": "labels.csv"}, "no column fold"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"external_labels": "ragged.csv"}, "not as many fields"),
        ({"external_labels": "nope.csv"}, "nope.csv: no such CSV file"),
    ],
)
def test_refused_before_a_bag_is_read(tmp_path, monkeypatch, more, words) -> None:
    """A bag that cannot be read would only be left out, and told to `advance`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bags").mkdir()
    for number in range(4):
        (tmp_path / "bags" / f"s{number}.h5").write_bytes(b"no bag")
    labels_of(tmp_path / "labels.csv", "abab")
    (tmp_path / "ragged.csv").write_text(HEADER + "s1,p1\n")
    given = {"external_labels": "labels.csv", "external_bags": ("bags",), **more}
    options = StudyOptions(labels="labels.csv", out="study", **given)
    with pytest.raises((MILError, EmbedError), match=words):
        run_study([Path("bags")], options, HeadOptions(), pytest.fail)
    assert {path.name for path in tmp_path.iterdir()} == {"bags", "labels.csv", "ragged.csv"}


@pytest.mark.parametrize("name", ["CPTAC/LUAD", "..", "a\nb", "a:b"])
def test_a_cohorts_name_must_do_for_files(name) -> None:
    """It is part of pictures' names, which are drawn when all heads are trained."""
    with pytest.raises(MILError, match="files are named after it"):
        StudyOptions(labels="l", out="o", external_name=name)


def test_a_study_called_abmil_is_not_what_head_abmil_means(tmp_path, monkeypatch) -> None:
    cohort = cohort_of("abababab", [f"p{n}" for n in range(8)])
    monkeypatch.chdir(tmp_path)
    Path("abmil").mkdir()
    Path("abmil/folds.csv").write_text("slide_id,patient_id,label,fold\ns0,p0,a,0\ns1,p1,b,1\n")
    kept, folds = _folds(cohort, E2EOptions(encoder="e", labels="l", out="o", folds=2))
    assert len(kept) == 8 and sorted(folds.tolist()) == [0] * 4 + [1] * 4


def test_measurements_are_no_classes() -> None:
    ages = [LabelRow(f"s{n}", f"p{n}", f"{40 + n / 3:.2f}") for n in range(20)]
    with pytest.raises(MILError, match="20 values .* in 20 slides are measurements"):
        class_names(ages)
    grades = [LabelRow(f"s{n}", f"p{n}", ("0.5", "1.0", "nan")[n % 3]) for n in range(20)]
    assert class_names(grades) == ("0.5", "1.0", "nan")


def test_a_slide_id_with_the_files_ending_is_explained(tmp_path) -> None:
    """The bags are called SLIDE_ID.h5, whatever the slides' files were."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.h5").write_bytes(b"no bag")
    rows = [LabelRow(f"{name}.svs", name, name) for name in "ab"]
    with pytest.raises(MILError, match=r"a\.h5 is there: call it a in the CSV"):
        join("internal", rows, [tmp_path], ("a", "b"))
    both = [*rows, LabelRow("a", "a", "a")]  # a.svs is another slide than a
    with pytest.raises(MILError) as caught:
        join("internal", both, [tmp_path], ("a", "b"))
    assert "call it a " not in str(caught.value) and "call it b " in str(caught.value)


def cohort_of(classes: str, patients: list[str]) -> Cohort:
    names = tuple(sorted(set(classes)))
    return Cohort(
        name="internal",
        slide_ids=np.array([f"s{number}" for number in range(len(classes))]),
        patient_ids=np.array(patients),
        labels=np.array([names.index(name) for name in classes]),
        classes=names,
        bags=(),
        exclusions=(),
    )


def test_classes_with_fewer_patients_than_folds_are_told_once(caplog) -> None:
    """Patients count, not slides: class b has four slides of two patients."""
    patients = ["p0", "p1", "p2", "p3", "p4", "p4", "p5", "p5", "p6"]
    cohort = cohort_of("aaaabbbbc", patients)
    with caplog.at_level(logging.WARNING):
        warn_rare(cohort, 4)
    (record,) = caplog.records
    told = record.getMessage()
    assert "class 'b' has 2 patients, class 'c' has 1 patient for 4 folds" in told
    assert "'a'" not in told
    caplog.clear()
    warn_rare(cohort_of("aabb", ["p0", "p1", "p2", "p3"]), 2)
    assert not caplog.records


def test_roc_says_how_many_slides_are_of_the_class(tmp_path, monkeypatch) -> None:
    labels = np.array([1, 0, 0, 0, 1, 0])
    scores = np.linspace(0.1, 0.9, 6)
    probabilities = np.column_stack([1 - scores, scores])
    folds = (FoldPredictions("0", np.arange(6), probabilities),)
    cohort = CohortPredictions(np.arange(6).astype(str), None, labels, probabilities, folds)
    drawn: list[Figure] = []
    monkeypatch.setattr("xmag_hf.mil.pictures.save_picture", lambda figure, _: drawn.append(figure))
    draw_roc({"internal": cohort}, ("benign", "malignant"), tmp_path / "roc.png", title="t")
    (axis,) = drawn[0].axes
    assert axis.get_title() == "internal: malignant (2 slides) against the rest (4 slides)"
    legend = axis.get_legend()
    assert legend is not None
    # Of the 8 pairs of a malignant slide (0.1, 0.74) with another, three are in the right order.
    assert [text.get_text() for text in legend.get_texts()] == ["fold 0: 0.375", "all folds: 0.375"]


def test_heads_of_folds_that_have_no_slides_here_are_not_mixed_up(tmp_path) -> None:
    """Without fold 0's slides, folds 1 to 3 would be numbered 0 to 2, and meet the wrong heads."""
    patients = [f"p{n}" for n in range(8)]
    cohort = cohort_of("abababab", patients)
    study = tmp_path / "study"
    study.mkdir()
    lines = [f"s{n},p{n},{'ab'[n % 2]},{n // 2}\n" for n in range(8)]
    (study / "folds.csv").write_text("slide_id,patient_id,label,fold\n" + "".join(lines))
    options = E2EOptions(encoder="e", labels="l", out="o", head=str(study), folds=3)
    some = cohort.rows(np.arange(8) >= 2, "left out")
    with pytest.raises(MILError, match="of its 4 folds only 3 have slides here"):
        _folds(some, options)
    kept, folds = _folds(cohort, dataclasses.replace(options, folds=4))
    assert len(kept) == 8 and folds.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

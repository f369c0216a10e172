"""Predictions as CSV: nothing is lost on the way there and back; damaged files are named."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from xmag_hf.reporting.errors import ReportError
from xmag_hf.reporting.predictions import read_class_predictions, write_class_predictions


def test_predictions_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], (2, 10)).astype(np.float32)
    labels, names = rng.integers(0, 3, 10), ("a", "b:p:c", "d, e")
    path = tmp_path / "row-linear.csv"
    write_class_predictions(path, np.arange(10).astype(str), None, labels, p, names)
    read_labels, read_p, read_names = read_class_predictions(path)
    np.testing.assert_array_equal(read_labels, labels)
    np.testing.assert_array_equal(read_p.astype(np.float32), p)
    assert read_names == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no class predictions"),
        ("id,group,label\n1,,a\n", "no class predictions"),
        ("id,group,y:a,r0:a\n1,,2,3\n", "no class predictions"),
        ("id,group,label,r0:p:a,r0:p:b,r1:p:a\n", "no class predictions"),
        ("id,group,label,r0:p:a,r0:p:b\n", "without rows"),
        ("id,group,label,r0:p:a,r0:p:b\n1,,c,0.5,0.5\n", "damaged row"),
        ("id,group,label,r0:p:a,r0:p:b\n1,,a,0.5\n", "damaged row"),
        ("id,group,label,r0:p:a,r0:p:b\n1,,a,0.5,x\n", "damaged row"),
    ],
)
def test_bad_predictions_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(ReportError, match=words):
        read_class_predictions(path)


def test_another_reader_finds_everything(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels, groups = rng.integers(0, 3, 60), np.repeat([f"g{i}" for i in range(15)], 4)
    probabilities = rng.dirichlet([1, 1, 1], (2, 60)).astype(np.float32)
    ids = np.array([f"im,{i}" for i in range(len(labels))])
    path = tmp_path / "p.csv"
    names = ["fat", 'a "b"', "c, d"]
    write_class_predictions(path, ids, groups, labels, probabilities, names)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ids.tolist()
    assert [row["group"] for row in rows] == groups.tolist()
    assert [row["label"] for row in rows] == [names[label] for label in labels]
    back = [[[float(row[f"r{r}:p:{name}"]) for name in names] for row in rows] for r in range(2)]
    np.testing.assert_array_equal(np.array(back, dtype=np.float32), probabilities)

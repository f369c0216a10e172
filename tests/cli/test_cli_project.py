"""`xmag project` on real tissue, through the program's entry."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xmag_hf.cli.main import main
from xmag_hf.reporting.predictions import write_class_predictions


@pytest.fixture
def tissue(tmp_path: Path, cmu_pixels: np.ndarray) -> Path:
    """Twenty-four real squares in two classes, by the part of the slide."""
    folder = tmp_path / "tissue"
    folder.mkdir()
    lines = []
    for number in range(24):
        y, x = 100 + 1400 * (number % 2), 100 + 80 * number
        Image.fromarray(cmu_pixels[y : y + 224, x : x + 224]).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{('upper', 'lower')[number % 2]}\n")
    (folder / "labels.csv").write_text("file,label\n" + "".join(lines))
    return folder


def test_two_encoders_side_by_side(
    tmp_path: Path, tissue: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(tissue), "--labels-csv", str(tissue / "labels.csv")]
    arguments += ["--data-mpp", "0.5", "--model", "efficientnet-lite0@0.5"]
    arguments += ["efficientnet-lite0@2", "--perplexity", "5", "--per-class", "10"]
    arguments += ["--cache-dir", str(tmp_path / "cache"), "--out", str(out), "--quiet"]
    assert main(["project", *arguments]) == 0
    assert capsys.readouterr().out.split() == [str(out / "tsne.png"), str(out / "tsne.csv")]
    with (out / "tsne.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 20
    assert sum(row["label"] == "upper" for row in rows) == 10
    places = np.array([[float(value) for value in list(row.values())[2:]] for row in rows])
    assert places.shape == (20, 4)
    assert not np.allclose(places[:, :2], places[:, 2:])  # two encoders, two pictures
    with Image.open(out / "tsne.png") as image:
        image.load()
        assert '"per_class": 10' in image.info["Comment"]
        assert str(tmp_path) not in image.info["Comment"]


def test_confusion_needs_no_data(tmp_path: Path) -> None:
    path = tmp_path / "student@2-linear.csv"
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    write_class_predictions(path, np.array(["x", "y"]), None, np.array([0, 1]), p, ("a", "b"))
    assert main(["project", "--predictions", str(path), "--out", str(tmp_path / "o")]) == 0
    with Image.open(tmp_path / "o" / "student@2-linear-confusion.png") as image:
        image.load()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "nothing to draw"),
        (["--data", "x", "--perplexity", "0"], 2, "--perplexity=0"),
        (["--data", "x", "--metric", "l1"], 2, "invalid choice"),
        (["--data", "x"], 1, "--model"),
        (["--predictions", "none.csv"], 1, "cannot be read"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, words: str, capsys) -> None:
    try:
        result = main(["project", *arguments])
    except SystemExit as stop:
        result = stop.code
    assert result == code
    assert words in capsys.readouterr().err

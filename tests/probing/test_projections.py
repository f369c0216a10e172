"""Confusion matrices of several runs in one folder: a picture each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xmag_hf.cli.main import main
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.images import ImageSplit
from xmag_hf.probing.projections import _splits, confusion_pictures
from xmag_hf.reporting.predictions import write_class_predictions


def _predictions(path: Path, right: bool = True) -> Path:
    """Two images, both told right or both wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    p = np.eye(2) if right else 1 - np.eye(2)
    write_class_predictions(path, np.array(["x", "y"]), None, np.array([0, 1]), p, ("a", "b"))
    return path


def test_predictions_named_alike_get_a_picture_each(tmp_path, capsys):
    files = [_predictions(tmp_path / run / "m-linear.csv", run == "a") for run in ("a", "b")]
    out = tmp_path / "figs"
    assert main(["project", "--predictions", *map(str, files), "--out", str(out)]) == 0
    pictures = [out / f"{run}-m-linear-confusion.png" for run in ("a", "b")]
    assert capsys.readouterr().out.split() == [str(path) for path in pictures]
    shown = []
    for picture in pictures:
        with Image.open(picture) as image:
            shown.append(np.asarray(image.convert("RGB")))
    assert shown[0].shape != shown[1].shape or (shown[0] != shown[1]).any()


def test_folders_are_named_as_far_up_as_they_differ(tmp_path, monkeypatch):
    """A probe's own layout: the folder above is `predictions` in every run."""
    files = [_predictions(tmp_path / run / "predictions" / "m.csv") for run in ("a", "b")]
    monkeypatch.chdir(tmp_path / "a")
    here = Path("predictions") / "m.csv"
    names = [path.name for path in confusion_pictures([here, files[1]], tmp_path / "out")]
    assert names == ["a-predictions-m-confusion.png", "b-predictions-m-confusion.png"]
    (alone,) = confusion_pictures([here], tmp_path / "out")
    assert alone.name == "m-confusion.png"


@pytest.mark.parametrize("other", ["../a/m.csv", "m.txt"])
def test_files_that_no_folder_tells_apart_are_refused(tmp_path, other):
    file = _predictions(tmp_path / "a" / "m.csv")
    again = _predictions(tmp_path / "a" / other)
    with pytest.raises(ProbeError, match=f"--predictions {file} {again}: would be one picture"):
        confusion_pictures([file, again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_split_is_named_as_it_is_in_the_data():
    split = ImageSplit(np.array(["x"]), None, None, np.ones(1), read=lambda index: b"")
    assert _splits("Val", {"train": split, "validation": split}) == ["validation"]
    with pytest.raises(ProbeError, match="--split tests: no such split; there are train"):
        _splits("tests", {"train": split})

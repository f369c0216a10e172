"""`xmag info`: what it prints and writes, counted another way."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from tiled_tiff import write_tiff

from xmag_hf.cli.main import main


@pytest.fixture
def full(tmp_path: Path, cmu_pixels: np.ndarray) -> Path:
    """2,000 x 1,600 px at 0.5 um/px, tissue all over: 256 px patches of it, tiled."""
    piece = cmu_pixels[900:1156, 1000:1256]
    pixels = np.tile(piece, (7, 8, 1))[:1600, :2000]
    return write_tiff(tmp_path / "full.tif", [pixels, pixels[::4, ::4]], mpp=0.5)


def test_facts_and_counts(tmp_path, full, cmu_slide, capsys):
    out = tmp_path / "cohort.csv"
    assert main(["info", str(full), str(cmu_slide), "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "full: generic-tiff" in printed
    assert "objective 20" in printed  # of the embedded slide
    assert "2 slides:" in printed
    with out.open(newline="") as file:
        lines = {line["slide_id"]: line for line in csv.DictReader(file)}
    line = lines["full"]
    assert (line["width"], line["height"], line["mpp0"]) == ("2000", "1600", "0.5")
    assert line["level_mpps"] == "0.5 2"
    assert line["level_5x"] == "1"
    assert int(line["patches_5x"]) == (2000 // 896) * (1600 // 896)
    assert int(line["patches_20x"]) == (2000 // 256) * (1600 // 256)
    assert float(line["ratio"]) == 42 / 2
    assert float(line["tissue_mm2"]) == pytest.approx(0.8, rel=0.05)
    assert int(line["bytes"]) == full.stat().st_size
    assert main(["info", str(full), "--patch-px", "448", "--patch-px-20x", "224"]) == 0
    assert "patches 1 at 5x, 56 at 20x (56.0 times as many)" in capsys.readouterr().out


def test_a_slide_that_cannot_be_read_gives_1(tmp_path, full, capsys):
    pixels = np.full((300, 300, 3), 200, np.uint8)
    write_tiff(tmp_path / "no_mpp.tif", [pixels], mpp=None)
    (tmp_path / "bad.tif").write_bytes(b"")
    assert main(["info", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "failed: bad" in printed
    assert "refused: no_mpp" in printed  # as `xmag embed` says it
    assert "full:" in printed
    assert main(["info", str(tmp_path / "no_mpp.tif"), "--slide-mpp", "0.5"]) == 0
    assert "um/px 0.5 (given)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["info"])
    assert caught.value.code == 2

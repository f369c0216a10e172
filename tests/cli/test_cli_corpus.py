"""`xmag corpus`: exit codes and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiled_tiff import write_tiff

from xmag_hf.cli.main import main


@pytest.fixture
def slide(tmp_path: Path, cmu_pixels) -> Path:
    (tmp_path / "slides").mkdir()
    crop = cmu_pixels[200:1200, 700:1800]
    return write_tiff(tmp_path / "slides" / "tissue.tif", [crop], mpp=0.5)


def test_success_and_again(tmp_path, slide, capsys):
    glass = np.full((1000, 1000, 3), 242, np.uint8)
    write_tiff(slide.with_name("glass.tif"), [glass], mpp=0.5)  # no tissue is no failure
    (tmp_path / "s.csv").write_text("slide_id,cancer_type,patient_id\ntissue,SKCM,p7\n")
    out = tmp_path / "corpus"
    command = ["corpus", str(slide.parent), "--out", str(out), "--slides-csv"]
    command += [str(tmp_path / "s.csv"), "--stride", "448", "--tissue", "0.3", "--workers", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 pairs" in printed
    assert "SKCM" in printed
    assert "no tissue: glass" in printed
    options = json.loads((out / "corpus.json").read_text())["options"]
    assert (options["stride"], options["tissue"], options["codec"]) == (448, 0.3, "jpeg95")
    assert main([*command, "--quiet"]) == 0
    assert "Already done" in capsys.readouterr().out
    assert main([*command, "--codec", "png"]) == 1
    assert "codec 'jpeg95' there, 'png' asked for" in capsys.readouterr().err


def test_a_failed_slide_gives_1_and_the_rest_is_done(tmp_path, slide, capsys):
    slide.with_name("broken.tif").write_bytes(b"no slide")
    assert main(["corpus", str(slide.parent), "--out", str(tmp_path / "c"), "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "failed: broken" in printed
    assert len((tmp_path / "c" / "manifest.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "c" / "data").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "No slides"),
        (["absent/*.svs"], "no such file or folder"),
        (["SLIDE", "--tissue", "7"], "tissue"),
        (["SLIDE", "--workers", "0"], "workers"),
        (["SLIDE", "--codec", "gif"], "codec"),
        (["SLIDE", "--manifest", "m.txt"], "--preset tcga"),
        (["--preset", "tcga"], "--manifest"),
    ],
)
def test_wrong_usage_gives_2(tmp_path, slide, capsys, arguments, said):
    arguments = [str(slide) if a == "SLIDE" else a for a in arguments]
    with pytest.raises(SystemExit) as caught:
        main(["corpus", *arguments, "--out", str(tmp_path / "c")])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

"""`xmag embed`: exit codes, what it writes and prints, options that arrive."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiled_tiff import write_tiff

from xmag_hf.cli.main import main
from xmag_hf.embedding import read_bag


@pytest.fixture
def slide(tmp_path: Path, cmu_pixels: np.ndarray) -> Path:
    (tmp_path / "slides").mkdir()
    return write_tiff(tmp_path / "slides" / "tissue.tif", [cmu_pixels[200:1200, 700:1800]], mpp=0.5)


def test_a_folder_twice(tmp_path, slide, capsys):
    glass = np.full((1000, 1000, 3), 242, np.uint8)
    write_tiff(slide.with_name("glass.tif"), [glass], mpp=0.5)  # no tissue is no failure
    out = tmp_path / "bags"
    command = ["embed", str(slide.parent), "--model", "random:tiny", "--out", str(out)]
    command += ["--tokens", "--pooling", "cls+mean", "--overlap", "24", "--pad-edges", "--quiet"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "no_tissue: glass" in printed
    assert "1 ok, 1 no_tissue" in printed
    bag = read_bag(out / "tissue.h5")
    assert bag.info.encoder == "random:tiny"
    assert (bag.info.mpp, bag.info.patch_px, bag.info.overlap) == (2.0, 224, 24)
    assert bag.features.shape[1] == 2 * 192
    assert bag.tokens is not None and bag.tokens.shape[1:] == (16, 192)
    assert bag.features.dtype == np.float16
    assert bag.info.pad_edges and bag.info.padded_patches
    with Image.open(out / "previews" / "tissue.png") as picture:
        assert picture.width == 1000 or picture.height > 200
    with (out / "summary.csv").open(newline="") as file:
        assert [line["status"] for line in csv.DictReader(file)] == ["no_tissue", "ok"]
    assert main(command) == 0
    assert "1 present" in capsys.readouterr().out
    assert main([*command, "--no-tokens", "--pooling", "cls"]) == 1
    assert "pooling 'cls+mean' there, 'cls' asked for" in capsys.readouterr().out


def test_csv_scale_and_a_failed_slide(tmp_path, slide, capsys):
    """The CSV's um/px goes before the option's, that before the file's; one bad slide gives 1."""
    slide.with_name("broken.tif").write_bytes(b"no slide")
    pixels = np.asarray(Image.open(slide))
    Image.fromarray(pixels).save(slide.with_name("image.png"))
    table = tmp_path / "slides.csv"
    table.write_text(
        "slide,slide_id,patient_id,mpp\n"
        "slides/tissue.tif,first,p1,0.52\nslides/broken.tif,,p2,\nslides/image.png,,p3,\n"
    )
    out = tmp_path / "bags"
    command = ["embed", "--slides-csv", str(table), "--model", "random:tiny", "--out", str(out)]
    assert main([*command, "--slide-mpp", "0.51", "--no-preview", "--quiet"]) == 1
    assert "failed: broken" in capsys.readouterr().out
    assert {path.name for path in out.glob("*.h5")} == {"first.h5", "image.h5"}
    assert not (out / "previews").exists()
    found = {name: read_bag(out / f"{name}.h5").info for name in ("first", "image")}
    assert (found["first"].mpp0, found["image"].mpp0) == (0.52, 0.51)
    assert found["image"].mpp_source == "given"
    records = json.loads((out / "summary.json").read_text())["records"]
    assert [record["patient_id"] for record in records] == ["p1", "p2", "p3"]


def test_annotations_by_slide(tmp_path, slide, capsys):
    ring = [[0, 0], [1100, 0], [1100, 1000], [0, 1000], [0, 0]]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tissue.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": [ring]})
    )
    slide.with_name("other[a].tif").write_bytes(slide.read_bytes())  # rich would take [a] for a tag
    out = tmp_path / "bags"
    command = ["embed", str(slide.parent), "--model", "random:tiny", "--out", str(out), "--quiet"]
    assert main([*command, "--tissue-geojson", str(tmp_path / "notes")]) == 1
    printed = capsys.readouterr().out
    assert "other[a].geojson" in printed
    assert "│ other[a] " in printed
    assert read_bag(out / "tissue.h5").info.tissue.startswith("geojson:")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "random:tiny"], "No slides"),
        (["SLIDE"], "--model"),
        (["SLIDE", "--model", "random:tiny", "--overlap", "-3"], "overlap"),
        (["SLIDE", "--model", "random:tiny", "--tissue", "7"], "tissue"),
        (["absent/*.svs", "--model", "random:tiny"], "no such file or folder"),
        (["SLIDE", "OTHER", "--model", "random:tiny"], "stands for"),
        (["DIR", "--model", "random:tiny", "--tissue-geojson", "a.geojson"], "one file for 2"),
    ],
)
def test_wrong_usage_gives_2(tmp_path, slide, capsys, arguments, said):
    other = tmp_path / "slides" / "sub" / "tissue.tif"
    other.parent.mkdir()
    other.write_bytes(slide.read_bytes())
    names = {"SLIDE": str(slide), "OTHER": str(other), "DIR": str(slide.parent)}
    with pytest.raises(SystemExit) as caught:
        main(["embed", *(names.get(a, a) for a in arguments), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_cannot_be_had_is_one_line(tmp_path, slide, capsys):
    command = ["embed", str(slide), "--out", str(tmp_path / "out"), "--model"]
    assert main([*command, "no-such"]) == 1
    (error,) = capsys.readouterr().err.splitlines()  # and no empty bar before it
    assert error.startswith("xmag embed: 'no-such'")
    assert main([*command, "efficientnet-lite0"]) == 1
    assert "--mpp 0.5" in capsys.readouterr().err

"""Odd slides through the command: what each gets, what is said, and the exit code."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
from dicom_slide import write_dicom
from giant_tiff import write_giant
from PIL import Image, ImageDraw
from tiled_tiff import write_tiff

from xmag_hf.cli.main import main
from xmag_hf.embedding import read_bag

SCALE = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "metadata": None}


@pytest.fixture(autouse=True)
def _quiet_tifffile(caplog):
    caplog.set_level(logging.CRITICAL, logger="tifffile")


def deep(path: Path, pixels: np.ndarray) -> None:
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), **SCALE)


def half_transparent(tissue: np.ndarray) -> np.ndarray:
    alpha = np.full((*tissue.shape[:2], 1), 255, np.uint8)
    alpha[:, 600:] = 0
    return np.concatenate([tissue, alpha], axis=2)


def with_pen(tissue: np.ndarray) -> np.ndarray:
    """Tissue on the left of a larger glass, and a blue line round it that is 60 um wide."""
    glass = np.full((2000, 3000, 3), 243, np.uint8)
    glass[500:1500, 300:1400] = tissue
    picture = Image.fromarray(glass)
    ImageDraw.Draw(picture).line([(2000, 100), (2300, 1000), (1900, 1900)], (20, 60, 160), 120)
    return np.asarray(picture)


@pytest.fixture
def odd(tmp_path: Path, tissue: np.ndarray) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    grey = tissue.mean(axis=2).astype(np.uint8)
    write_tiff(folder / "alpha.tif", [half_transparent(tissue)], 0.5)
    write_tiff(folder / "pen.tif", [with_pen(tissue)], 0.5)
    deep(folder / "sixteen.tif", tissue.astype(np.uint16) * 257)
    deep(folder / "twelve.tif", tissue.astype(np.uint16) * 16)
    deep(folder / "float.tif", (tissue / 255).astype(np.float32))
    write_giant(folder / "vast.tif", 300_000, tissue[:256, :256])
    write_dicom(folder / "dicom.dcm", tissue, 0.5)
    Image.fromarray(tissue).save(folder / "image.png")
    (folder / "image.png").rename(folder / "named_svs.svs")
    for name in ("grey", "annotated"):
        tifffile.imwrite(folder / f"{name}.tif", grey, tile=(256, 256), **SCALE)
    tifffile.imwrite(folder / "strips.tif", tissue, photometric="rgb", rowsperstrip=8, **SCALE)
    ring = [[0, 0], [1100, 0], [1100, 1000], [0, 1000], [0, 0]]
    polygon = json.dumps({"type": "Polygon", "coordinates": [ring]})
    (folder / "annotated.geojson").write_text(polygon)
    return folder


SAID = {
    "alpha": ("ok", ""),
    "pen": ("ok", ""),
    "sixteen": ("ok", ""),
    "dicom": ("ok", ""),
    "strips": ("ok", ""),
    "twelve": ("no_tissue", "convert it to 8 bits"),
    "grey": ("no_tissue", "--tissue-geojson"),
    "float": ("failed", "32-bit samples"),
    "named_svs": ("failed", "no format that OpenSlide reads"),
    "vast": ("refused", "150 x 150 mm"),
}


def test_each_gets_its_own_answer(tmp_path, odd, tissue, capsys):
    out = tmp_path / "out"
    command = ["embed", "--model", "random:tiny", "--out", str(out), "--mpp", "0.5", "--quiet"]
    slides = [str(path) for path in odd.iterdir() if path.stem in SAID]
    assert main([*command, *slides]) == 1
    printed = capsys.readouterr().out
    records = json.loads((out / "summary.json").read_text())["records"]
    found = {record["slide_id"]: record for record in records}
    assert {name: record["status"] for name, record in found.items()} == {
        name: status for name, (status, _) in SAID.items()
    }
    for name, (_, said) in SAID.items():
        assert said in found[name]["reason"]
        assert found[name]["reason"] in printed
    plain = read_bag(out / "strips.h5")  # the same pixels as sixteen.tif
    assert (read_bag(out / "sixteen.h5").coords == plain.coords).all()
    assert np.allclose(read_bag(out / "sixteen.h5").features, plain.features, atol=1e-2)
    assert len(read_bag(out / "dicom.h5").coords) == len(plain.coords)
    columns = read_bag(out / "alpha.h5").coords[:, 0]
    assert columns.max() + 224 / 4 <= 600 + 1  # glass from 600 on; a quarter of tissue is enough
    assert set(read_bag(out / "pen.h5").coords[:, 0]) <= set(range(0, 1400))
    # Nothing to complain about: 0.
    assert main([*command, str(odd / "twelve.tif"), str(odd / "grey.tif")]) == 0


def test_an_annotated_grey_slide_is_embedded(tmp_path, odd):
    out = tmp_path / "out"
    command = ["embed", str(odd / "annotated.tif"), "--model", "random:tiny", "--out", str(out)]
    command += ["--mpp", "0.5", "--quiet", "--tissue-geojson", str(odd / "annotated.geojson")]
    assert main(command) == 0
    assert len(read_bag(out / "annotated.h5").coords) == 16

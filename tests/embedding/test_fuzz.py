"""Damaged headers: no mutation of a small slide crashes the process or makes it hang."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
from fuzz_slides import base_of, mutated, survivors
from giant_tiff import write_giant

from xmag_hf.embedding.options import EmbedOptions
from xmag_hf.embedding.plan import PatchGeometry, plan_slide
from xmag_hf.embedding.sources import SlideSource
from xmag_hf.slides import SlideError

SCALE = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}


def write_bases(folder: Path, pixels: np.ndarray) -> list[Path]:
    """Small slides of the kinds of TIFF there are, 160 px a side."""
    paths = []

    def write(name: str, **how: object) -> None:
        path = folder / f"{name}.tif"
        with tifffile.TiffWriter(path, bigtiff=name == "big", ome=name == "ome") as file:
            how = {"photometric": "rgb", **SCALE, **how}
            subifds = {"subifds": 1} if name == "ome" else {}
            file.write(pixels, **subifds, **how)
            file.write(pixels[::4, ::4], subfiletype=1, **how)
        paths.append(path)

    tiled = {"tile": (64, 64), "metadata": None}
    write("jpeg", compression="jpeg", **tiled)
    write("big", compression="lzw", **tiled)
    write("strips", rowsperstrip=16, compression="zlib", metadata=None)
    write("ome", rowsperstrip=16, metadata={"axes": "YXS", "PhysicalSizeX": 0.5})
    aperio = "Aperio Image Library v1\n160x160 |AppMag = 20|MPP = 0.5"
    write("svs", compression="jpeg", description=aperio, **tiled)
    write("jpeg2000", compression="jpeg2000", **tiled)
    paths.append(write_giant(folder / "giant.tif", 512, np.tile(pixels, (2, 2, 1))[:256, :256]))
    return paths


@pytest.mark.parametrize("mutations", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutation_crashes_or_hangs(tmp_path: Path, cmu_pixels: np.ndarray, mutations: int):
    bases = write_bases(tmp_path, cmu_pixels[900:1060, 1000:1160])
    dead, words = survivors(tmp_path, 0, mutations, bases)
    print(words)
    assert not dead, words
    # Most are refused and some are read: the mutations are neither all fatal nor all harmless.
    assert "SlideOpenError" in words[-1] and "'read'" in words[-1]


@pytest.mark.parametrize("number", [942, 1471])
def test_damage_that_was_no_slide_error(tmp_path: Path, cmu_pixels: np.ndarray, number: int):
    """An SVS property without a value; a photometric interpretation that is no number."""
    bases = write_bases(tmp_path, cmu_pixels[900:1060, 1000:1160])
    path = tmp_path / "mutated.tif"
    base = base_of(bases[number % len(bases)])
    path.write_bytes(mutated(base, random.Random(number)))
    geometry = PatchGeometry(64, 0.5, 0, 64, 0.5, 0.0)
    try:
        plan = plan_slide(SlideSource(path), geometry, EmbedOptions(tissue=0.0))
        assert len(plan.coords) > 0
    except SlideError as error:
        assert "mutated" in str(error)

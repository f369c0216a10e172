"""Pixels of a plan: against the contract's dense reference, in order, with damage counted."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from lanczos_reference import expected_region
from PIL import Image
from tiled_tiff import write_tiff

from xmag_hf.embedding.options import EmbedOptions
from xmag_hf.embedding.plan import PatchGeometry, SlidePlan, plan_slide
from xmag_hf.embedding.read import PatchBatch, read_patches
from xmag_hf.embedding.sources import SlideSource, open_source
from xmag_hf.slides import SlideOpenError, SlideScaleError

SMALL = PatchGeometry(
    patch_px=100, mpp=1.0, overlap=0, input_px=40, input_mpp=2.5, inset_px=0.0
)  # 200 px of level 0


def read_all(plan: SlidePlan, batch_size: int = 7, threads: int = 3) -> list[PatchBatch]:
    return list(read_patches(plan, batch_size=batch_size, threads=threads))


def joined(batches: list[PatchBatch]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rows = np.concatenate([batch.rows for batch in batches])
    pixels = np.concatenate([batch.pixels for batch in batches])
    return rows, pixels, [row for batch in batches for row, _ in batch.unreadable]


@pytest.mark.parametrize("inset", [0.0, 30.0])
def test_pixels_are_the_contract_s(slide, tissue, inset):
    """With an inset, the middle 40 px at 1 um/px of each 100: a centre crop."""
    scale = 2.5 if inset == 0 else 1.0
    geometry = PatchGeometry(100, 1.0, 0, 40, scale, inset)
    plan = plan_slide(SlideSource(slide), geometry, EmbedOptions(tissue=0.9))
    batches = read_all(plan)
    assert [len(batch.rows) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    rows, pixels, unreadable = joined(batches)
    assert rows.tolist() == list(range(len(plan.coords)))
    assert (len(rows) > 14, unreadable) == (True, [])
    for (x, y), patch in list(zip(plan.coords, pixels, strict=True))[::5]:
        place = (x + inset * 2, y + inset * 2)
        exact = expected_region(tissue, 1, place, (40, 40), scale, 0.5)
        assert np.abs(patch - exact).max() <= 1


def test_threads_and_batches_change_nothing(slide):
    plan = plan_slide(SlideSource(slide), SMALL, EmbedOptions())
    one, other = joined(read_all(plan, 1000, 1)), joined(read_all(plan, 3, 4))
    assert (one[0] == other[0]).all()
    assert (one[1] == other[1]).all()


def test_a_corrupt_tile_costs_the_patches_it_touches(tmp_path, cmu_slide):
    with tifffile.TiffFile(cmu_slide) as tiff:
        page = tiff.pages[0]
        number = len(page.dataoffsets) // 2
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        across = -(-page.imagewidth // page.tilewidth)
        tile = page.tilewidth
    content = bytearray(cmu_slide.read_bytes())
    content[offset : offset + count] = bytes(count)
    damaged = tmp_path / "damaged.svs"
    damaged.write_bytes(content)
    x, y = number % across * tile, number // across * tile
    whole, part = (
        plan_slide(SlideSource(path), SMALL, EmbedOptions()) for path in (cmu_slide, damaged)
    )
    rows, pixels, unreadable = joined(read_all(part))
    assert unreadable
    assert set(rows) | set(unreadable) <= set(range(len(part.coords)))
    reach = 40  # the kernel sees 3 px of 2.5 um, and OpenSlide's blending a little more
    side = part.width_level0
    for column, line in part.coords[unreadable]:
        assert x - side - reach <= column <= x + tile + reach
        assert y - side - reach <= line <= y + tile + reach
    intact = dict(zip(map(tuple, whole.coords), joined(read_all(whole))[1], strict=True))
    got = {tuple(part.coords[row]): patch for row, patch in zip(rows, pixels, strict=True)}
    assert all((intact[place] == patch).all() for place, patch in got.items() if place in intact)
    lost = {tuple(xy) for xy in part.coords[unreadable]}
    assert set(intact) <= set(got) | lost  # none is lost without being counted


def test_a_slide_smaller_than_a_patch_is_one_patch_on_white(tmp_path, tissue):
    tiny = write_tiff(tmp_path / "tiny.tif", [tissue[300:500, 300:600]], mpp=0.5)
    geometry = PatchGeometry(224, 1.0, 0, 224, 1.0, 0.0)
    plan = plan_slide(SlideSource(tiny), geometry, EmbedOptions())
    _, pixels, _ = joined(read_all(plan))
    assert plan.coords.tolist() == [[0, 0]]
    assert plan.padded.tolist() == [True]
    assert (pixels[0, 104:] == 255).all() and (pixels[0, :, 154:] == 255).all()
    assert pixels[0, :90, :140].mean() < 230


def test_plain_images(tmp_path, tissue):
    Image.fromarray(tissue).save(tmp_path / "a.png")
    grey = tissue.mean(axis=2).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey.png")
    alpha = np.dstack([tissue, np.full(tissue.shape[:2], 255, np.uint8)])
    alpha[:, 600:, 3] = 0
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    plans = {
        name: plan_slide(SlideSource(tmp_path / f"{name}.png", mpp=0.5), SMALL, EmbedOptions())
        for name in ("a", "grey", "alpha")
    }
    for (x, y), patch in zip(plans["a"].coords, joined(read_all(plans["a"]))[1], strict=True):
        exact = expected_region(tissue, 1, (x, y), (40, 40), 2.5, 0.5)
        assert np.abs(patch - exact).max() <= 1
    assert len(plans["grey"].coords) == 0  # no colour, no tissue
    with open_source(tmp_path / "grey.png", 0.5) as image:
        assert (image.read_region((0, 0), (1100, 1000), 0.5)[..., 1] == grey // 256).all()
    assert 400 <= plans["alpha"].coords[:, 0].max() < 600
    with pytest.raises(SlideScaleError, match="um/px"):
        plan_slide(SlideSource(tmp_path / "a.png"), SMALL, EmbedOptions())
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with pytest.raises(SlideOpenError, match="cannot be decoded"):
        plan_slide(SlideSource(tmp_path / "b.jpg", mpp=0.5), SMALL, EmbedOptions())

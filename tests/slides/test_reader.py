"""Regions against a dense-matrix Lanczos in float64, um/px rules, edges, damage."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import openslide
import pytest
from lanczos_reference import expected_region
from PIL import Image
from tiled_tiff import write_tiff

from xmag_hf.slides import (
    SlideOpenError,
    SlideReadError,
    SlideScaleError,
    open_slide,
    sha256_head,
)

W0, H0 = 2051, 1539  # no level below divides these: OpenSlide's downsamples are not whole


def _texture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(70, 186, (height, width, 3), dtype=np.uint8)


LEVELS = [_texture(H0, W0, 0), _texture(H0 // 4, W0 // 4, 1), _texture(H0 // 16, W0 // 16, 2)]


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiff(tmp_path_factory.mktemp("tiff") / "pyramid.tif", LEVELS, mpp=0.25)


@pytest.mark.parametrize(
    ("xy", "size", "mpp", "level", "tolerance"),
    [
        ((100, 50), (64, 48), 0.5, 0, 1),
        ((100.37, 50.81), (64, 48), 0.5, 0, 1),
        ((0, 0), (50, 50), 0.6113, 0, 1),
        ((777.5, 333.25), (100, 80), 0.9, 0, 1),
        ((100, 100), (90, 90), 0.23, 0, 1),  # enlarged: support 3, not stretched
        ((W0 - 120, H0 - 80), (60, 40), 0.5, 0, 1),  # ends with the slide
        # Below here OpenSlide blends neighbours by up to an eighth of a pixel, in 8 bits. Undoing
        # that doubles its rounding on white noise; without it the error is above 10.
        ((1200, 900), (40, 30), 2.0, 1, 2),
        ((1500, 1000), (30, 20), 3.7, 1, 2),
        ((300, 200), (64, 64), 1.0, 1, 2),
        ((402.3, 77.7), (60, 50), 1.37, 1, 2),
        ((500, 500), (20, 20), 4.0, 2, 2),
    ],
)
def test_region_is_the_contracts_lanczos(pyramid, xy, size, mpp, level, tolerance):
    with open_slide(pyramid) as slide:
        assert slide.level_for(mpp) == level
        actual = slide.read_region(xy, size, mpp)
    expected = expected_region(LEVELS[level], 4**level, xy, size, mpp, 0.25)
    assert actual.dtype == np.uint8
    assert actual.shape == (size[1], size[0], 3)
    assert np.abs(actual - expected).max() <= tolerance


def test_real_tissue_from_a_level_that_openslide_blends(tmp_path, cmu_pixels):
    """2,967 px are 741.75 of the level, so OpenSlide's downsample is 4.002."""
    level = np.asarray(Image.fromarray(cmu_pixels[:2964]).reduce(4))
    path = write_tiff(tmp_path / "tissue.tif", [cmu_pixels, level], mpp=0.25)
    for xy in ((601, 1203), (1401.5, 2111.25), (900, 2400)):
        with open_slide(path) as slide:
            actual = slide.read_region(xy, 100, 1.3)
        error = np.abs(actual - expected_region(level, 4, xy, (100, 100), 1.3, 0.25))
        assert error.max() <= 2
        assert (error > 1).mean() < 0.01


def test_real_tissue_at_5x(cmu_slide, cmu_pixels):
    """A fractional factor on H&E: 0.499 to 2.0 um/px."""
    with open_slide(cmu_slide) as slide:
        actual = slide.read_region((600, 1200), 112, 2.0)
    expected = expected_region(cmu_pixels, 1, (600, 1200), (112, 112), 2.0, 0.499)
    assert np.abs(actual - expected).max() <= 1


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (40, 40)])
def test_columns_come_before_rows_whatever_the_shape(tmp_path, size):
    """Black and white noise overshoots, and what is clipped depends on the order of the passes."""
    noise = np.random.default_rng(3).integers(0, 2, (400, 400, 1)).repeat(3, axis=2) * 255
    path = write_tiff(tmp_path / "noise.tif", [noise.astype(np.uint8)], mpp=0.5)
    with open_slide(path) as slide:
        actual = slide.read_region((100, 120), size, 0.9)
    assert np.abs(actual - expected_region(noise, 1, (100, 120), size, 0.9, 0.5)).max() <= 1


def test_past_the_edge_is_white_and_the_rest_is_the_slide(pyramid):
    with open_slide(pyramid) as slide:
        corner = slide.read_region((W0 - 20, H0 - 10), 40, 0.25)
        before = slide.read_region((-30, -30), 40, 0.25)
        outside = slide.read_region((10 * W0, 0), 16, 0.5)
    assert (corner[:10, :20] == LEVELS[0][-10:, -20:]).all()
    assert (corner[10:] == 255).all()
    assert (corner[:, 20:] == 255).all()
    assert (before[30:, 30:] == LEVELS[0][:10, :10]).all()
    assert (before[:30] == 255).all()
    assert (outside == 255).all()


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.zeros((300, 300, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 255
    rgba[:, 150:, 3] = 128
    path = write_tiff(tmp_path / "alpha.tif", [rgba], mpp=0.5)
    with openslide.OpenSlide(str(path)) as raw:
        if np.asarray(raw.read_region((0, 0), 0, (300, 300)))[..., 3].min() == 255:
            pytest.skip("this OpenSlide ignores the alpha of a TIFF")
    with open_slide(path) as slide:
        pixels = slide.read_region((0, 0), 300, 0.5).astype(int)
    assert (pixels[:, :150] == (200, 0, 0)).all()
    shade = 255 * (1 - 128 / 255)
    assert np.abs(pixels[:, 150:] - (200 * 128 / 255 + shade, shade, shade)).max() <= 2


def test_thumbnail_equals_one_region_whatever_the_blocks(pyramid, monkeypatch):
    monkeypatch.setattr("xmag_hf.slides.reader.THUMBNAIL_BLOCK_PX", 100)
    with open_slide(pyramid) as slide:
        picture, mpp = slide.thumbnail(8.0)
        whole = slide.read_region((0, 0), (picture.shape[1], picture.shape[0]), 8.0)
    assert (picture.shape, mpp) == ((49, 65, 3), 8.0)  # ceil(1539 / 32), ceil(2051 / 32)
    assert np.abs(picture.astype(int) - whole)[:-1, :-1].max() <= 1


def _slide_saying(monkeypatch, properties: dict[str, str]) -> None:
    """Let OpenSlide report other properties: headers that no writer here can produce."""
    monkeypatch.setattr(openslide.OpenSlide, "properties", properties)


@pytest.mark.parametrize(
    ("properties", "mpp0", "source"),
    [
        ({"openslide.mpp-x": "0.2525", "openslide.mpp-y": "0.2527"}, 0.2526, "openslide"),
        (
            {
                "tiff.ResolutionUnit": "inch",
                "tiff.XResolution": "50800",
                "tiff.YResolution": "50800",
            },
            0.5,
            "tiff",
        ),
        (
            {
                "tiff.ResolutionUnit": "centimeter",
                "tiff.XResolution": "20000",
                "tiff.YResolution": "20000",
            },
            0.5,
            "tiff",
        ),
    ],
)
def test_mpp_from_the_header(pyramid, monkeypatch, properties, mpp0, source):
    _slide_saying(monkeypatch, properties)
    with open_slide(pyramid) as slide:
        assert slide.mpp0 == pytest.approx(mpp0, rel=1e-12)
        assert slide.mpp_source == source


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ({"openslide.objective-power": "40"}, "objective power 40"),
        ({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.53"}, "0.5 x 0.53"),
        ({"openslide.mpp-x": "0.0002", "openslide.mpp-y": "0.0002"}, "0.0002"),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0"}, "outside 0.05 to 20"),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "0.5"}, "nan"),
        ({"openslide.mpp-x": "0,25", "openslide.mpp-y": "0,25"}, "nan"),
        # 72 dots per inch is what image programs write when they know nothing.
        (
            {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "72", "tiff.YResolution": "72"},
            "352.778",
        ),
    ],
)
def test_implausible_mpp_is_refused_and_can_be_given(pyramid, monkeypatch, properties, said):
    _slide_saying(monkeypatch, properties)
    with pytest.raises(SlideScaleError, match="--mpp") as caught:
        open_slide(pyramid)
    assert "pyramid" in str(caught.value)
    assert said in str(caught.value)
    with open_slide(pyramid, mpp=0.26) as slide:
        assert (slide.mpp0, slide.mpp_source) == (0.26, "given")


@pytest.mark.parametrize("mpp", [0, -0.5, 21, float("nan"), float("inf")])
def test_a_given_mpp_is_checked_too(pyramid, mpp):
    with pytest.raises(SlideScaleError, match="given"):
        open_slide(pyramid, mpp=mpp)


def test_bounds_give_origin_and_extent(pyramid, monkeypatch):
    bounds = {"x": "100", "y": "37", "width": "500", "height": "9999"}
    properties = {f"openslide.bounds-{name}": value for name, value in bounds.items()}
    _slide_saying(monkeypatch, properties)
    with open_slide(pyramid, mpp=0.25) as slide:
        assert slide.origin_xy == (100, 37)
        assert slide.extent_xy == (600, H0)


def test_coarse_slides(tmp_path):
    pixels = _texture(300, 400, 5)
    for mpp, fits in ((0.5266, True), (0.55, True), (0.56, False)):
        path = write_tiff(tmp_path / f"{mpp}.tif", [pixels], mpp=mpp)
        with open_slide(path) as slide:
            if fits:
                actual = slide.read_region((20, 30), (200, 180), 0.5)
            else:
                with pytest.raises(SlideScaleError, match="allow"):
                    slide.read_region((20, 30), (200, 180), 0.5)
                actual = slide.read_region((20, 30), (200, 180), 0.5, allow_coarse=True)
        expected = expected_region(pixels, 1, (20, 30), (200, 180), 0.5, mpp)
        assert np.abs(actual - expected).max() <= 1


def test_files_that_are_no_slides(tmp_path):
    cases = {"absent.svs": None, "empty.svs": b"", "noise.svs": b"\x00\xff" * 5000}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SlideOpenError, match=name.removesuffix(".svs")):
            open_slide(tmp_path / name)
    with pytest.raises(SlideOpenError):
        open_slide(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_the_disk_does_not_give(tmp_path, cmu_slide, monkeypatch, number):
    """An administrator may read files of mode 000: the error is made here."""
    path = tmp_path / "closed.svs"
    path.write_bytes(cmu_slide.read_bytes())
    original = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self == path:
            raise OSError(number, os.strerror(number), str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SlideOpenError, match="closed: .*permissions") as caught:
        open_slide(path)
    assert os.strerror(number) in str(caught.value)


def test_damage_costs_only_the_regions_that_touch_it(tmp_path, cmu_slide):
    """Bytes in the middle of a JPEG-compressed slide are overwritten."""
    damaged = tmp_path / "damaged.svs"
    content = bytearray(cmu_slide.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 60_000] = bytes(60_000)
    damaged.write_bytes(content)
    good = bad = 0
    with open_slide(damaged) as slide, open_slide(cmu_slide) as intact:
        for y in range(0, 2900, 240):
            for x in range(0, 2000, 240):
                try:
                    pixels = slide.read_region((x, y), 200, 0.499)
                except SlideReadError as error:
                    assert "damaged" in str(error)
                    bad += 1
                else:
                    good += (pixels == intact.read_region((x, y), 200, 0.499)).all()
        assert bad > 0
        assert good > 50  # the same handle goes on after each error
        picture, gaps, _ = slide.thumbnail_with_gaps(8.0)
        assert gaps.any() and not gaps.all() and (picture[gaps] == 255).all()
        with pytest.raises(SlideReadError):
            slide.thumbnail(8.0)
    assert (picture == 255).all(axis=2).mean() < 0.9


@pytest.mark.parametrize("size", [0, -3, (5, 0)])
def test_senseless_regions(pyramid, size):
    with open_slide(pyramid) as slide:
        with pytest.raises(ValueError, match="pyramid"):
            slide.read_region((0, 0), size, 0.5)
        with pytest.raises(ValueError, match="finite"):
            slide.read_region((float("nan"), 0), 10, 0.5)
        with pytest.raises(SlideScaleError, match="target"):
            slide.read_region((0, 0), 10, 0.0)


def test_sha256_head_is_size_and_first_mebibyte(tmp_path):
    content = np.random.default_rng(0).bytes((1 << 20) + 77)
    file = tmp_path / "a"
    file.write_bytes(content)
    expected = hashlib.sha256(f"{len(content)}\n".encode() + content[: 1 << 20]).hexdigest()
    assert sha256_head(file) == expected

"""Tiles decoded directly: OpenSlide's pixels to the bit, or left to OpenSlide."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from jpeg_tiff import KINDS, change_tile, write_jpeg_tiff
from tiled_tiff import write_tiff

from xmag_hf.slides import jpeg_tiles, open_slide
from xmag_hf.slides.jpeg_tiles import (
    JpegLevel,
    TileLayoutError,
    TileStore,
    check_pixels,
    decode_tile,
    jpeg_level,
)

pytest.importorskip("simplejpeg")


def directly(path: Path, level: int = 0, numbers: range | None = None) -> list[np.ndarray]:
    """Tiles of a level, clipped to it."""
    with open_slide(path, mpp=0.5) as slide:
        jpeg = jpeg_level(slide, level)
    tiles = []
    with path.open("rb") as file:
        for number in numbers or range(len(jpeg.offsets)):
            out = np.empty((jpeg.tile_px[1], jpeg.tile_px[0], 3), np.uint8)
            assert decode_tile(jpeg, file, number, out)
            row, column = divmod(number, jpeg.across)
            right, bottom = (
                size - at * px
                for size, at, px in zip(jpeg.size, (column, row), jpeg.tile_px, strict=True)
            )
            tiles.append(out[:bottom, :right])
    return tiles


def by_openslide(path: Path, level: int = 0, numbers: range | None = None) -> list[np.ndarray]:
    with openslide.OpenSlide(path) as slide:
        width, height = slide.level_dimensions[level]
        px = int(slide.properties[f"openslide.level[{level}].tile-width"])
        scale = round(slide.level_downsamples[level])
        places = [(x, y) for y in range(0, height, px) for x in range(0, width, px)]
        tiles = []
        for x, y in [places[n] for n in numbers or range(len(places))]:
            size = (min(px, width - x), min(px, height - y))
            region = slide.read_region((x * scale, y * scale), level, size)
            assert region.getchannel("A").getextrema() == (255, 255)
            tiles.append(np.asarray(region)[..., :3])
    return tiles


def assert_same(path: Path, level: int = 0, numbers: range | None = None) -> None:
    ours, theirs = directly(path, level, numbers), by_openslide(path, level, numbers)
    assert len(ours) == len(theirs) > 1
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_openslide_s(tmp_path, cmu_pixels, kind):
    picture = cmu_pixels[100:658, 1000:1724]  # no multiples of a tile; half of it is odd
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture, picture[::2, ::2]], 0.5, kind=kind)
    assert_same(path)
    assert_same(path, 1)


def test_an_svs_with_shared_tables_and_rgb(cmu_slide):
    assert_same(cmu_slide, numbers=range(40, 70))


def test_real_slides(shared_data):
    assert_same(shared_data / "slides" / "colon_40x.tif", 1)
    assert_same(shared_data / "slides" / "colon_adenoma_20x.tif", 0, range(44, 47))


def test_a_jfif_marker_does_not_overrule_the_tiff_s_colours(tmp_path, cmu_pixels):
    """libjpeg takes a JPEG with a JFIF marker for YCbCr, whatever else is said."""
    path = write_jpeg_tiff(tmp_path / "a.tif", [cmu_pixels[:300, :300]], 0.5, kind="RGB")
    with open_slide(path) as slide:
        jpeg = jpeg_level(slide, 0)
    plain = directly(path)[0]
    data = path.read_bytes()[jpeg.offsets[0] :][: jpeg.counts[0]]
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    (tmp_path / "tile").write_bytes(data[:2] + jfif + data[2:])
    count = len(data) + len(jfif)
    marked = dataclasses.replace(jpeg, offsets=np.array([0]), counts=np.array([count]))
    out = np.empty((256, 256, 3), np.uint8)
    with (tmp_path / "tile").open("rb") as file:
        assert decode_tile(marked, file, 0, out)
    assert (out == plain).all()


DAMAGE = {
    "zeros": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2],
    "absent": lambda data: b"",
    "other size": lambda data: data.replace(b"\x01\x00\x01\x00\x03", b"\x00\x80\x00\x80\x03", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_openslide_refuses_is_not_decoded(tmp_path, cmu_pixels, damage):
    whole = write_jpeg_tiff(tmp_path / "whole.tif", [cmu_pixels[:600, 800:1400]], 0.5)
    path = change_tile(whole, tmp_path / "bad.tif", 4, DAMAGE[damage])
    with open_slide(path) as slide:
        jpeg = jpeg_level(slide, 0)
    out = np.empty((256, 256, 3), np.uint8)
    with path.open("rb") as file:
        assert [decode_tile(jpeg, file, n, out) for n in (3, 4, 5)] == [True, False, True]
    with openslide.OpenSlide(path) as slide:
        if damage == "absent":
            region = slide.read_region((256, 256), 0, (256, 256))
            assert region.getchannel("A").getextrema() == (0, 0)
        else:
            with pytest.raises(openslide.OpenSlideError):
                slide.read_region((256, 256), 0, (256, 256))


def test_what_is_decoded_of_a_damaged_tile_is_what_openslide_decodes(tmp_path, cmu_pixels):
    """Some damage leaves a valid JPEG. We may refuse more than OpenSlide, which is asked then."""
    whole = write_jpeg_tiff(tmp_path / "whole.tif", [cmu_pixels[:600, 800:1400]], 0.5)
    rng = np.random.default_rng(1)
    out = np.empty((256, 256, 3), np.uint8)
    decoded = 0

    def noise(data: bytes) -> bytes:
        n = int(rng.integers(1, 20))
        at = int(rng.integers(0, len(data) - n))
        return data[:at] + rng.integers(0, 256, n, dtype=np.uint8).tobytes() + data[at + n :]

    for _ in range(40):
        path = change_tile(whole, tmp_path / "noise.tif", 4, noise)
        with open_slide(path) as slide, path.open("rb") as file:
            if not decode_tile(jpeg_level(slide, 0), file, 4, out):
                continue
        with openslide.OpenSlide(path) as slide:
            theirs = np.asarray(slide.read_region((256, 256), 0, (256, 256)))[..., :3]
        assert (out == theirs).all()
        decoded += 1
    assert 3 < decoded < 37


def test_what_has_no_jpeg_tiles_is_refused(tmp_path, cmu_pixels):
    picture = cmu_pixels[:600, 800:1400]
    write_tiff(tmp_path / "raw.tif", [picture], 0.5)
    tifffile.imwrite(
        tmp_path / "grey.tif",
        picture[..., 0],
        photometric="minisblack",
        compression="jpeg",
        tile=(256, 256),
        metadata=None,
    )
    tifffile.imwrite(
        tmp_path / "strips.tif", picture, photometric="rgb", compression="jpeg", metadata=None
    )
    write_jpeg_tiff(tmp_path / "twins.tif", [picture, picture[:300, :300], picture], 0.5)
    reasons = {
        "raw": "not JPEG",
        "strips": "its format is tifffile",
        "grey": "not 8-bit RGB",
        "twins": "2 tiled TIFF pages",
    }
    for name, reason in reasons.items():
        with (
            open_slide(tmp_path / f"{name}.tif", mpp=0.5) as slide,
            pytest.raises(TileLayoutError, match=f"{name}: level 0 .*{reason}.*--reader"),
        ):
            jpeg_level(slide, 0)


def test_the_check_sees_other_colours_and_other_places(tmp_path, cmu_pixels):
    picture = cmu_pixels[200:1200, 700:1700]
    path = write_jpeg_tiff(tmp_path / "a.tif", [picture], 0.5)
    rgb = jpeg_tiles._header(None, transform=0)
    with open_slide(path) as slide:
        jpeg = jpeg_level(slide, 0)
        check_pixels(slide, jpeg, [(500, 500)])
        for wrong in (
            dataclasses.replace(jpeg, header=rgb),
            dataclasses.replace(jpeg, offsets=np.roll(jpeg.offsets, 1)),
        ):
            with pytest.raises(TileLayoutError, match="differ from OpenSlide's"):
                check_pixels(slide, wrong, [(500, 500)])
        absent = dataclasses.replace(jpeg, counts=np.zeros_like(jpeg.counts))
        with pytest.raises(TileLayoutError, match="none of 2 tiles"):
            check_pixels(slide, absent, [(500, 500), (100, 100)])


def test_threads_decode_each_tile_once_and_keep_few(tmp_path, cmu_pixels, monkeypatch):
    """Forty runs along the rows of a 12 x 11 grid of tiles, each in need of 2 x 2."""
    path = write_jpeg_tiff(tmp_path / "a.tif", [cmu_pixels[:704, :768]], 0.5, tile=64)
    with open_slide(path) as slide:
        jpeg = jpeg_level(slide, 0)
    needs = [
        np.array([row * 12 + column + k for k in (0, 1, 12, 13)])
        for row in range(0, 10, 2)
        for column in range(0, 11)
    ]
    decoded: list[int] = []
    lock = threading.Lock()

    def counting(jpeg: JpegLevel, file, number: int, out: np.ndarray) -> bool:
        with lock:
            decoded.append(number)
        return number != 13 and decode_tile(jpeg, file, number, out)

    monkeypatch.setattr(jpeg_tiles, "decode_tile", counting)
    expected = by_openslide(path)
    store = TileStore(jpeg, needs)
    most = 0

    def work(run: int) -> None:
        nonlocal most
        store.prepare(run)
        for number in needs[run].tolist():
            tile = store._decoded[number]
            if number == 13:
                assert tile is None
            else:
                assert (tile[:64, :64] == expected[number]).all()
        most = max(most, len(store._decoded))
        store.release(run)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(len(needs))))
    store.close()
    assert sorted(decoded) == sorted(set(np.concatenate(needs).tolist()))
    assert len(store._decoded) == 0
    assert most <= 24  # two of eleven rows


def test_a_file_that_is_gone_ends_all_runs(tmp_path, cmu_pixels):
    """No thread may wait for tiles that another failed to decode."""
    path = write_jpeg_tiff(tmp_path / "a.tif", [cmu_pixels[:512, :512]], 0.5)
    with open_slide(path) as slide:
        store = TileStore(jpeg_level(slide, 0), [np.array([0, 1]), np.array([1, 3])])
    path.unlink()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(store.prepare, run) for run in (0, 1)]
    assert all(isinstance(run.exception(), FileNotFoundError) for run in runs)

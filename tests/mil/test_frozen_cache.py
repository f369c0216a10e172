"""What is kept of slides: the right numbers, complete or absent, and of this very slide."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xmag_hf.embedding import EmbedOptions, SlideSource
from xmag_hf.embedding.plan import PatchGeometry
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.frozen_cache import FrozenCache, fill_cache

GEOMETRY = PatchGeometry(224, 2.0, 0, 224, 2.0, 0.0)
READING = EmbedOptions(slide_mpp=2.0, tissue=0.0, threads=1)


@pytest.fixture
def slide(tmp_path: Path, cmu_pixels: np.ndarray) -> Path:
    """Two rows of three patches."""
    path = tmp_path / "slide.png"
    Image.fromarray(np.ascontiguousarray(cmu_pixels[500:948, 700:1372])).save(path)
    return path


def cache_in(folder: Path, dtype: str = "float32") -> FrozenCache:
    return FrozenCache(folder / "cache", dtype == "uint8", dtype, GEOMETRY, READING)


def means(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 224, 224, 3) -> (n, 4, 3), means of the quarters."""
    return pixels.double().reshape(-1, 2, 112, 2, 112, 3).mean(dim=(2, 4)).reshape(-1, 4, 3)


def test_rows_are_those_of_the_patches_in_their_order(
    slide: Path, tmp_path: Path, cmu_pixels: np.ndarray
) -> None:
    cache = cache_in(tmp_path)
    assert fill_cache(cache, [SlideSource(slide)], means, batch_size=4) == {}
    tiles = [
        cmu_pixels[500 + y : 724 + y, 700 + x : 924 + x] for y in (0, 224) for x in (0, 224, 448)
    ]
    np.testing.assert_allclose(
        cache.rows("slide"), means(torch.from_numpy(np.stack(tiles))), rtol=1e-6
    )
    pixels = cache_in(tmp_path / "pixels", "uint8")
    fill_cache(pixels, [SlideSource(slide)], lambda part: part, batch_size=4)
    np.testing.assert_array_equal(pixels.rows("slide"), np.stack(tiles))


def test_nothing_is_computed_twice_and_another_slide_is(slide: Path, tmp_path: Path) -> None:
    cache, calls = cache_in(tmp_path), []

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return means(pixels)

    for _ in range(2):
        fill_cache(cache, [SlideSource(slide)], counted, batch_size=6)
    assert calls == [6]
    before = cache.rows("slide")
    with Image.open(slide) as image:
        turned = image.rotate(180)
    turned.save(slide)
    fill_cache(cache, [SlideSource(slide)], counted, batch_size=6)
    assert calls == [6, 6]
    np.testing.assert_allclose(cache.rows("slide"), before.flip(0, 1), rtol=1e-6)


def test_another_scale_or_annotation_is_read_anew(slide: Path, tmp_path: Path) -> None:
    """A wrong um/px that is put right must not leave the wrong patches behind."""
    cache = cache_in(tmp_path)
    ring = [[0, 0], [300, 0], [300, 448], [0, 448], [0, 0]]
    drawn = tmp_path / "slide.geojson"
    drawn.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    found = []
    for source in (
        SlideSource(slide, mpp=1.0),
        SlideSource(slide),
        SlideSource(slide, tissue_geojson=drawn),
    ):
        assert not fill_cache(cache, [source], means, batch_size=6)
        found.append((cache.origin("slide"), len(cache.rows("slide"))))
    assert len({origin for origin, _ in found}) == 3
    assert [rows for _, rows in found][1:] == [6, 4] and found[0][1] != 6


def test_lost_patches_are_told_again_and_read_when_the_slide_is_copied_again(
    tmp_path: Path, cmu_slide: Path, caplog
) -> None:
    """Damaged behind the first MiB, which tells slides apart; the copy keeps its old date."""
    slide, whole = tmp_path / "slide.svs", cmu_slide.read_bytes()
    cache = dataclasses.replace(cache_in(tmp_path), options=EmbedOptions(tissue=0.0, threads=1))
    slide.write_bytes(whole[:1_100_000] + bytes(100_000) + whole[1_200_000:])
    found = []
    for _ in range(2):
        caplog.clear()
        assert not fill_cache(cache, [SlideSource(slide)], means, batch_size=6)
        (told,) = caplog.messages
        found.append((told, cache.origin("slide"), len(cache.rows("slide"))))
    assert "slide: " in found[0][0] and "could not be decoded" in found[0][0]
    assert found[0] == found[1]
    slide.write_bytes(whole)
    os.utime(slide, (1_000_000_000, 1_000_000_000))
    caplog.clear()
    assert not fill_cache(cache, [SlideSource(slide)], means, batch_size=6)
    assert not caplog.messages
    lost = int(found[0][0].split(": ")[1].split()[0])
    assert len(cache.rows("slide")) == found[0][2] + lost > found[0][2]
    assert cache.origin("slide") != found[0][1]  # a training on the rest does not go on with these


def test_an_interrupted_slide_leaves_nothing(slide: Path, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_cache(cache, [SlideSource(slide)], broken, batch_size=2)
    assert list(cache.folder.iterdir()) == []


def test_what_half_precision_cannot_hold_is_refused(slide: Path, tmp_path: Path) -> None:
    cache = cache_in(tmp_path, "float16")
    with pytest.raises(MILError, match=r"slide: .*exceeds float16.*--kept-type float32"):
        fill_cache(cache, [SlideSource(slide)], lambda p: means(p) * 1e4, batch_size=6)
    assert list(cache.folder.iterdir()) == []


def test_slides_without_use_are_told(tmp_path: Path, slide: Path) -> None:
    white, torn = tmp_path / "white.png", tmp_path / "torn.png"
    Image.new("RGB", (448, 448), "white").save(white)
    torn.write_bytes(slide.read_bytes()[:5000])
    reading = EmbedOptions(slide_mpp=2.0, tissue=0.25, threads=1)
    cache = FrozenCache(tmp_path / "cache", False, "float32", GEOMETRY, reading)
    found = fill_cache(
        cache,
        [SlideSource(white), SlideSource(torn), SlideSource(tmp_path / "gone.png")],
        means,
        batch_size=4,
    )
    assert "holds enough tissue" in found["white"] and "torn" in found["torn"]
    assert found.keys() == {"white", "torn", "gone"}
    assert not list(cache.folder.glob("*.h5"))


def test_a_damaged_file_is_named_and_made_anew(slide: Path, tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    fill_cache(cache, [SlideSource(slide)], means, batch_size=6)
    path = cache.path("slide")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(MILError, match=r"slide\.h5: damaged"):
        cache.rows("slide")
    fill_cache(cache, [SlideSource(slide)], means, batch_size=6)
    assert len(cache.rows("slide")) == 6

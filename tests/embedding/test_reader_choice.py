"""The fast reader beside OpenSlide: the same patches, whatever is wrong with the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from jpeg_tiff import change_tile, write_jpeg_tiff
from lanczos_reference import expected_region

from xmag_hf.embedding import read
from xmag_hf.embedding.bag import read_bag
from xmag_hf.embedding.embed import embed_slides
from xmag_hf.embedding.options import EmbedError, EmbedOptions
from xmag_hf.embedding.plan import PatchGeometry, SlidePlan, plan_slide
from xmag_hf.embedding.read import PatchBatch, read_patches
from xmag_hf.embedding.resampling import Resampler
from xmag_hf.embedding.sources import SlideSource
from xmag_hf.slides.jpeg_tiles import TileLayoutError

pytest.importorskip("simplejpeg")
SMALL = PatchGeometry(
    patch_px=100, mpp=1.0, overlap=0, input_px=80, input_mpp=1.25, inset_px=0.0
)  # 200 px of level 0


@pytest.fixture(scope="module")
def jpeg_slide(tmp_path_factory: pytest.TempPathFactory, tissue: np.ndarray) -> Path:
    """1,000 x 1,100 px, levels 1 and 4; the tiles at the edges are cut."""
    levels = [tissue, tissue[::4, ::4]]
    return write_jpeg_tiff(tmp_path_factory.mktemp("jpeg") / "jpeg.tif", levels, 0.5)


def both(path: Path, geometry: PatchGeometry = SMALL, **options) -> tuple[SlidePlan, SlidePlan]:
    slow, fast = (
        plan_slide(SlideSource(path), geometry, EmbedOptions(reader=reader, **options))
        for reader in ("openslide", "tiles")
    )
    assert slow.reader.startswith("openslide") and fast.reader.startswith("jpeg-tiles")
    return slow, fast


def read_all(plan: SlidePlan, threads: int = 3) -> PatchBatch:
    return read._join(list(read_patches(plan, batch_size=7, threads=threads)))


GEOMETRIES = {
    "level 0": SMALL,
    "level 1": PatchGeometry(100, 2.0, 30, 40, 5.0, 0.0),
    "centre crop": PatchGeometry(100, 1.0, 0, 40, 1.0, 30.0),
    "between pixels": PatchGeometry(97, 1.3, 11, 45, 1.3 * 97 / 45, 0.0),
    "enlarged": PatchGeometry(64, 0.47, 0, 64, 0.47, 0.0),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("pad_edges", [False, True])
def test_the_same_patches(jpeg_slide, name, pad_edges):
    slow, fast = both(jpeg_slide, GEOMETRIES[name], pad_edges=pad_edges)
    assert slow.level == (GEOMETRIES[name].input_mpp >= 2)
    expected, got = read_all(slow), read_all(fast)
    assert got.rows.tolist() == expected.rows.tolist() == list(range(len(slow.coords)))
    assert (np.asarray(got.pixels) == expected.pixels).all()


def test_a_level_of_uneven_size(tmp_path, tissue):
    """OpenSlide blends its pixels, which `read_region` undoes; tiles have them as they are."""
    picture = tissue[:998, :1098]
    path = write_jpeg_tiff(tmp_path / "uneven.tif", [picture, picture[::4, ::4]], 0.5)
    geometry = GEOMETRIES["level 1"]
    slow, fast = both(path, geometry, pad_edges=True)
    off = np.abs(np.asarray(read_all(fast).pixels).astype(int) - read_all(slow).pixels)
    assert 0 < off.max() <= 3
    with tifffile.TiffFile(path) as file:
        level = file.pages[1].asarray()
    inner = np.flatnonzero((fast.coords < 500).all(axis=1))
    assert len(inner) > 3
    for (x, y), patch in zip(fast.coords[inner], read_all(fast).pixels[inner], strict=True):
        exact = expected_region(level, 4, (x, y), (40, 40), geometry.input_mpp, 0.5)
        assert np.abs(patch - exact).max() <= 1


def test_real_slides(shared_data):
    geometry = PatchGeometry(224, 2.0, 0, 224, 2.0, 0.0)
    for name in ("slides/colon_40x.tif", "organs_20x/bs3_he.tif"):
        slow, fast = both(shared_data / name, geometry)
        assert (read_all(fast).pixels == np.asarray(read_all(slow).pixels)).all()


@pytest.mark.parametrize("kind", ["zeros", "half", "absent"])
def test_damage_costs_what_it_costs_openslide(tmp_path, jpeg_slide, kind):
    change = {
        "zeros": lambda data: bytes(len(data)),
        "half": lambda data: data[: len(data) // 2],
        "absent": lambda data: b"",
    }[kind]
    path = change_tile(jpeg_slide, tmp_path / "bad.tif", 7, change)
    slow, fast = both(path)
    expected, got = read_all(slow), read_all(fast)
    assert got.rows.tolist() == expected.rows.tolist()
    assert (np.asarray(got.pixels) == expected.pixels).all()
    assert [row for row, _ in got.unreadable] == [row for row, _ in expected.unreadable]
    assert bool(got.unreadable) == (kind != "absent")
    if kind == "absent":  # transparent for OpenSlide, white in the patch
        assert (got.pixels == 255).all(axis=(1, 2, 3)).any() or (got.pixels[:, :9] == 255).any()


def test_what_cannot_be_read_by_tiles_is_left_to_openslide(slide):
    """`slide` is a TIFF without compression."""
    auto = plan_slide(SlideSource(slide), SMALL, EmbedOptions())
    assert auto.reader == "openslide-region-lanczos"
    with pytest.raises(TileLayoutError, match=r"tissue: level 0 .*not JPEG.*--reader auto"):
        plan_slide(SlideSource(slide), SMALL, EmbedOptions(reader="tiles"))
    with pytest.raises(EmbedError, match="reader='fast'"):
        EmbedOptions(reader="fast")


def test_without_the_decoder_openslide_reads(jpeg_slide, monkeypatch):
    from xmag_hf.slides import jpeg_tiles

    find = jpeg_tiles.importlib.util.find_spec
    monkeypatch.setattr(
        jpeg_tiles.importlib.util, "find_spec", lambda name: None if name == "simplejpeg" else find
    )
    assert plan_slide(SlideSource(jpeg_slide), SMALL, EmbedOptions()).tiles is None
    with pytest.raises(TileLayoutError, match="simplejpeg is not installed"):
        plan_slide(SlideSource(jpeg_slide), SMALL, EmbedOptions(reader="tiles"))


def test_bags_say_who_read_and_are_the_same(tmp_path, jpeg_slide, encoder):
    sources = [SlideSource(jpeg_slide)]
    bags = {}
    for reader in ("tiles", "openslide"):
        options = EmbedOptions(reader=reader, mpp=1.0)
        summary = embed_slides(sources, tmp_path / reader, encoder, options)
        assert [record.status for record in summary.records] == ["ok"]
        bags[reader] = read_bag(tmp_path / reader / "jpeg.h5")
    assert (bags["tiles"].features == bags["openslide"].features).all()
    assert bags["tiles"].info.reader == "jpeg-tiles-lanczos"
    assert bags["openslide"].info.reader == "openslide-region-lanczos"
    other = EmbedOptions(reader="openslide", mpp=1.0)
    again = embed_slides(sources, tmp_path / "tiles", encoder, other)
    assert [record.status for record in again.records] == ["present"]


def test_resampled_on_the_device(jpeg_slide, monkeypatch):
    """As on a GPU: windows in groups, products, tensors; unreadable ones leave no hole."""
    _, fast = both(jpeg_slide)
    expected = read_all(fast)

    class OnDevice(Resampler):
        def buffer(self, most, shape):
            return np.empty((most, *shape), np.uint8)

        def __call__(self, windows, places):
            import torch

            return self.products(torch.from_numpy(windows), places)

    monkeypatch.setattr(read, "Resampler", OnDevice)
    batches = list(read_patches(fast, batch_size=7, threads=2))
    assert [len(batch.pixels) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    got = np.concatenate([batch.pixels.numpy() for batch in batches])
    assert np.abs(got.astype(int) - expected.pixels).max() <= 1

"""Products on the device: the contract's weights, and Pillow's pixels within one grey level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lanczos_reference import lanczos3
from tiled_tiff import write_tiff

from xmag_hf.embedding.resampling import Resampler, concatenated, lanczos_weights, selected
from xmag_hf.slides import Slide, open_slide
from xmag_hf.slides.windows import AxisWindow, axis_window, fill_from_slide, window_shape


@pytest.fixture(scope="module")
def harsh(tmp_path_factory: pytest.TempPathFactory, cmu_pixels: np.ndarray) -> Path:
    """Tissue, pure noise and black beside white: overshoots that are clipped between the passes."""
    picture = cmu_pixels[200:800, 700:1300].copy()
    picture[:200, :200] = np.random.default_rng(0).integers(0, 2, (200, 200, 1)) * 255
    picture[300:310], picture[310:320] = 0, 255
    folder = tmp_path_factory.mktemp("harsh")
    return write_tiff(folder / "harsh.tif", [picture], mpp=0.5)


def placed(slide: Slide, xy: tuple[float, float], n: int, mpp: float, level_step: float):
    level, across, down = slide.plan_read(xy, n, mpp, allow_coarse=True)
    side, margin = window_shape(level_step, n)
    return level, axis_window(across, side, margin), axis_window(down, side, margin)


# Places (inside, between pixels, across an edge, smaller than the slide's rest) and scales: 4,
# 1.98 as of a 40x slide, 1, and an enlargement by a tenth.
PLACES = [(0.0, 0.0), (101.25, 50.5), (-20.0, 30.0), (470.3, 499.9), (560.0, 570.0)]


def windows_of(path: Path, n: int, step: float):
    """Windows at PLACES, where they lie, and the regions as the slide itself reads them."""
    with open_slide(path) as slide:
        side, _ = window_shape(step, n)
        # What windows do not hold is rubbish that must not be seen.
        windows = np.random.default_rng(1).integers(0, 256, (5, side, side, 3)).astype(np.uint8)
        places = []
        for window, xy in zip(windows, PLACES, strict=True):
            level, across, down = placed(slide, xy, n, 0.5 * step, step)
            fill_from_slide(window, slide, level, across, down)
            places.append((across, down))
        expected = [slide.read_region(xy, n, 0.5 * step, allow_coarse=True) for xy in PLACES]
    return windows, places, expected


@pytest.mark.parametrize("step", [4.0, 1.981, 1.0, 0.91])
def test_as_the_slide_reads_regions(harsh, step):
    n = 32
    resampler = Resampler(torch.device("cpu"), n)
    windows, places, expected = windows_of(harsh, n, step)
    by_pillow = resampler(windows, places)  # on a CPU
    by_products = resampler.products(torch.from_numpy(windows), places).numpy()
    for pixels in (by_pillow, by_products):
        difference = np.abs(np.asarray(pixels).astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize(("first", "last"), [(20.0, 148.0), (20.75, 147.55), (25.0, 55.0)])
def test_weights_are_the_contract_s(harsh, first, last):
    """Against the dense matrix, whose columns come of resampling the unit vectors."""
    with open_slide(harsh) as slide:
        _, across, _ = placed(slide, (first, 0.0), 32, 0.5 * (last - first) / 32, 4.0)
    matrix = lanczos3(np.eye(600), first, last, 32)
    inside = matrix[:, across.start + across.low : across.start + across.high]
    weights = lanczos_weights(across, 32)
    assert np.abs(weights[:, across.low : across.high] - inside).max() < 1e-6
    assert weights[:, : across.low].any() == weights[:, across.high :].any() == False  # noqa: E712


def test_no_windows():
    resampler = Resampler(torch.device("cpu"), 8)
    empty = resampler.products(torch.empty((0, 40, 40, 3), dtype=torch.uint8), [])
    assert empty.shape == (0, 8, 8, 3)
    assert np.asarray(resampler(np.empty((0, 40, 40, 3), np.uint8), [])).shape == (0, 8, 8, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(harsh):
    n, step = 32, 1.981
    resampler = Resampler(torch.device("cuda"), n)
    with open_slide(harsh) as slide:
        places: list[tuple[AxisWindow, AxisWindow]] = []
        level, across, down = placed(slide, (101.25, 50.5), n, 0.5 * step, step)
        windows = resampler.buffer(8, (down.side, across.side, 3))
        for k in range(8):
            fill_from_slide(windows[k], slide, level, across, down)
            places.append((across, down))
        expected = slide.read_region((101.25, 50.5), n, 0.5 * step)
    patches = resampler(windows, places)
    assert isinstance(patches, torch.Tensor) and patches.is_cuda
    windows[...] = 0  # it may be overwritten now
    assert np.abs(patches.cpu().numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("room", [3, 1, 0])
def test_when_the_devices_memory_runs_out_no_patch_is_lost(harsh, monkeypatch, room):
    """`room` windows fit at once; what does not fit even alone is done by the CPU."""
    n, step = 32, 1.981
    resampler = Resampler(torch.device("cpu"), n)
    windows, places, expected = windows_of(harsh, n, step)
    sizes = []

    def at_once(some, where, stream):
        if len(some) > room:
            raise torch.OutOfMemoryError("pretended")
        sizes.append(len(some))
        return resampler.products(torch.from_numpy(some), where)

    monkeypatch.setattr(resampler, "_at_once", at_once)
    patches = resampler._on_device(windows, places, None)
    assert np.abs(np.asarray(patches).astype(int) - expected).max() <= 1
    assert sum(sizes) == (5 if room else 0)
    assert isinstance(patches, torch.Tensor) == bool(room)


def test_another_error_of_the_device_is_not_taken_for_lack_of_memory(monkeypatch):
    resampler = Resampler(torch.device("cpu"), 32)

    def at_once(some, where, stream):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(resampler, "_at_once", at_once)
    with pytest.raises(RuntimeError, match="device-side"):
        resampler._on_device(np.zeros((2, 8, 8, 3), np.uint8), [], None)


def test_patches_on_the_device_and_off_it_are_joined_in_order():
    parts = [np.full((2, 4, 4, 3), 1, np.uint8), torch.full((1, 4, 4, 3), 2, dtype=torch.uint8)]
    joined = concatenated(parts)
    assert isinstance(joined, np.ndarray)
    assert joined[:, 0, 0, 0].tolist() == [1, 1, 2]


def test_patches_are_selected_where_they_lie_or_here():
    pixels = torch.arange(3, dtype=torch.uint8)[:, None].expand(3, 2)
    which = np.array([True, False, True])
    assert selected(pixels, which)[:, 0].tolist() == [0, 2]
    assert isinstance(selected(pixels, which), torch.Tensor)

    class Full(torch.Tensor):
        def __getitem__(self, which):
            raise torch.OutOfMemoryError("pretended")

    here = selected(pixels.as_subclass(Full), which)
    assert isinstance(here, np.ndarray)
    assert here[:, 0].tolist() == [0, 2]

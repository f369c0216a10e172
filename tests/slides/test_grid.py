"""Grid origins: closed form, no drift, edges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from tiled_tiff import write_tiff

from xmag_hf.slides import SlideScaleError, grid_origins, grid_starts, open_slide


@pytest.mark.parametrize("mpp0", ["0.2524", "0.499", "0.5266", "0.2213"])
def test_no_start_is_further_than_half_a_pixel_from_its_place(mpp0):
    """On a slide 200,000 px wide, against exact fractions."""
    scale = Fraction(1, 2) / Fraction(mpp0)
    starts = grid_starts(0, 200_000, 896, 224, float(scale))
    assert starts.dtype == np.int64
    for k, start in enumerate(starts):
        assert abs(int(start) - k * 224 * scale) <= Fraction(1, 2)
    last = starts[-1] + 896 * scale
    assert last <= 200_000 < last + 224 * scale + 1


def test_edges():
    # 0.5 um/px slide, patches of 100 px: the last one that fits ends exactly with the slide.
    assert grid_starts(0, 300, 100, 100, 1.0).tolist() == [0, 100, 200]
    assert grid_starts(0, 299, 100, 100, 1.0).tolist() == [0, 100]
    assert grid_starts(0, 301, 100, 100, 1.0, pad_edges=True).tolist() == [0, 100, 200, 300]
    assert grid_starts(0, 300, 100, 100, 1.0, pad_edges=True).tolist() == [0, 100, 200]
    assert grid_starts(40, 300, 100, 100, 1.0).tolist() == [40, 140]
    assert grid_starts(7, 50, 100, 100, 1.0).tolist() == [7]  # smaller than a patch: one


def test_the_embedded_slide(cmu_slide):
    """2,220 x 2,967 px at 0.499: six columns, ten rows, row by row."""
    with open_slide(cmu_slide) as slide:
        origins = grid_origins(slide, patch_px=896, stride_px=224, mpp=0.5)
        expected = [
            (round(i * 224 * 0.5 / 0.499), round(j * 224 * 0.5 / 0.499))
            for j in range(10)
            for i in range(6)
        ]
        assert origins.tolist() == [list(xy) for xy in expected]
        with pytest.raises(SlideScaleError, match="stride_px=0"):
            grid_origins(slide, patch_px=896, stride_px=0, mpp=0.5)


def test_bounds_move_the_grid(tmp_path):
    path = write_tiff(tmp_path / "a.tif", [np.full((500, 700, 3), 255, np.uint8)], mpp=0.5)
    with open_slide(path) as slide:
        slide.origin_xy, slide.extent_xy = (30, 40), (330, 340)
        origins = grid_origins(slide, patch_px=100, stride_px=100, mpp=0.5)
    assert origins[0].tolist() == [30, 40]
    assert origins[-1].tolist() == [230, 240]
    assert len(origins) == 9

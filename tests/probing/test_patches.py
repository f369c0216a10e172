"""Squares at another scale, against the recipe spelled out step by step."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.patches import scaled_size, scaled_squares


def _noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _mirrored(index: int, length: int) -> int:
    """Index into a line reflected about its first and last pixel, as often as it takes."""
    period = 2 * (length - 1)
    index = index % period
    return index if index < length else period - index


def test_large_image_gives_all_whole_squares_of_a_centred_grid():
    """GlaS at 20x: 775 x 522 px at 0.62 -> 961 x 647 at 0.5 -> 4 x 2 squares."""
    image = _noise(775, 522)
    squares = scaled_squares(image, 0.62, 0.5, max_enlarge=1.25)
    assert squares.shape == (8, 224, 224, 3)
    scaled = np.asarray(image.resize((961, 647), Image.Resampling.LANCZOS))
    left, top = (961 - 4 * 224) // 2, (647 - 2 * 224) // 2
    for number, square in enumerate(squares):
        row, column = divmod(number, 4)
        y, x = top + 224 * row, left + 224 * column
        np.testing.assert_array_equal(square, scaled[y : y + 224, x : x + 224])


def test_small_image_is_padded_by_reflection_with_the_odd_pixel_after():
    """CRCHisto at 5x: 125 px in 224, 49 before and 50 after, every pixel by its mirror index."""
    image = _noise(500, 500)
    (square,) = scaled_squares(image, 0.5, 2.0)
    scaled = np.asarray(image.resize((125, 125), Image.Resampling.LANCZOS))
    source = [_mirrored(i - 49, 125) for i in range(224)]
    np.testing.assert_array_equal(square, scaled[np.ix_(source, source)])


def test_image_smaller_than_half_a_square_is_reflected_repeatedly():
    (square,) = scaled_squares(_noise(30, 224), 2.0, 2.0)
    pixels = np.asarray(_noise(30, 224))
    source = [_mirrored(i - 97, 30) for i in range(224)]
    np.testing.assert_array_equal(square, pixels[:, source])


def test_image_at_its_own_scale_is_not_resampled():
    image = _noise(224, 224)
    np.testing.assert_array_equal(scaled_squares(image, 0.5, 0.5)[0], np.asarray(image))


def test_mixed_axes_pad_one_and_crop_the_other():
    """GlaS at 5x: 240 x 162, so cropped in width and padded in height."""
    image = _noise(775, 522)
    squares = scaled_squares(image, 0.62, 2.0)
    scaled = np.asarray(image.resize((240, 162), Image.Resampling.LANCZOS))
    rows = [_mirrored(i - 31, 162) for i in range(224)]
    np.testing.assert_array_equal(squares, scaled[rows][:, 8:232][None])


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf")])
def test_no_scale_is_refused(mpp):
    with pytest.raises(ProbeError, match=r"slide 7: mpp=.* is no scale.*--data-mpp"):
        scaled_size((10, 10), mpp, 0.5, name="slide 7")


def test_enlarging_needs_permission():
    assert scaled_size((100, 100), 0.55, 0.5) == (110, 110)
    with pytest.raises(ProbeError, match=r"0.62 um/px is coarser.*1.24.*--max-enlarge 1.24"):
        scaled_size((100, 100), 0.62, 0.5)
    assert scaled_size((100, 100), 0.62, 0.5, max_enlarge=1.24) == (124, 124)

"""Grid cells: where they lie, and that each encoder answers for the same tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xmag_hf.encoders import load_encoder
from xmag_hf.probing.dense import cell_boxes, embed_cells
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.images import LabelledImages, open_images
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.patches import scaled_squares


def test_field_of_250_um_holds_the_central_four_cells():
    """CRCHisto: 125 px at 2.0, padded by 49; cells 1 and 2 of each axis begin at 7 and 63."""
    boxes, inside = cell_boxes((500, 500), 0.5)
    expected = [[28, 28, 252, 252], [252, 28, 476, 252], [28, 252, 252, 476], [252, 252, 476, 476]]
    np.testing.assert_allclose(boxes, expected)
    assert np.flatnonzero(inside).tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize("size, mpp", [((896, 896), 0.5), ((2000, 900), 0.5), ((775, 522), 0.62)])
def test_boxes_are_where_the_squares_show_them(size, mpp):
    """Paint each pixel with its position; a cell of a square then tells where it came from."""
    width, height = size
    x = np.broadcast_to(np.arange(width) * 250 // width, (height, width))
    y = np.broadcast_to(np.arange(height)[:, None] * 250 // height, (height, width))
    image = Image.fromarray(np.stack([x, y, x * 0], axis=2).astype(np.uint8))
    squares = scaled_squares(image, mpp, 2.0)
    boxes, inside = cell_boxes(size, mpp)
    assert len(inside) == 16 * len(squares) and inside.sum() == len(boxes) > 0
    cells = squares.reshape(-1, 4, 56, 4, 56, 3).swapaxes(2, 3).reshape(-1, 56, 56, 3)[inside]
    for cell, (left, top, right, bottom) in zip(cells, boxes, strict=True):
        seen = cell[..., :2].mean(axis=(0, 1))
        middle = np.array([(left + right) / 2 / width, (top + bottom) / 2 / height]) * 250
        np.testing.assert_allclose(seen, middle, atol=1.5)  # a cell spans 31 levels or more
        assert min(left, top) >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9


def test_image_smaller_than_a_cell_has_none():
    boxes, inside = cell_boxes((200, 200), 0.5)
    assert len(boxes) == 0 and not inside.any()


@pytest.fixture
def fields(tmp_path: Path, cmu_pixels: np.ndarray) -> LabelledImages:
    """Two fields of real tissue, 500 and 200 px: four cells, and none."""
    (tmp_path / "images").mkdir()
    Image.fromarray(cmu_pixels[600:1100, 600:1100]).save(tmp_path / "images" / "a.png")
    Image.fromarray(cmu_pixels[600:800, 600:800]).save(tmp_path / "images" / "b.png")
    options = ProbeOptions(data=str(tmp_path / "images"), nuclei_csv="unused", data_mpp=0.5)
    return open_images(options)


def test_student_gives_spatial_features_and_teacher_sees_each_cell(fields, tmp_path):
    image = fields.splits["all"].image(0)
    student = load_encoder("random:tiny")
    found, row_image = embed_cells(fields, student, 2.0, cache_dir=tmp_path / "cache")["all"]
    assert row_image.tolist() == [0] * 4
    square = torch.from_numpy(scaled_squares(image, 0.5, 2.0)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (student.mean, student.std))
    with torch.no_grad():
        output = student.model(pixel_values=(square / 255 - mean) / std)
        tokens = output.last_hidden_state[0, 1:].reshape(16, 16, -1)  # the map of tokens
    for number, (row, column) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)]):
        expected = tokens[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean(dim=(0, 1))
        np.testing.assert_allclose(found[number], expected.numpy(), atol=1e-4)

    fine, _ = embed_cells(fields, student, 0.5, cache_dir=tmp_path / "cache")["all"]
    pixels = np.asarray(image)
    for number, (top, left) in enumerate([(28, 28), (28, 252), (252, 28), (252, 252)]):
        crop = pixels[top : top + 224, left : left + 224]
        expected = student(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None])
        np.testing.assert_allclose(fine[number], expected[0].numpy(), atol=1e-4)


def test_other_scales_are_refused(fields, tmp_path):
    encoder = load_encoder("random:tiny")
    for mpp in (1.0, 2.1):
        with pytest.raises(ProbeError, match=rf"at {mpp:g} um/px: the dense probe compares"):
            embed_cells(fields, encoder, mpp, cache_dir=tmp_path)

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from xmag_hf.distillation.augmentation import (
    cell_permutation,
    color_jitter,
    dihedral_view,
    draw_jitter,
    draw_stain,
    enlarged_cells,
    sample_generator,
    stain_jitter,
    sub_patches,
)

T = Image.Transpose
PIL_VIEWS = {
    0: [],
    1: [T.ROTATE_90],
    2: [T.ROTATE_180],
    3: [T.ROTATE_270],
    4: [T.FLIP_LEFT_RIGHT],
    5: [T.FLIP_LEFT_RIGHT, T.ROTATE_90],
    6: [T.FLIP_LEFT_RIGHT, T.ROTATE_180],
    7: [T.FLIP_LEFT_RIGHT, T.ROTATE_270],
}


@pytest.mark.parametrize("view", range(8))
def test_views_are_pils_and_cells_follow(view: int, cmu_pixels: np.ndarray) -> None:
    region = cmu_pixels[500:1396, 300:1196]
    image = Image.fromarray(region)
    for operation in PIL_VIEWS[view]:
        image = image.transpose(operation)
    seen = dihedral_view(region, view)
    assert np.array_equal(seen, np.asarray(image))
    # The cells of the view are the views of the cells, in permuted order.
    expected = [dihedral_view(cell, view) for cell in sub_patches(region)[cell_permutation(view)]]
    assert np.array_equal(sub_patches(seen), np.stack(expected))


def test_the_eight_views_differ() -> None:
    picture = np.arange(16).reshape(4, 4)
    assert len({dihedral_view(picture, view).tobytes() for view in range(8)}) == 8
    with pytest.raises(ValueError, match="view=8"):
        dihedral_view(picture, 8)


def test_sub_patches_are_row_major_crops(cmu_pixels: np.ndarray) -> None:
    region = cmu_pixels[:896, :896]
    for k, patch in enumerate(sub_patches(region)):
        top, left = 224 * (k // 4), 224 * (k % 4)
        assert np.array_equal(patch, region[top : top + 224, left : left + 224])
    with pytest.raises(ValueError, match="894"):
        sub_patches(region[:894, :894])


def test_enlarged_cells_see_their_neighbours(cmu_pixels: np.ndarray) -> None:
    """Pillow's `box` enlarges one cell with what lies around it; a crop would not see that."""
    view = Image.fromarray(cmu_pixels[:224, :224])
    for k, cell in enumerate(enlarged_cells(np.asarray(view))):
        left, top = 56 * (k % 4), 56 * (k // 4)
        box = (left, top, left + 56, top + 56)
        expected = view.resize((224, 224), Image.Resampling.LANCZOS, box=box)
        assert np.array_equal(cell, np.asarray(expected))
        cropped = view.crop(box).resize((224, 224), Image.Resampling.LANCZOS)
        assert not np.array_equal(cell, np.asarray(cropped))


def test_brightness_contrast_saturation_are_torchvisions(cmu_pixels: np.ndarray) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    pixels = torch.from_numpy(cmu_pixels[500:724, 300:524].copy()).permute(2, 0, 1)[None] / 255.0
    b, c, s = 1.05, 0.95, 1.04
    expected = functional.adjust_brightness(pixels, b)
    expected = functional.adjust_contrast(expected, c)
    expected = functional.adjust_saturation(expected, s)
    got = color_jitter(pixels, torch.tensor([[b, c, s, 0.0]]))
    assert (got - expected).abs().max() < 1e-3  # torchvision's luma weights are rounded


def test_hue_is_a_rotation_in_yiq() -> None:
    rgb, turns = (0.6, 0.4, 0.55), 0.05
    y, i, q = colorsys.rgb_to_yiq(*rgb)
    rotated = complex(i, q) * np.exp(2j * np.pi * turns)
    expected = colorsys.yiq_to_rgb(y, rotated.real, rotated.imag)
    pixel = torch.tensor(rgb).reshape(1, 3, 1, 1)
    got = color_jitter(pixel, torch.tensor([[1.0, 1.0, 1.0, turns]])).flatten()
    assert got.numpy() == pytest.approx(expected, abs=6e-3)  # colorsys rounds its matrix


def test_stain_jitter_changes_known_amounts_of_stain() -> None:
    """Light through 0.4 of haematoxylin, 0.3 of eosin, 0.1 of the third (Beer and Lambert)."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.sqrt((stains**2).sum(1, keepdims=True))
    amounts, scales, shifts = np.array([[0.4, 0.3, 0.1], [1.1, 0.8, 1.05], [0.05, -0.02, 0.1]])
    pixel = torch.tensor(np.exp(-amounts @ stains)).reshape(1, 3, 1, 1)
    got = stain_jitter(pixel, torch.tensor([[*scales, *shifts]])).flatten().numpy()
    assert got == pytest.approx(np.exp(-(amounts * scales + shifts) @ stains), rel=1e-6)
    unchanged = stain_jitter(pixel, torch.tensor([[1.0, 1, 1, 0, 0, 0]]))
    assert unchanged.flatten().numpy() == pytest.approx(pixel.flatten().numpy(), rel=1e-6)
    white = stain_jitter(torch.ones(1, 3, 1, 1), torch.tensor([[1.0, 1, 1, -0.1, -0.1, -0.1]]))
    assert torch.equal(white, torch.ones(1, 3, 1, 1))  # no lighter than light
    assert (
        stain_jitter(torch.zeros(1, 3, 1, 1), torch.tensor([[1.0] * 3 + [0.1] * 3]))
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("kind", ["colour", "stain"])
def test_both_magnifications_get_one_draw(cmu_pixels: np.ndarray, kind: str) -> None:
    """Jittered sub-patches, put together, are the jittered region."""
    if kind == "stain":
        factors = torch.from_numpy(draw_stain(sample_generator(0, 0, 7), 0.2))[None]
        assert (factors[0, :3] - 1).abs().max() <= 0.2 and factors[0, 3:].abs().max() <= 0.2
        _assert_one_picture(cmu_pixels, lambda images: stain_jitter(images, factors))
        return
    jitter = torch.from_numpy(draw_jitter(sample_generator(0, 0, 7)))[None]
    assert jitter[0, :3].min() >= 0.95 and jitter[0, :3].max() <= 1.05 and abs(jitter[0, 3]) <= 0.05
    _assert_one_picture(cmu_pixels, lambda images: color_jitter(images, jitter))


def _assert_one_picture(cmu_pixels: np.ndarray, change: Callable[[Tensor], Tensor]) -> None:
    region = torch.from_numpy(cmu_pixels[500:1396, 300:1196].copy()).permute(2, 0, 1)[None] / 255.0
    cells = torch.from_numpy(sub_patches(region[0].permute(1, 2, 0).numpy()).copy())
    cells = change(cells.permute(0, 3, 1, 2)[None])[0]
    whole = change(region)[0].permute(1, 2, 0).numpy()
    expected = sub_patches(whole)
    assert np.abs(cells.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5


def test_draws_depend_on_seed_epoch_and_row_alone() -> None:
    def draw(*key: int) -> list[float]:
        return draw_jitter(sample_generator(*key)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4

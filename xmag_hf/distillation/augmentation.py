"""Augmentation that is the same for both magnifications: dihedral views, colour and stain jitter.

The eight views of the square are numbered 0 to 7: view g is g % 4 quarter turns anticlockwise,
after a left-right flip if g >= 4. A view of the region permutes its sixteen cells.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

VIEW_PX = 224
GRID = 4  # a 5x patch covers 4 x 4 sub-patches at 20x
N_VIEWS = 8
JITTER = 0.05  # brightness, contrast, saturation in [0.95, 1.05]; hue in [-0.05, 0.05] turns

# NTSC's RGB -> YIQ: hue is an angle in the I-Q plane, so a shift of hue is a rotation there.
_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]],
    dtype=torch.float64,
)
_LUMA = (0.299, 0.587, 0.114)
# Optical density in R, G, B of haematoxylin, eosin and the residual (DAB): Ruifrok and Johnston
# 2001, Anal Quant Cytol Histol 23:291, scaled to length 1 as they do.
_STAINS = torch.nn.functional.normalize(
    torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float64),
    dim=1,
)
DARKEST = 1 / 255  # black has no finite optical density


def dihedral_view(image: np.ndarray, view: int) -> np.ndarray:
    """One of the eight views of a square array.

    Args:
        image: (S, S, ...), rows first.
        view: 0 to 7; 0 is the image itself.

    Returns:
        (S, S, ...), a strided view of the same memory.

    Raises:
        ValueError: `view` is not in 0 to 7.
    """
    if not 0 <= view < N_VIEWS:
        raise ValueError(f"view={view}: must be 0 to 7.")
    if view >= 4:
        image = image[:, ::-1]
    return np.rot90(image, view % 4, axes=(0, 1))


def cell_permutation(view: int, grid: int = GRID) -> np.ndarray:
    """Where the cells of a region come from after `dihedral_view`.

    Args:
        view: 0 to 7.
        grid: Cells per side.

    Returns:
        (grid * grid,) int64: cell k (row-major) of the view shows cell `result[k]` of the
        original, so teacher features of the view are `features[result]`.
    """
    cells = np.arange(grid * grid).reshape(grid, grid)
    return np.ascontiguousarray(dihedral_view(cells, view)).ravel()


def sub_patches(region: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Cut a region into its sub-patches.

    Args:
        region: (S, S, C), S a multiple of `grid`.
        grid: Sub-patches per side.

    Returns:
        (grid * grid, S / grid, S / grid, C), row-major.

    Raises:
        ValueError: The region is not square or `grid` does not divide it.
    """
    side, width, channels = region.shape
    if side != width or side % grid:
        raise ValueError(f"region of {side} x {width} px: must be square, a multiple of {grid} px.")
    s = side // grid
    cells = region.reshape(grid, s, grid, s, channels).swapaxes(1, 2)  # (grid, grid, s, s, C)
    return cells.reshape(grid * grid, s, s, channels)


def enlarged_cells(view: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Cut a 5x view into cells as large as sub-patches, without their detail.

    The whole view is enlarged by Lanczos before it is cut, so that the borders of a cell see its
    neighbours.

    Args:
        view: (S, S, 3) uint8.
        grid: Cells per side, and the factor of the enlargement.

    Returns:
        (grid * grid, S, S, 3) uint8, row-major: the tissue of `sub_patches` of the region.
    """
    size = (view.shape[1] * grid, view.shape[0] * grid)
    image = Image.fromarray(np.ascontiguousarray(view))
    return sub_patches(np.asarray(image.resize(size, Image.Resampling.LANCZOS)), grid)


def zoomed_view(wide: np.ndarray, zoom: float) -> np.ndarray:
    """The 5x view of a pair at another um/px, with the same centre.

    Args:
        wide: (S, S, 3) uint8, `image_5x_wide`: its side says what it shows. With f the share
            (S - 224) / (S + 224) it has 2.0 * (1 - f) um/px and holds views up to 2.0 * (1 + f).
        zoom: um/px wanted, in units of 2.0.

    Returns:
        (224, 224, 3) uint8, reduced by Lanczos.

    Raises:
        ValueError: The wide view holds no such view; the zooms that it holds are named.
    """
    side = len(wide)
    share = (side - VIEW_PX) / (side + VIEW_PX)
    if not abs(zoom - 1) <= share + 1e-6:
        raise ValueError(f"zoom={zoom:.3f}: {side} px hold {1 - share:.3f} to {1 + share:.3f}.")
    edge = max(0.0, (side - VIEW_PX * zoom / (1 - share)) / 2)
    image = Image.fromarray(np.ascontiguousarray(wide))
    box = (edge, edge, side - edge, side - edge)
    return np.asarray(image.resize((VIEW_PX, VIEW_PX), Image.Resampling.LANCZOS, box))


def shares_shown(zoom: Tensor, grid: int = GRID) -> Tensor:
    """How much of each sub-patch a view at another um/px shows.

    Args:
        zoom: (B,) um/px of the view, in units of the pair's own.
        grid: Sub-patches per side.

    Returns:
        (B, grid * grid) in [0, 1], row-major: 1 where the whole sub-patch lies in the view.
    """
    half = grid / 2 * zoom[:, None]  # half the view's side, in sub-patches
    left = torch.arange(grid, dtype=zoom.dtype, device=zoom.device) - grid / 2
    shown = (torch.minimum(left + 1, half) - torch.maximum(left, -half)).clamp(min=0)  # (B, grid)
    return (shown[:, :, None] * shown[:, None, :]).flatten(1)


def sample_generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The random source of one pair in one epoch, whichever process or worker loads it."""
    return np.random.default_rng((seed, epoch, row))


def draw_jitter(generator: np.random.Generator) -> np.ndarray:
    """Draw (brightness, contrast, saturation, hue); (4,) float32, hue in turns."""
    factors = generator.uniform(1 - JITTER, 1 + JITTER, size=3)
    return np.array([*factors, generator.uniform(-JITTER, JITTER)], dtype=np.float32)


def draw_stain(generator: np.random.Generator, strength: float) -> np.ndarray:
    """Draw three scales in [1 - strength, 1 + strength], three shifts in [-strength, strength].

    Args:
        generator: Of the pair.
        strength: 0.05 is Tellez et al.'s light, 0.2 their strong augmentation.

    Returns:
        (6,) float32: scales, then shifts, of haematoxylin, eosin and residual.
    """
    scales = generator.uniform(1 - strength, 1 + strength, size=3)
    return np.array([*scales, *generator.uniform(-strength, strength, size=3)], dtype=np.float32)


def stain_jitter(images: Tensor, stain: Tensor) -> Tensor:
    """Scale and shift the three stains of the optical density, one draw per pair.

    Tellez et al. 2019 (doi:10.1016/j.media.2019.101544), Sec. 3, HED: c' = scale * c + shift with
    -ln(rgb) = c @ stains. Natural logarithm; shifts are thus in units of optical density.

    Args:
        images: (B, 3, H, W), or (B, n, 3, H, W) for the sub-patches of a pair; float in [0, 1].
        stain: (B, 6), from `draw_stain`.

    Returns:
        Same shape and dtype, clipped to [0, 1].
    """
    pixels = images if images.dim() == 5 else images[:, None]  # (B, n, 3, H, W)
    stains = _STAINS.to(pixels)
    scale, shift = stain.to(pixels).split(3, dim=1)  # (B, 3) each
    matrices = stains.inverse() @ (scale[:, :, None] * stains)  # (B, 3, 3), density to density
    density = -pixels.clamp(min=DARKEST).log()
    density = torch.einsum("bnihw,bij->bnjhw", density, matrices)
    density = density + (shift @ stains)[:, None, :, None, None]
    return (-density).exp().clamp(0, 1).reshape(images.shape)


def color_jitter(images: Tensor, jitter: Tensor) -> Tensor:
    """Brightness, contrast, saturation, then hue, one draw per pair.

    The first three are the blends of torchvision's `adjust_*`; hue is a rotation in YIQ, which
    keeps luma where an HSV shift does not. Contrast pulls towards the mean luma of the pair's own
    pixels, sub-patches taken together, so that the sixteen stay one picture.

    Args:
        images: (B, 3, H, W), or (B, n, 3, H, W) for the sub-patches of a pair; float in [0, 1].
        jitter: (B, 4), from `draw_jitter`.

    Returns:
        Same shape and dtype, clipped to [0, 1].
    """
    pixels = images if images.dim() == 5 else images[:, None]  # (B, n, 3, H, W)
    jitter = jitter.to(pixels)
    brightness, contrast, saturation = (jitter[:, i, None, None, None, None] for i in range(3))
    pixels = (pixels * brightness).clamp(0, 1)
    mean_luma = _luma(pixels).mean(dim=(1, 2, 3, 4), keepdim=True)  # (B, 1, 1, 1, 1)
    pixels = (contrast * pixels + (1 - contrast) * mean_luma).clamp(0, 1)
    pixels = (saturation * pixels + (1 - saturation) * _luma(pixels)).clamp(0, 1)
    matrices = _hue_matrices(jitter[:, 3])
    pixels = torch.einsum("bij,bnjhw->bnihw", matrices, pixels).clamp(0, 1)
    return pixels.reshape(images.shape)


def _luma(pixels: Tensor) -> Tensor:
    weights = pixels.new_tensor(_LUMA)[:, None, None]
    return (pixels * weights).sum(dim=-3, keepdim=True)


def _hue_matrices(turns: Tensor) -> Tensor:
    """(B,) turns of the I-Q plane -> (B, 3, 3), RGB to RGB."""
    angle = 2 * torch.pi * turns
    rotation = torch.eye(3, dtype=turns.dtype, device=turns.device).repeat(len(turns), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    return _YIQ.inverse().to(rotation) @ rotation @ _YIQ.to(rotation)

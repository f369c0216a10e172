"""From an image at its own scale to the squares that an encoder takes: one recipe for 20x and 5x.

Imports NumPy and Pillow only.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .errors import ProbeError

# Named in the cache's key and in results.json: a change here makes other features.
RECIPE = "lanczos, reflected to a square's side, whole squares of a centred grid"
MAX_ENLARGE = 1.1  # the data's um/px over the target's, as for slides


def scaled_squares(
    image: Image.Image,
    mpp: float,
    target_mpp: float,
    side_px: int = 224,
    *,
    name: str = "image",
    max_enlarge: float = MAX_ENLARGE,
) -> np.ndarray:
    """Cut an image into squares at another scale.

    PIL's Lanczos to `scaled_size`, reflection padding to at least `side_px` (half on each side,
    the odd pixel after), then all whole squares of a centred grid, row-major. A strip narrower
    than a square at the border is left out.

    Args:
        image: RGB.
        mpp: Its um/px.
        target_mpp: um/px of the squares.
        side_px: Side of a square.
        name: Of the image, for the error.
        max_enlarge: Largest `mpp / target_mpp` that is not refused.

    Returns:
        (n, side_px, side_px, 3) uint8, n >= 1.

    Raises:
        ProbeError: `mpp` is no positive number, or coarser than `target_mpp` by more than
            `max_enlarge` allows.
    """
    size = scaled_size(image.size, mpp, target_mpp, name=name, max_enlarge=max_enlarge)
    padded, _ = padded_image(image, size, side_px)
    height, width = padded.shape[:2]
    rows, columns = height // side_px, width // side_px
    top, left = (height - rows * side_px) // 2, (width - columns * side_px) // 2
    grid = padded[top : top + rows * side_px, left : left + columns * side_px]
    grid = grid.reshape(rows, side_px, columns, side_px, 3)
    return np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(-1, side_px, side_px, 3)


def padded_image(
    image: Image.Image, size: tuple[int, int], side_px: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resample an image and pad it by reflection to at least `side_px` a side.

    An image much smaller than a square is reflected as often as it takes.

    Args:
        image: RGB.
        size: (width, height) of `scaled_size`.
        side_px: Least height and width.

    Returns:
        (H, W, 3) uint8, and (top, left), the padding before the image's own pixels.
    """
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = size
    top, left = max(0, side_px - height) // 2, max(0, side_px - width) // 2
    bottom, right = max(0, side_px - height) - top, max(0, side_px - width) - left
    pixels = np.asarray(image)
    if top or bottom or left or right:
        pixels = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="reflect")
    return pixels, (top, left)


def scaled_size(
    size: tuple[int, int],
    mpp: float,
    target_mpp: float,
    *,
    name: str = "image",
    max_enlarge: float = MAX_ENLARGE,
) -> tuple[int, int]:
    """Width and height in px after resampling, each rounded.

    Args:
        size: (width, height) of the image, px.
        mpp: Its um/px.
        target_mpp: um/px wanted.
        name: Of the image, for the error.
        max_enlarge: Largest `mpp / target_mpp` that is not refused.

    Returns:
        (width, height), each at least 1.

    Raises:
        ProbeError: See `scaled_squares`.
    """
    if not (np.isfinite(mpp) and mpp > 0):
        raise ProbeError(
            f"{name}: mpp={mpp} is no scale; give um/px above 0 in --data-mpp or a column mpp."
        )
    scale = mpp / target_mpp
    if scale > max_enlarge * (1 + 1e-9):
        raise ProbeError(
            f"{name}: {mpp:g} um/px is coarser than the {target_mpp:g} um/px wanted by a factor of "
            f"{scale:.3g}, above {max_enlarge:g}. Enlarging adds no detail: probe at a coarser "
            f"--mpp, or allow it with --max-enlarge {np.ceil(scale * 100) / 100:g}."
        )
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

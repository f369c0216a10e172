"""Pictures: colours and markers that can be told apart, PNG files, confusion matrices.

Drawn on Agg canvases of their own, without pyplot, so nothing global is set or left open.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from xmag_hf.atomic_write import write_atomically

from .errors import ReportError

# Okabe & Ito, "Color Universal Design" (jfly.uni-koeln.de/color), the strongest contrasts first.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
# One for each colour, so that no two neighbours in a legend differ by colour alone.
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
DPI = 150


def draw_confusion(
    labels: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
    path: Path,
    *,
    title: str,
    about: dict[str, str] | None = None,
) -> None:
    """Draw a confusion matrix: counts, on the share of each true class.

    Args:
        labels: (n,) ints.
        predicted: (n,) ints.
        classes: Names of all classes.
        path: PNG, written under a temporary name first.
        title: Above the matrix.
        about: Goes into the PNG's text chunks.

    Raises:
        ReportError: Lengths differ, or a label that `classes` does not name.
    """
    counts = confusion(labels, predicted, len(classes))
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    side = max(3.6, 0.46 * len(classes) + 1.2)
    # Cells are square: a constrained layout left "true" outside the picture with short names.
    figure = Figure((side + 2.6, side + 1.4), layout="compressed", dpi=DPI)
    axis = figure.subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap=_blues())
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            colour = "white" if share[row, column] > 0.55 else "black"
            axis.text(
                column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour,
                fontsize=9 if len(classes) <= 10 else 6.5,
            )  # fmt: skip
    ticks = np.arange(len(classes))
    axis.set_xticks(ticks, labels=list(classes), rotation=45, ha="right", rotation_mode="anchor")
    names = [f"{name} (n = {n:,})" for name, n in zip(classes, totals[:, 0], strict=True)]
    axis.set_yticks(ticks, labels=names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the true class")
    save_picture(figure, path, about)


def confusion(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) int64 counts, true classes down, predicted classes across."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.shape != predicted.shape or labels.ndim != 1 or not len(labels):
        raise ReportError(f"confusion: {labels.shape} labels, {predicted.shape} predictions.")
    both = np.concatenate([labels, predicted])
    if both.min() < 0 or both.max() >= n_classes:
        raise ReportError(f"confusion: labels {both.min()} to {both.max()}, {n_classes} classes.")
    return np.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(
        n_classes, n_classes
    )


def save_picture(figure: Figure, path: Path, about: dict[str, str] | None = None) -> None:
    """Write `png` of a figure, whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    write_atomically(path, png(figure, about))


def png(figure: Figure, about: dict[str, str] | None = None, compression: int = 6) -> bytes:
    """A figure as a PNG file, at its own dpi.

    Args:
        figure: Without a canvas.
        about: Goes into the PNG's text chunks.
        compression: zlib's level, 0 to 9.

    Returns:
        The file.
    """
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    settings = {"compress_level": compression}
    figure.savefig(buffer, format="png", metadata=about, pil_kwargs=settings)
    return buffer.getvalue()


def _blues() -> ListedColormap:
    """White to Okabe-Ito blue, so that small shares stay near white and black text is read."""
    ramp = np.linspace(0, 1, 256)[:, None]
    end = np.array([0x00, 0x45, 0x7A]) / 255
    return ListedColormap((1 - ramp) * np.ones(3) + ramp * end)

"""Pictures: embeddings in two dimensions, coloured by class, and confusion matrices.

Drawn on Agg canvases of their own, without pyplot, so nothing global is set or left open.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .errors import ProbeError

# Okabe & Ito, "Color Universal Design" (jfly.uni-koeln.de/color), the strongest contrasts first.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
# A class beyond the eighth takes a colour again with the next marker; each class of the first
# eight has its own marker too, so that no two neighbours in the legend differ by colour alone.
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
PCA_COLUMNS = 50
_PANEL_INCHES = 4.6
_PANELS_PER_ROW = 3


@dataclass(frozen=True)
class PictureOptions:
    """Options of the t-SNE picture."""

    per_class: int = field(
        default=500, metadata={"help": "images drawn per class at most, seeded; 0: all"}
    )
    perplexity: float = field(
        default=30.0, metadata={"help": "of t-SNE: about how many neighbours an image has"}
    )
    metric: str = field(
        default="cosine",
        metadata={
            "help": "distance between embeddings: cosine (lengths set to 1) or euclidean "
            "(columns standardised)",
            "choices": ("cosine", "euclidean"),
        },
    )
    split: str | None = field(
        default=None,
        metadata={"help": "whose images are drawn; none: test if there is one, or all"},
    )

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.per_class < 0 or self.perplexity <= 0:
            raise ProbeError(
                f"--per-class={self.per_class}, --perplexity={self.perplexity}: at least 0, and "
                "above 0."
            )


@dataclass(frozen=True)
class Panel:
    """One encoder's picture: its title (encoder and um/px) and (n, 2) positions."""

    title: str
    points: np.ndarray


def per_class_rows(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of at most `per_class` images of each class, drawn with `seed`, ascending; 0: all."""
    if per_class == 0:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    groups = (rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels))
    return np.sort(np.concatenate([rows[:per_class] for rows in groups]))


def tsne(
    x: np.ndarray, *, metric: str = "cosine", perplexity: float = 30.0, seed: int = 0
) -> np.ndarray:
    """Two dimensions by PCA to 50 columns and t-SNE (van der Maaten & Hinton 2008).

    Cosine: rows are scaled to length 1 before PCA, where squared Euclidean distance is twice the
    cosine distance. Euclidean: columns are standardised before PCA.

    Args:
        x: (n, D) float, n >= 4.
        metric: "cosine" or "euclidean".
        perplexity: Below n.
        seed: Of PCA and t-SNE; positions repeat on one machine, clusters elsewhere too.

    Returns:
        (n, 2) float32.

    Raises:
        ProbeError: NaN, too few rows, another metric, or all rows alike.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if x.ndim != 2 or not np.isfinite(x).all():
        raise ProbeError(f"features {x.shape}: give (n, D) without NaN; embed again in fp32.")
    if len(x) < 4 or not 0 < perplexity < len(x):
        raise ProbeError(
            f"t-SNE of {len(x)} images with perplexity {perplexity:g}: give at least four images "
            "and a --perplexity below their number."
        )
    if metric not in ("cosine", "euclidean"):
        raise ProbeError(f"--metric={metric}: choose cosine or euclidean.")
    if metric == "cosine":
        length = np.linalg.norm(x, axis=1, keepdims=True)
        near = x / np.maximum(length, np.finfo(x.dtype).tiny)
    else:
        spread = x.std(axis=0)
        near = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)
    if np.ptp(near, axis=0).max() == 0:
        raise ProbeError("t-SNE: all embeddings are the same; look at the encoder.")
    columns = min(PCA_COLUMNS, *near.shape)
    reduced = PCA(columns, random_state=seed).fit_transform(near)
    # PCA's columns are tiny for unit rows; t-SNE's start is scaled by scikit-learn itself.
    model = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return model.fit_transform(reduced).astype(np.float32)


def draw_embeddings(
    panels: Sequence[Panel],
    labels: np.ndarray,
    classes: Sequence[str],
    path: Path,
    *,
    title: str,
    about: dict[str, str] | None = None,
) -> None:
    """Draw encoders side by side, coloured by class, with one legend outside.

    Args:
        panels: Each with the n points of `labels`.
        labels: (n,) ints.
        classes: Names; those without an image get no line in the legend.
        path: PNG, written under a temporary name first.
        title: Above all panels.
        about: Goes into the PNG's text chunks.

    Raises:
        ProbeError: Panels and labels of different lengths.
    """
    for panel in panels:
        if panel.points.shape != (len(labels), 2):
            raise ProbeError(f"{panel.title}: {panel.points.shape} points, {len(labels)} labels.")
    columns = 2 if len(panels) == 4 else min(len(panels), _PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(
        (_PANEL_INCHES * columns + 2.6, _PANEL_INCHES * rows + 0.9), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    # Classes are drawn interleaved: drawn one after the other, the last would cover the others.
    order = np.random.default_rng(0).permutation(len(labels))
    size = float(np.clip(20000 / max(len(labels), 1), 9, 32))
    for axis, panel in zip(axes, panels, strict=False):
        _scatter(axis, panel.points[order], labels[order], size)
        axis.set_title(panel.title, fontsize=11)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    present, counts = np.unique(labels, return_counts=True)
    handles = [
        _legend_mark(label, f"{classes[label]} (n = {count:,})")
        for label, count in zip(present, counts, strict=True)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=12)
    _save(figure, path, about)


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
        ProbeError: Lengths differ, or a label that `classes` does not name.
    """
    counts = confusion(labels, predicted, len(classes))
    totals = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    side = max(3.6, 0.46 * len(classes) + 1.2)
    figure = Figure((side + 2.6, side + 1.4), layout="constrained")
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
    _save(figure, path, about)


def confusion(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) int64 counts, true classes down, predicted classes across."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.shape != predicted.shape or labels.ndim != 1 or not len(labels):
        raise ProbeError(f"confusion: {labels.shape} labels, {predicted.shape} predictions.")
    both = np.concatenate([labels, predicted])
    if both.min() < 0 or both.max() >= n_classes:
        raise ProbeError(f"confusion: labels {both.min()} to {both.max()}, {n_classes} classes.")
    return np.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(
        n_classes, n_classes
    )


def read_class_predictions(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read what `xmag probe` wrote: a CSV of id, group, label, r0:p:<class>, ...

    Args:
        path: The CSV.

    Returns:
        (n,) labels, (R, n, C) probabilities, and C class names.

    Raises:
        ProbeError: Unreadable, not such a file, a label that no column names, or no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProbeError(f"{path}: cannot be read as CSV: {error}.") from error
    header = rows[0] if rows else []
    columns = [name.split(":p:", 1) for name in header[3:] if ":p:" in name]
    classes = tuple(name for repeat, name in columns if repeat == "r0")
    repeats = len({repeat for repeat, _ in columns})
    expected = [[f"r{r}", name] for r in range(repeats) for name in classes]
    if header[:3] != ["id", "group", "label"] or not classes or columns != expected:
        raise ProbeError(
            f"{path}: no class predictions of `xmag probe` (columns id, group, label, "
            "r0:p:CLASS, ...); it has " + ", ".join(header[:4]) + "."
        )
    if len(rows) < 2:
        raise ProbeError(f"{path}: a header without rows; run the probe again.")
    try:
        labels = np.array([classes.index(row[2]) for row in rows[1:]])
        values = np.array([[float(value) for value in row[3:]] for row in rows[1:]])
        values = values.reshape(len(labels), repeats, len(classes))
    except (ValueError, IndexError) as error:
        raise ProbeError(f"{path}: a damaged row ({error}); run the probe again.") from error
    return labels, values.transpose(1, 0, 2), classes


def _scatter(axis: Any, points: np.ndarray, labels: np.ndarray, size: float) -> None:
    """One call per slice of points and class, so that classes stay interleaved."""
    slices = np.array_split(np.arange(len(labels)), min(20, max(1, len(labels) // 50)))
    for part in slices:
        for label in np.unique(labels[part]):
            own = part[labels[part] == label]
            colour, marker = _style(int(label))
            axis.scatter(
                points[own, 0], points[own, 1], s=size, c=colour, marker=marker, alpha=0.85,
                linewidths=0.2, edgecolors="black",
            )  # fmt: skip
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_aspect("equal", adjustable="datalim")


def _style(label: int) -> tuple[str, str]:
    """Colour and marker; unique up to 64 classes."""
    colour = label % len(COLOURS)
    return COLOURS[colour], MARKERS[(colour + label // len(COLOURS)) % len(MARKERS)]


def _legend_mark(label: int, text: str) -> Line2D:
    colour, marker = _style(label)
    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=7, label=text)


def _blues() -> ListedColormap:
    """White to Okabe-Ito blue, so that small shares stay near white and black text is read."""
    ramp = np.linspace(0, 1, 256)[:, None]
    end = np.array([0x00, 0x45, 0x7A]) / 255
    return ListedColormap((1 - ramp) * np.ones(3) + ramp * end)


def _save(figure: Figure, path: Path, about: dict[str, str] | None) -> None:
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=150, metadata=about)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)

"""Pictures: embeddings in two dimensions, coloured by class.

Drawn on Agg canvases of their own, without pyplot, so nothing global is set or left open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from xmag_hf.reporting.pictures import COLOURS, DPI, MARKERS, save_picture

from .errors import ProbeError

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
        (_PANEL_INCHES * columns + 2.6, _PANEL_INCHES * rows + 0.9), layout="constrained", dpi=DPI
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
    save_picture(figure, path, about)


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
    """Colour and marker; unique up to 64 classes.

    A class beyond the eighth takes a colour again with the next marker.
    """
    colour = label % len(COLOURS)
    return COLOURS[colour], MARKERS[(colour + label // len(COLOURS)) % len(MARKERS)]


def _legend_mark(label: int, text: str) -> Line2D:
    colour, marker = _style(label)
    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=7, label=text)

"""Pictures of a study: ROC curves of every fold and of all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from xmag_hf.evaluation import roc_auc
from xmag_hf.reporting.pictures import COLOURS, save_picture

from .predictions import CohortPredictions

_PANEL_INCHES = 4.6
_PANELS_PER_ROW = 3


def draw_roc(
    cohorts: Mapping[str, CohortPredictions], classes: Sequence[str], path: Path, *, title: str
) -> None:
    """ROC curves, one panel for a cohort and class against the rest; binary: the second class.

    Thin: each fold's head on what it was tested on. Thick: pooled as `predictions` says.

    Args:
        cohorts: By name.
        classes: Names.
        path: PNG, written under a temporary name first.
        title: Above all panels.
    """
    positives = [1] if len(classes) == 2 else list(range(len(classes)))
    panels = [(name, c) for name in cohorts for c in positives]
    columns = min(len(panels), _PANELS_PER_ROW if len(classes) == 2 else len(positives))
    rows = -(-len(panels) // columns)
    size = (_PANEL_INCHES * columns + 0.2, _PANEL_INCHES * rows + 0.5)
    figure = Figure(size, layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, positive) in zip(axes, panels, strict=False):
        _panel(axis, cohorts[name], positive)
        found = int((cohorts[name].labels == positive).sum())
        others = len(cohorts[name].labels) - found
        # In words: "15 of 34" beside an AUC was taken for slides answered rightly.
        axis.set_title(
            f"{name}: {classes[positive]} ({_slides(found)}) against the rest ({_slides(others)})",
            fontsize=9,
        )
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    save_picture(figure, path)


def _slides(count: int) -> str:
    return f"{count:,} slide{'s' * (count != 1)}"


def _panel(axis: Any, cohort: CohortPredictions, positive: int) -> None:
    truth = cohort.labels == positive
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
    axis.set_aspect("equal")
    axis.set_xlabel("false positive rate")
    axis.set_ylabel("true positive rate")
    axis.tick_params(labelsize=8)
    for number, fold in enumerate(cohort.folds):
        own, scores = truth[fold.rows], fold.probabilities[:, positive]
        if own.all() or not own.any():
            continue
        x, y, _ = roc_curve(own, scores, drop_intermediate=False)
        area = roc_auc(own.astype(np.int64), scores)
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(x, y, color=colour, linewidth=0.9, alpha=0.8,
                  label=f"fold {fold.fold}: {area:.3f}")  # fmt: skip
    if truth.all() or not truth.any():
        axis.text(0.5, 0.5, "one class only: no curve", ha="center")
        return
    scores = cohort.probabilities[:, positive]
    x, y, _ = roc_curve(truth, scores, drop_intermediate=False)
    area = roc_auc(truth.astype(np.int64), scores)
    axis.plot(x, y, color="black", linewidth=2.2, label=f"all folds: {area:.3f}")
    axis.legend(loc="lower right", fontsize=8, frameon=False, title="AUC", title_fontsize=8)

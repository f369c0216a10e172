"""A finished comparison as tables, JSON, and a picture with whiskers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from xmag_hf._version import __version__
from xmag_hf.atomic_write import write_atomically
from xmag_hf.reporting.pictures import COLOURS, DPI, MARKERS, png
from xmag_hf.reporting.records import plain
from xmag_hf.reporting.tables import Sheet, as_markdown

from .compare import (
    ACCURACY,
    AUC,
    MACRO_F1,
    METRICS,
    CohortFacts,
    CompareResult,
    StudyScore,
    StudyTest,
    drawn_of,
)
from .presets import PAPER_SOURCE, load_preset

FORMAT, FORMAT_VERSION = "xmag-comparison", 1
RESULTS, TABLE, PICTURE = "comparison.json", "comparison.md", "comparison.png"
DRAWN = (AUC, ACCURACY, MACRO_F1)
# Brackets for every pair are read with up to three models; more are in the table.
MOST_BRACKETS = 3
MAJORITY = "always the commonest class"


def write_comparison(result: CompareResult, paths: Sequence[Path], out: Path) -> list[Path]:
    """Write comparison.json, comparison.md and comparison.png into a folder.

    Args:
        result: What is written.
        paths: Of the studies; their names go into the JSON, their folders do not.
        out: Made if need be.

    Returns:
        The files; the JSON is written last.

    Raises:
        OSError: `out` cannot be written.
    """
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, "xmag_hf": __version__}
    record |= {"inputs": [path.resolve().name for path in paths]} | plain(result)
    contents = {
        TABLE: comparison_markdown(result),
        PICTURE: draw_comparison(result),
        RESULTS: json.dumps(record, indent=2, allow_nan=False),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(out / name, content)
    return [out / name for name in contents]


def comparison_sheets(result: CompareResult) -> list[Sheet]:
    """Scores and tests of each cohort, and the paper's values where a preset is named."""
    sheets = []
    for cohort in result.cohorts:
        sheets.append(_scores(result, cohort))
        if result.tests:
            sheets.append(_tests(result, cohort))
    if result.options.preset is not None:
        sheets.append(_paper(result))
    return sheets


def comparison_markdown(result: CompareResult) -> str:
    """The tables and remarks."""
    return as_markdown(comparison_sheets(result), result.remarks)


def _scores(result: CompareResult, cohort: CohortFacts) -> Sheet:
    lines = []
    for study in result.studies:
        own = _of(result, cohort.name, study)
        lines.append([study, *(_estimate(own[metric]) for metric in METRICS)])
        if max(score.folds for score in own.values()) > 1:
            lines.append([f"{study}, per fold", *(_folds(own[metric]) for metric in METRICS)])
    lines.append([MAJORITY, *(f"{cohort.majority[metric]:.3f}" for metric in METRICS)])
    level = f"{100 * result.options.level:g}% intervals"
    return Sheet(f"{cohort.name}: {level}", ("model", *METRICS), 1, lines)


def _of(result: CompareResult, cohort: str, study: str) -> dict[str, StudyScore]:
    return {s.metric: s for s in result.scores if (s.cohort, s.study) == (cohort, study)}


def _estimate(score: StudyScore) -> str:
    interval = score.interval
    if math.isnan(interval.estimate):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f}\n{interval.low:.3f}-{interval.high:.3f}"


def _folds(score: StudyScore) -> str:
    if math.isnan(score.fold_sd):
        return "-"
    return f"{score.fold_mean:.3f}\n+- {score.fold_sd:.3f}"


def _tests(result: CompareResult, cohort: CohortFacts) -> Sheet:
    lines = []
    for t in result.tests:
        if t.cohort != cohort.name:
            continue
        test = t.test
        ends = "" if math.isnan(test.low) else f"\n[{test.low:+.3f}, {test.high:+.3f}]"
        lines.append([
            f"{t.first} -\n{t.second}", t.metric, test.test, f"{test.difference:+.3f}{ends}",
            _p(test.p_value), _p(t.p_holm),
        ])  # fmt: skip
    headings = ("pair", "metric", "test", "difference", "p", "p (Holm)")
    return Sheet(f"{cohort.name}: paired tests", headings, 3, lines)


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _paper(result: CompareResult) -> Sheet:
    preset = load_preset(str(result.options.preset))
    lines = [
        [f"paper: {row.model}", *(f"{mean:.3f}\n+- {sd:.3f}" for mean, sd in row.values)]
        for row in preset.paper
    ]
    for cohort in result.cohorts:
        for study in result.studies:
            own = _of(result, cohort.name, study)
            cells = [_folds(own[metric]) for metric in (ACCURACY, MACRO_F1, AUC)]
            lines.append([f"ours: {study}, {cohort.name}", *cells])
    caption = f"{PAPER_SOURCE}. Ours: per fold, macro F1. {preset.reading}"
    return Sheet(f"{preset.name}, {preset.task}", ("model", ACCURACY, "F1", AUC), 1, lines, caption)


# --- picture ---------------------------------------------------------------------------------


def draw_comparison(result: CompareResult) -> bytes:
    """AUC, accuracy and macro F1 with interval whiskers; p-values of each pair above them.

    Args:
        result: A row of panels for each cohort.

    Returns:
        A PNG file.
    """
    rows, models = len(result.cohorts), len(result.studies)
    figure = Figure((2.2 + 1.1 * models + 6.6, 4.1 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, len(DRAWN), squeeze=False)
    for row, cohort in zip(axes, result.cohorts, strict=True):
        for axis, metric in zip(row, DRAWN, strict=True):
            _panel(axis, result, cohort, metric)
        row[0].set_ylabel(f"{cohort.name} (n = {cohort.slides:,})")
    note = (
        f"whiskers: {100 * result.options.level:g}% bootstrap intervals, drawn by "
        f"{drawn_of(result.cohorts)}, of these trained models; another training may differ by "
        f"more. Dashes: {MAJORITY}"
    )
    figure.supxlabel(note, fontsize=8)
    return png(figure, {"Software": f"xmag_hf {__version__}"})


def _panel(axis: Any, result: CompareResult, cohort: CohortFacts, metric: str) -> None:
    tops, bottoms = [], [cohort.majority[metric]]
    for place, study in enumerate(result.studies):
        interval = _of(result, cohort.name, study)[metric].interval
        if math.isnan(interval.estimate):
            continue
        ends = [
            0 if math.isnan(end) else max(0.0, end)
            for end in (interval.estimate - interval.low, interval.high - interval.estimate)
        ]
        axis.errorbar(
            place, interval.estimate, yerr=np.array([[ends[0]], [ends[1]]]),
            fmt=MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)],
            capsize=5, markersize=8, linewidth=1.6,
        )  # fmt: skip
        axis.annotate(
            f"{interval.estimate:.3f}", (place, interval.estimate), (9, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
        tops.append(interval.estimate + ends[1])
        bottoms.append(interval.estimate - ends[0])
    axis.axhline(cohort.majority[metric], color="0.5", linestyle="--", linewidth=0.9)
    top, bottom = max([*tops, *bottoms]), min(bottoms)
    room = max(top - bottom, 0.02)
    over = _brackets(axis, result, cohort.name, metric, top, room)
    axis.set_ylim(max(bottom - 0.08 * room, -0.02), over + 0.1 * room)
    # No ticks where there can be no score.
    axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= 1 + 1e-9])
    axis.set_ylim(max(bottom - 0.08 * room, -0.02), over + 0.1 * room)
    axis.spines["left"].set_bounds(axis.get_ylim()[0], min(1.0, axis.get_ylim()[1]))
    axis.set_xlim(-0.5, len(result.studies) - 0.3)
    axis.set_xticks(
        range(len(result.studies)), labels=list(result.studies), rotation=20, ha="right"
    )
    axis.set_title(metric, fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _brackets(
    axis: Any, result: CompareResult, cohort: str, metric: str, top: float, room: float
) -> float:
    """A bracket with the named test's p-value over each pair; returns where the highest ends."""
    tests = [t for t in result.tests if (t.cohort, t.metric) == (cohort, metric)]
    # Accuracy has two; mid-p keeps its level, the exact one stays in the table.
    tests = [t for t in tests if t.test.test != "McNemar exact" and not math.isnan(t.test.p_value)]
    if len(tests) > MOST_BRACKETS:
        return top
    places = {study: place for place, study in enumerate(result.studies)}
    tests.sort(key=lambda t: abs(places[t.second] - places[t.first]))
    height = top
    for number, t in enumerate(tests, 1):
        height = top + 0.16 * room * number
        left, right = places[t.first] + 0.04, places[t.second] - 0.04
        down = height - 0.03 * room
        axis.plot([left, left, right, right], [down, height, height, down], "k-", linewidth=0.9)
        axis.annotate(
            _bracket_text(t), ((left + right) / 2, height), (0, 1), textcoords="offset points",
            ha="center", va="bottom", fontsize=7,
        )  # fmt: skip
    return height + (0.08 * room if tests else 0)


def _bracket_text(test: StudyTest) -> str:
    adjusted = not math.isnan(test.p_holm)
    shown = _p(test.p_holm if adjusted else test.test.p_value)
    p_value = shown if shown.startswith("<") else f"= {shown}"
    return f"{test.test.test}: p {p_value}{' (Holm)' if adjusted else ''}"

"""A finished probe as tables, and what a reader must know beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xmag_hf.reporting.tables import Sheet

from .published import PUBLISHED, SOURCE
from .scoring import AUC, Comparison, Score

if TYPE_CHECKING:
    from .record import ProbeResult, RowResult

METRICS = ("accuracy", "macro F1", "weighted F1", AUC)
COUNTED = ("counts", "cells")


def sheets(result: ProbeResult) -> list[Sheet]:
    """All tables of a probe, in the order they are printed."""
    found = [*_scores(result), *_comparisons(result)]
    paper = _paper(result)
    return found + ([paper] if paper else [])


# --- tables ----------------------------------------------------------------------------------


def _scores(result: ProbeResult) -> Iterator[Sheet]:
    """One table per method, with intervals by the coarsest unit there is.

    Labels: a line a row, a column a metric. Counts: a line for each row and type.
    """
    for method in dict.fromkeys(score.method for score in result.rows[0].scores):
        unit = [score.unit for score in result.rows[0].scores if score.method == method][-1]
        told = [
            (_name(row), [s for s in row.scores if s.method == method and s.unit == unit])
            for row in result.rows
        ]
        level = f"{100 * result.options.level:g}% intervals by {unit}"
        title = f"{result.data['name']}: {method} ({level})"
        if method in COUNTED:
            lines = [[name, s.metric, _cell(s, " ")] for name, scores in told for s in scores]
            title += ", log(1 + count)"
            yield Sheet(title, ("encoder", "metric", "score"), 2, lines)
        else:
            metrics = tuple(score.metric for score in told[0][1])
            lines = [[name, *(_cell(score, "\n") for score in scores)] for name, scores in told]
            yield Sheet(title, ("encoder", *metrics), 1, lines)


def _comparisons(result: ProbeResult) -> Iterator[Sheet]:
    """One table for each pair of rows."""
    names = {row.row.label: _name(row) for row in result.rows}
    for row, reference in dict.fromkeys((c.row, c.reference) for c in result.comparisons):
        own = [c for c in result.comparisons if (c.row, c.reference) == (row, reference)]
        families = dict.fromkeys(c.family for c in own if c.family)
        yield Sheet(
            f"{names[row]} minus {names[reference]} ({100 * own[0].test.level:g}% intervals)",
            ("method", "metric", "test", "difference", "p", "p (Holm)"),
            3,
            [_comparison_cells(c) for c in own],
            f"p (Holm): adjusted over {'; '.join(families)}; others are not adjusted"
            if families
            else "",
        )


def _comparison_cells(comparison: Comparison) -> list[str]:
    test = comparison.test
    numbers = f"{test.difference:+.3f} {_interval(test.low, test.high, '+.3f')}"
    if comparison.reason:
        numbers = "-" if math.isnan(test.difference) else f"{test.difference:+.3f}"
    p_values = ["-" if math.isnan(p) else f"{p:.2g}" for p in (test.p_value, comparison.p_holm)]
    name = test.test.replace(" (", "\n(")
    return [comparison.method, comparison.metric, name, numbers, *p_values]


def _paper(result: ProbeResult) -> Sheet | None:
    """Published values and ours; None without --paper-table, or when the data is another set."""
    name = result.options.paper_table
    if name is None or paper_mismatch(result):
        return None
    lines = []
    for row in PUBLISHED[name].rows:
        who = f"published: {row.model}, {row.mpp:g} um/px"
        lines.append([who, f"{row.accuracy:.3f}", f"{row.f1:.3f}", "", f"{row.auc:.3f}"])
    for row in result.rows:
        found = {s.metric: s for s in row.scores if s.method == "linear"}
        numbers = [f"{found[m].estimate:.3f}" if m in found else "" for m in METRICS]
        lines.append([f"ours: {_name(row)}", *numbers])
    headings = ("source", "accuracy", "F1", "weighted F1", AUC)
    caption = f"F1: ours macro. published: {SOURCE}"
    return Sheet(f"{name}: linear probe", headings, 1, lines, caption)


def paper_mismatch(result: ProbeResult) -> str:
    """Why the published values are not of this data; empty where they can be."""
    name = result.options.paper_table
    if name is None:
        return ""
    classes, wanted = len(result.data["classes"]), PUBLISHED[name].classes
    if classes != wanted:
        found = f"{classes} classes, not {wanted}"
    elif result.data["protocol"] != "official split":
        found = f"{result.data['protocol']}, not the official split"
    else:
        return ""
    return f"--paper-table {name}: {result.data['name']} is not that data set as published: {found}"


def _name(row: RowResult) -> str:
    return f"{row.row.label} ({row.row.role}, {row.row.mpp:g} um/px)"


def _cell(score: Score, between: str) -> str:
    if math.isnan(score.estimate):
        return "-"
    if math.isnan(score.low):
        return f"{score.estimate:.3f}"
    return f"{score.estimate:.3f}{between}{_interval(score.low, score.high, '.3f')}"


def _interval(low: float, high: float, form: str) -> str:
    # "0.878-0.989" leaves room for labels in 80 columns; with a sign it would be misread.
    if form == ".3f" and low >= 0:
        return f"{low:.3f}-{high:.3f}"
    return f"[{low:{form}}, {high:{form}}]"


# --- remarks ---------------------------------------------------------------------------------


def all_remarks(result: ProbeResult) -> list[str]:
    """What a reader must know beside the tables."""
    mismatch = paper_mismatch(result)
    return [
        *result.remarks,
        *([f"{mismatch}; its values are not shown."] if mismatch else []),
        f"{result.data['protocol']}; {result.seconds:.0f} s",
    ]


def remarks(
    data: dict[str, Any], rows: Sequence[RowResult], comparisons: Sequence[Comparison]
) -> list[str]:
    """Of the data, the protocol, what is undefined, and what cannot be told apart.

    Args:
        data: Of `record.describe`.
        rows: With scores; a method's details may hold `remarks`, a list of sentences.
        comparisons: Paired tests.

    Returns:
        Sentences, each once.
    """
    lines = [_split_line(name, split) for name, split in data["splits"].items()]
    for row in rows:
        for details in row.details.values():
            lines += details.get("remarks", [])
    lines += _undefined(rows, comparisons)
    pairs: dict[tuple[str, str], list[str]] = {}
    for c in comparisons:
        if c.family:
            what = f"{c.half_width:.3f} ({c.metric}, {c.method})"
            pairs.setdefault((c.row, c.reference), []).append(what)
    for (row, reference), widths in pairs.items():
        lines.append(
            f"{row} against {reference}: differences are not told apart here below about "
            f"{', '.join(widths)}, half the interval's width"
        )
    return list(dict.fromkeys(lines))


def _split_line(name: str, split: dict[str, Any]) -> str:
    parts = [f"{split['images']} images"]
    if "groups" in split:
        parts.append(f"{split['groups']} groups")
    if "majority" in split:
        parts.append(f"always the commonest class: accuracy {split['majority']:.3f}")
    return f"{name}: {', '.join(parts)}"


def _undefined(rows: Sequence[RowResult], comparisons: Sequence[Comparison]) -> list[str]:
    """Reasons for what is missing, and resamples that were drawn again, each with where."""
    where: dict[str, list[str]] = {}
    for row in rows:
        for s in row.scores:
            if s.reason:
                what = f"{s.method} {s.metric} by {s.unit}"
                where.setdefault(f"no interval: {s.reason}", []).append(what)
            if s.redrawn:
                text = "resamples on which it is undefined were drawn again"
                where.setdefault(text, []).append(f"{s.method} {s.metric} by {s.unit}")
    for c in comparisons:
        if c.reason:
            where.setdefault(f"no test: {c.reason}", []).append(f"{c.method} {c.metric}")
    return [f"{text} ({', '.join(dict.fromkeys(what))})" for text, what in where.items()]

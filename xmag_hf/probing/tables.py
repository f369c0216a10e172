"""A finished probe as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from .probe import ProbeResult
from .published import PUBLISHED, SOURCE
from .report import AUC, Comparison, Score, resolution

METRICS = ("accuracy", "macro F1", "weighted F1", AUC)


def score_tables(result: ProbeResult) -> Iterator[Table]:
    """One table per method: a line a row, a column a metric, with intervals by group if any."""
    first = result.rows[0]
    for method in dict.fromkeys(score.method for score in first.scores):
        # Whole images without groups have none, their cells have: the images.
        unit = _unit([score for score in first.scores if score.method == method])
        shown = [s for s in first.scores if s.method == method and s.unit == unit]
        level = f"{100 * shown[0].level:g}% intervals by {unit}"
        table = Table(title=f"{result.data['name']}: {method} ({level})")
        table.add_column("encoder", overflow="fold")
        table.add_column("role")
        table.add_column("um/px", justify="right")
        for score in shown:
            table.add_column(score.metric, justify="right")
        for row in result.rows:
            scores = [s for s in row.scores if s.method == method and s.unit == unit]
            cells = [_cell(score) for score in scores]
            table.add_row(row.row.label, row.row.role, f"{row.row.mpp:g}", *cells)
        yield table


def comparison_table(result: ProbeResult) -> Table | None:
    """Every row against the first, or None when there is one row."""
    if not result.comparisons:
        return None
    table = Table(title=f"difference to {result.comparisons[0].reference} (95% interval)")
    for heading in ("encoder", "method", "metric", "difference", "p", "p (Holm)", "test"):
        table.add_column(heading, justify="right" if heading[:1] in "dp" else "left")
    for comparison in result.comparisons:
        table.add_row(*_comparison_cells(comparison))
    return table


def paper_table(result: ProbeResult) -> Table | None:
    """Published values and ours, the source of each line said; None without --paper-table."""
    name = result.options.paper_table
    if name is None:
        return None
    table = Table(title=f"{name}: linear probe", caption=f"published: {SOURCE}")
    for heading in ("source", "encoder", "um/px", "accuracy", "F1", "weighted F1", "AUC"):
        table.add_column(heading, justify="left" if heading in ("source", "encoder") else "right")
    for row in PUBLISHED[name]:
        numbers = [f"{row.accuracy:.3f}", f"{row.f1:.3f}", "", f"{row.auc:.3f}"]
        table.add_row("published", row.model, f"{row.mpp:g}", *numbers)
    for row in result.rows:
        found = {s.metric: s for s in row.scores if s.method == "linear" and s.unit == "image"}
        numbers = [f"{found[m].estimate:.3f}" if m in found else "" for m in METRICS]
        table.add_row("ours", f"{row.row.label} ({row.row.role})", f"{row.row.mpp:g}", *numbers)
    return table


def remarks(result: ProbeResult) -> list[str]:
    """What a reader must know beside the tables."""
    lines = []
    for name, split in result.data["splits"].items():
        parts = [f"{split['images']} images"]
        if "groups" in split:
            parts.append(f"{split['groups']} groups")
        if "majority" in split:
            parts.append(f"always the commonest class: accuracy {split['majority']:.3f}")
        lines.append(f"{name}: {', '.join(parts)}")
    lines.append(f"{result.data['protocol']}; {result.seconds:.0f} s")
    halves = resolution(result.comparisons, AUC)
    if halves is not None:
        lines.append(
            f"95% intervals of the linear probe's differences of AUC reach {halves[0]:.3f} to "
            f"{halves[1]:.3f} to either side: encoders that differ by less are not told apart here."
        )
    return lines


def _unit(scores: list[Score]) -> str:
    return "group" if any(score.unit == "group" for score in scores) else "image"


def _cell(score: Score) -> str:
    return f"{score.estimate:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _comparison_cells(comparison: Comparison) -> list[str]:
    test = comparison.test
    return [
        comparison.row,
        comparison.method,
        comparison.metric,
        f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]",
        f"{test.p_value:.3g}",
        f"{comparison.p_holm:.3g}",
        test.test,
    ]

"""Tables before they are drawn; for a terminal of 80 columns, and as Markdown.

Numbers are never cut: a table that does not fit is made wider than the terminal. Also what tables
of others mean: their marks for nothing, and headings that they have twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Below this, labels would be folded into single letters.
LEAST_WIDTH = 78
FILE_WIDTH = 160  # of tables that go into a file or a pipe
# What tables write where they know nothing, in small letters.
MISSING = ("", "na", "n/a", "#n/a", "nan")


def doubled_heading(names: Sequence[str]) -> str | None:
    """The first heading that stands twice; csv would take the last such column, in silence."""
    return next((name for n, name in enumerate(names) if name and name in names[:n]), None)


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn.

    Attributes:
        title: Above it.
        headings: Of the columns.
        words: How many columns on the left are words, which may be folded; the rest are numbers.
        lines: Cells.
        caption: Below it, or empty.
    """

    title: str
    headings: tuple[str, ...]
    words: int
    lines: list[list[str]]
    caption: str = ""


def print_sheets(sheets: Iterable[Sheet], lines: Iterable[str]) -> None:
    """Print tables, and lines below them, on standard output."""
    console = wide_console()
    for sheet in sheets:
        console.print(drawn(sheet))
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def wide_console() -> Console:
    """As wide as the terminal, but never so narrow that numbers are cut; wide for a file."""
    from rich.console import Console

    console = Console()
    least = LEAST_WIDTH if console.is_terminal or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(width=max(console.width, least))


def drawn(sheet: Sheet) -> Table:
    """A sheet for rich."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    caption = escape(sheet.caption) or None
    table = Table(
        title=escape(sheet.title), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for number, heading in enumerate(sheet.headings):
        if number < sheet.words:
            table.add_column(heading, overflow="fold")
            continue
        cells = [line[number] for line in sheet.lines]
        widest = max(len(part) for cell in [heading, *cells] for part in cell.split("\n"))
        table.add_column(heading, justify="right", no_wrap=True, min_width=widest)
    for line in sheet.lines:
        table.add_row(*map(escape, line))
    return table


def as_markdown(sheets: Iterable[Sheet], remarks: Iterable[str]) -> str:
    """Tables, and remarks as a list below them, as Markdown."""
    parts = []
    for sheet in sheets:
        bars = ["---"] * sheet.words + ["---:"] * (len(sheet.headings) - sheet.words)
        rows = [
            " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line)
            for line in (sheet.headings, bars, *sheet.lines)
        ]
        parts += [f"## {sheet.title}", "\n".join(f"| {row} |" for row in rows), sheet.caption]
    parts.append("\n".join(f"- {line}" for line in remarks))
    return "\n\n".join(part for part in parts if part) + "\n"

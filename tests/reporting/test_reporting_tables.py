"""Tables on screen are as wide as they must be; Markdown has as many cells as the sheet."""

from __future__ import annotations

import pytest

from xmag_hf.reporting.tables import (
    FILE_WIDTH,
    LEAST_WIDTH,
    Sheet,
    as_markdown,
    doubled_heading,
    print_sheets,
)

SHEET = Sheet(
    "scores [v2]",
    ("model", *(f"metric {n}" for n in range(9))),
    1,
    [["a model of several words", *(["0.123\n0.111-0.135"] * 9)], ["a|b", *(["-"] * 9)]],
    "caption",
)


@pytest.mark.parametrize(("columns", "width"), [(None, FILE_WIDTH), ("20", LEAST_WIDTH)])
def test_width(monkeypatch, capsys, columns: str | None, width: int) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    narrow = Sheet("t", ("model", "metric"), 1, [["word " * 60, "0.123"]])
    print_sheets([narrow], ["a [line] " * 40])
    *table, line = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) == width
    assert line == "a [line] " * 40  # neither cut nor taken for markup


def test_markdown_keeps_every_cell() -> None:
    title, table, caption, remarks = as_markdown([SHEET], ["one", "two"]).split("\n\n")
    heads, bars, *lines = [
        [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        for line in table.splitlines()
    ]
    assert (title, caption, remarks) == ("## scores [v2]", "caption", "- one\n- two\n")
    assert heads == list(SHEET.headings)
    assert bars == ["---"] + ["---:"] * 9
    assert [[cell.replace("\0", "|") for cell in line] for line in lines] == [
        [cell.replace("\n", " ") for cell in line] for line in SHEET.lines
    ]


def test_headings_that_stand_twice() -> None:
    """Columns without a name, as spreadsheets leave them at the right, are read by nobody."""
    assert doubled_heading(["a", "b", "c", "b", "a"]) == "b"
    assert doubled_heading(["a", "b", "", ""]) is None

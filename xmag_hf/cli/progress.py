"""Progress bars of the verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def counting_bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one for each name that is counted.

    Args:
        quiet: Show none.

    Yields:
        Called with (name, steps done since the last call, steps in all).
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), disable=quiet) as bars:

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.advance(tasks[name], done)

        yield advance


@contextmanager
def slides_bar(console: Console, counted: str) -> Iterator[Callable[[Any], None]]:
    """A bar over slides, and the number and rate of what is made of them.

    Args:
        console: Where it is drawn; a quiet one shows nothing.
        counted: `regions` or `patches`: the attribute of the state that is counted.

    Yields:
        Called with a state that has `slides`, `slides_done`, `share` and what is counted.
    """
    columns = (
        TextColumn("slides"),
        BarColumn(),
        TextColumn("{task.fields[slides_done]}/{task.total:.0f}"),
        TextColumn(counted + " {task.fields[count]}, {task.fields[rate]:.1f}/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("slides", total=1, slides_done=0, count=0, rate=0.0)

        def show(state: Any) -> None:
            elapsed, count = progress.tasks[task].elapsed or 0, getattr(state, counted)
            progress.update(
                task,
                total=state.slides,
                completed=state.share,
                slides_done=state.slides_done,
                count=count,
                rate=count / elapsed if elapsed else 0.0,
            )

        yield show

"""Progress bars of the verbs: on stderr, drawn from the first step on.

What is wrong before any work is told without an empty bar above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def _bars(*columns: ProgressColumn, quiet: bool) -> Iterator[Progress]:
    """Bars that are not drawn before `start` is called."""
    bars = Progress(*columns, console=Console(stderr=True), disable=quiet)
    try:
        yield bars
    finally:
        if bars.live.is_started:
            bars.stop()


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
    with _bars(*columns, TimeRemainingColumn(), quiet=quiet) as bars:

        def advance(name: str, done: int, total: int) -> None:
            bars.start()
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.advance(tasks[name], done)

        yield advance


@contextmanager
def slides_bar(quiet: bool, counted: str) -> Iterator[Callable[[Any], None]]:
    """A bar over slides, and the number and rate of what is made of them.

    Args:
        quiet: Show none.
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
    with _bars(*columns, quiet=quiet) as progress:
        task = progress.add_task("slides", total=1, slides_done=0, count=0, rate=0.0)

        def show(state: Any) -> None:
            progress.start()
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

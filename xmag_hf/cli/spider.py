"""SPIDER (labelled 20x patches with context) as pairs of a 20x and a 5x image: Parquet and card.

From histai/SPIDER-ORGAN on the Hub (gated; log in first), or from local files. Run it again to go
on with a run, or a download, that was cut off.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from xmag_hf.cli.options import add_options, add_workers, read_options
from xmag_hf.data_builders import SpiderError, SpiderOptions, find_source
from xmag_hf.data_builders.spider_build import SpiderSummary, build_spider
from xmag_hf.data_builders.spider_records import ORGANS, SPLITS
from xmag_hf.data_builders.spider_source import Progress as Callback

EXAMPLE = "xmag spider colorectal --out spider-colorectal --missing white"
SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("organ", choices=ORGANS, metavar="ORGAN", help=", ".join(ORGANS))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the data set")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="holds spider-ORGAN.tar.00 and so on, or SPIDER-ORGAN/ unpacked (default: the Hub)",
    )
    parser.add_argument("--revision", metavar="TEXT", help="of the Hub repository (default: main)")
    add_options(parser, SpiderOptions)
    add_workers(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Build the data set; 0 if every file could be used, else 1."""
    try:
        options = read_options(SpiderOptions, args)
        if args.workers < 1:
            raise SpiderError(f"--workers {args.workers}: at least 1.")
        if args.source is not None and args.revision is not None:
            raise SpiderError("--revision is of the Hub; it has no meaning with --source.")
    except SpiderError as error:
        parser.error(str(error))
    if args.quiet:
        disable_progress_bars()  # the Hub's own, of a download
    source = find_source(args.organ, args.source, revision=args.revision)
    with _bar(Console(stderr=True, quiet=args.quiet)) as progress:
        summary = build_spider(source, args.out, options, workers=args.workers, progress=progress)
    _print_summary(summary)
    return 1 if summary.problems else 0


@contextmanager
def _bar(console: Console) -> Iterator[Callback]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.completed:,}/{task.total:,}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show


def _print_summary(summary: SpiderSummary) -> None:
    console = Console()
    table = Table(title=f"SPIDER-{summary.organ}: {sum(summary.rows.values()):,} records")
    table.add_column("class")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name, counts in summary.classes.items():
        table.add_row(name, *(f"{counts[split]:,}" for split in SPLITS))
    table.add_row("all", *(f"{summary.rows[split]:,}" for split in SPLITS), style="bold")
    console.print(table)
    some = sum(count for number, count in summary.missing.items() if number != "0")
    console.print(f"context missing in {some:,} records; {summary.dropped:,} dropped for it")
    for warning in summary.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        console.print(f"failed: {problem}", markup=False, soft_wrap=True)
    if len(summary.problems) > SHOWN_PROBLEMS:
        more = len(summary.problems) - SHOWN_PROBLEMS
        console.print(f"failed: {more:,} more, in {summary.path / 'spider.json'}", markup=False)
    if summary.already_done:
        console.print("Already done; nothing was built.")
        if summary.problems:
            console.print(f"To try the files above again, remove {summary.path} first.")
    console.print(f"load_dataset({str(summary.path)!r})", markup=False, soft_wrap=True)

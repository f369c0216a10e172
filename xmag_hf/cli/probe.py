"""Probe frozen encoders on labelled images: linear, kNN, few-shot, or counts of nuclei.

Every encoder sees the tissue at its own scale: the images are resampled from theirs (--data-mpp,
or a column mpp). The first row is the one that all others are tested against. Embeddings are kept,
so a second run with other methods is quick; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.progress import counting_bars
from xmag_hf.probing.options import ProbeOptions

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 160  # of tables that go into a file or a pipe
EXAMPLE = (
    "xmag probe --data ORG/PATCHES --data-mpp 0.5 --model ./xmag --teacher efficientnet-lite0 \\\n"
    "      --teacher-at-5x --undistilled start --out probe"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `ProbeOptions`."""
    add_options(parser, ProbeOptions)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Probe, write the report, print it."""
    from xmag_hf.probing.errors import ProbeError
    from xmag_hf.probing.probe import run_probe
    from xmag_hf.probing.tables import all_remarks, drawn, sheets

    try:
        options = read_options(ProbeOptions, args)
    except ProbeError as error:
        parser.error(str(error))
    if not options.model and options.teacher is None:
        parser.error("nothing to probe: give --model or --teacher")
    with counting_bars(args.quiet) as advance:
        result = run_probe(options, advance)
    console = _console()
    for sheet in sheets(result):
        console.print(drawn(sheet))
    for line in (*all_remarks(result), f"-> {options.out}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _console() -> Console:
    """As wide as the terminal, but never so narrow that numbers are cut; wide for a file."""
    from rich.console import Console

    from xmag_hf.probing.tables import LEAST_WIDTH

    console = Console()
    least = LEAST_WIDTH if console.is_terminal or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(width=max(console.width, least))

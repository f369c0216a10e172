"""Probe frozen encoders on labelled images: linear, kNN, few-shot, or counts of nuclei.

Every encoder sees the tissue at its own scale: the images are resampled from theirs (--data-mpp,
or a column mpp). The first row is the one that all others are tested against. Embeddings are kept,
so a second run with other methods is quick; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse

from xmag_hf.cli.options import add_options, counting_bars, read_options
from xmag_hf.probing.options import ProbeOptions

EXAMPLE = (
    "xmag probe --data ORG/PATCHES --data-mpp 0.5 --model ./xmag --teacher efficientnet-lite0 \\\n"
    "      --teacher-at-5x --undistilled start --out probe"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `ProbeOptions`."""
    add_options(parser, ProbeOptions)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Probe, write the report, print it."""
    from rich.console import Console

    from xmag_hf.probing.probe import run_probe
    from xmag_hf.probing.tables import comparison_table, paper_table, remarks, score_tables

    options = read_options(ProbeOptions, args)
    with counting_bars(args.quiet) as advance:
        result = run_probe(options, advance)
    console = Console()
    for table in (*score_tables(result), comparison_table(result), paper_table(result)):
        if table is not None:
            console.print(table)
    for line in remarks(result):
        console.print(line)
    console.print(f"-> {options.out}")
    return 0

"""Probe frozen encoders on labelled images: linear, kNN, few-shot, or counts of nuclei.

Every encoder sees the tissue at its own scale: the images are resampled from theirs (--data-mpp,
or a column mpp). The first row is the one that all others are tested against. Embeddings are kept,
so a second run with other methods is quick; an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.progress import counting_bars
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
    from xmag_hf.probing.errors import ProbeError
    from xmag_hf.probing.probe import run_probe
    from xmag_hf.probing.tables import all_remarks, sheets
    from xmag_hf.reporting.tables import print_sheets

    try:
        options = read_options(ProbeOptions, args)
    except ProbeError as error:
        parser.error(str(error))
    if not options.model and options.teacher is None:
        parser.error("nothing to probe: give --model or --teacher")
    with counting_bars(args.quiet) as advance:
        result = run_probe(options, advance)
    print_sheets(sheets(result), [*all_remarks(result), f"-> {options.out}"])
    return 0

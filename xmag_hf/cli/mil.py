"""Train and test slide-level heads on bags: folds by patient, the same ones for every encoder.

Give several folders of bags to compare encoders. Only slides that have a label and a good bag in
every folder take part; the others are listed. Stopped, the same command goes on. The head to
publish is the one of the fold with the lowest validation loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.progress import counting_bars
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.options import HeadOptions, StudyOptions

EXAMPLE = "xmag mil bags-xmag bags-phikon --labels labels.csv --out study"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Bags, and every field of `StudyOptions` and `HeadOptions`."""
    parser.add_argument(
        "bags", nargs="+", type=Path, metavar="BAGS", help="folders of SLIDE_ID.h5, one per encoder"
    )
    add_options(parser, StudyOptions)
    add_options(parser, HeadOptions)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the study, print its tables."""
    from transformers.utils.logging import disable_progress_bar

    from xmag_hf.mil.compare_report import comparison_sheets
    from xmag_hf.mil.study import run_study
    from xmag_hf.reporting.tables import print_sheets

    try:
        options, head = read_options(StudyOptions, args), read_options(HeadOptions, args)
    except MILError as error:
        parser.error(str(error))
    disable_progress_bar()  # transformers' own, one for each head that is saved
    with counting_bars(args.quiet) as advance:
        result = run_study(args.bags, options, head, advance)
    lines = (*result.remarks, f"-> {options.out}")
    print_sheets(comparison_sheets(result), lines)
    return 0

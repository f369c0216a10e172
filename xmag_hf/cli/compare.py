"""Compare studies on the same slides: AUC, accuracy and F1 with intervals, and paired tests.

DeLong for AUC, McNemar (exact and mid-p) for accuracy, bootstrap for macro F1, or, where patients
have several slides, all by a bootstrap of whole patients; each named, adjusted by Holm where there
are several pairs. The folds' models are pooled by the mean of their
probabilities for an external cohort.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.mil.compare import CompareOptions
from xmag_hf.mil.errors import MILError

EXAMPLE = "xmag compare study-xmag study-phikon study-uni2 --out comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Studies, the folder, and every field of `CompareOptions`."""
    parser.add_argument(
        "studies",
        nargs="+",
        type=Path,
        metavar="STUDY",
        help="folders of `xmag mil`, their predictions.csv, or predictions of `xmag probe`",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="gets the report")
    add_options(parser, CompareOptions)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare, write the report, print it."""
    from xmag_hf.mil.compare import compare_studies
    from xmag_hf.mil.compare_report import comparison_sheets, write_comparison
    from xmag_hf.reporting.tables import print_sheets

    try:
        options = read_options(CompareOptions, args)
    except MILError as error:
        parser.error(str(error))
    result = compare_studies(args.studies, options)
    files = write_comparison(result, args.studies, args.out)
    lines = (*result.remarks, *(f"-> {path}" for path in files))
    print_sheets(comparison_sheets(result), lines)
    return 0

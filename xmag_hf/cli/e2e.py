"""Train encoder and head together on whole slides, fold by fold.

One process by itself; several by `accelerate launch --module xmag_hf.cli.e2e ...`. Each fold is
saved as one folder with encoder and head, which `xmag predict` and `xmag heatmap` take as --head;
stop it at any moment and run the same command to go on.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.progress import counting_bars
from xmag_hf.cli.slides import add_slide_arguments, named_sources
from xmag_hf.data_builders import CorpusError
from xmag_hf.embedding import EmbedError, EmbedOptions
from xmag_hf.mil.e2e_options import READING_OPTIONS, E2EOptions
from xmag_hf.mil.errors import MILError

EXAMPLE = "xmag e2e slides/ --labels labels.csv --encoder xmag --head study --out study-e2e"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Slides, every field of `E2EOptions`, and how patches are read."""
    add_slide_arguments(parser)
    add_options(parser, E2EOptions)
    others = tuple(f.name for f in fields(EmbedOptions) if f.name not in READING_OPTIONS)
    add_options(parser, EmbedOptions, skip=others)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Train; 0 once every fold asked for is there."""
    from accelerate import PartialState
    from transformers.utils.logging import disable_progress_bar

    from xmag_hf.mil.compare_report import comparison_sheets
    from xmag_hf.mil.end_to_end import end_to_end
    from xmag_hf.reporting.tables import print_sheets

    try:
        options, reading = read_options(E2EOptions, args), read_options(EmbedOptions, args)
        sources = named_sources(args)
    except (CorpusError, EmbedError, MILError) as error:
        parser.error(str(error))
    first = os.environ.get("RANK", "0") == "0"  # before accelerate has said so
    disable_progress_bar()  # transformers' own, one for each fold that is saved
    with counting_bars(args.quiet or not first) as advance:
        result = end_to_end(sources, options, reading, advance=advance)
    if first:
        sheets = comparison_sheets(result.scores) if result.scores else []
        remarks = result.scores.remarks if result.scores else ()
        print_sheets(sheets, [*remarks, *(f"-> {fold.folder}" for fold in result.trained)])
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    from xmag_hf.cli.main import run_verb

    raise SystemExit(run_verb("e2e", sys.argv[1:]))

"""t-SNE pictures of embeddings, coloured by class, encoders side by side; confusion matrices.

Data, models, embeddings and predictions are those of `xmag probe`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.progress import counting_bars

EXAMPLE = (
    "xmag project --data spider-breast --model xmag-student --teacher uni2-h --teacher-at-5x "
    "--out figure5"
)
# Options of a probe that a picture has no use for.
UNUSED = (
    "data", "out", "paper_table", "cross_validate", "methods", "folds", "repeats", "c", "c_grid",
    "validation_share", "neighbours", "shots", "shot_repeats", "nuclei_csv", "nuclei_types",
    "dense", "samples", "level",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb: those of the data and rows of a probe, and of the pictures."""
    from xmag_hf.probing.options import ProbeOptions
    from xmag_hf.probing.pictures import PictureOptions

    parser.add_argument("--data", metavar="TEXT", help="labelled images, as for `xmag probe`")
    parser.add_argument(
        "--predictions",
        nargs="+",
        type=Path,
        default=[],
        metavar="CSV",
        help="predictions of `xmag probe`: draw their confusion matrices",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("project"), metavar="DIR", help="(default: project)"
    )
    add_options(parser, PictureOptions)
    add_options(parser, ProbeOptions, skip=UNUSED)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw what was asked for, and say where it is."""
    from xmag_hf.probing.errors import ProbeError
    from xmag_hf.probing.options import ProbeOptions
    from xmag_hf.probing.pictures import PictureOptions
    from xmag_hf.probing.projections import confusion_pictures, project

    if args.data is None and not args.predictions:
        parser.error("nothing to draw: give --data with --model, or --predictions")
    try:
        picture = read_options(PictureOptions, args)
        options = None if args.data is None else read_options(ProbeOptions, args, out=str(args.out))
    except ProbeError as error:
        parser.error(str(error))
    written = confusion_pictures(args.predictions, args.out)
    if options is not None:
        with counting_bars(args.quiet) as advance:
            written += project(options, picture, args.out, advance)
    for path in written:
        print(path)
    return 0

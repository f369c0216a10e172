"""Slides and encoders as several verbs take them: paths, folders, globs, CSV; --model."""

from __future__ import annotations

import argparse
from pathlib import Path

from xmag_hf.cli.options import add_options
from xmag_hf.data_builders import CorpusError, SlideRow, find_slides, read_slides_csv
from xmag_hf.data_builders.slide_list import with_csv_metadata
from xmag_hf.embedding.options import EmbedOptions
from xmag_hf.embedding.sources import SlideSource

SLIDES_HELP = "files, globs, or folders, which are searched through"
# What a head settles itself, or what makes files of no use to it.
SETTLED_BY_HEAD = ("mpp", "patch_px", "pooling", "tokens", "features", "preview")


def add_slide_arguments(
    parser: argparse.ArgumentParser, metavar: str = "SLIDES", text: str = SLIDES_HELP
) -> None:
    """SLIDES, --slides-csv and --slides-dir.

    Args:
        parser: Gets them.
        metavar: What help calls the positional, where it takes something else too.
        text: Its help.
    """
    parser.add_argument("slides", nargs="*", metavar=metavar, help=text)
    parser.add_argument(
        "--slides-csv",
        type=Path,
        metavar="F",
        help="columns slide (path) or slide_id; patient_id, mpp, others are ignored",
    )
    parser.add_argument("--slides-dir", type=Path, metavar="DIR", help="where the CSV's slides are")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """--model: the encoder of the slides' patches."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="an encoder's name (phikon, uni2-h, ...), the folder of a student or another encoder, "
        "hf:ORG/NAME, timm:NAME, or a student before its distillation: start:SIZE, "
        "random:SIZE[:SEED] (SIZE is base, small, tiny or lite)",
    )


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """--head, and how slides are read whose bags are made for it."""
    parser.add_argument(
        "--head", required=True, metavar="H", help="folder of a trained head, or hf:ORG/NAME"
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="for slides without a bag: the head's encoder, as `xmag embed --model` takes it; none "
        "is what a table names, or the head's own (end to end)",
    )
    group = parser.add_argument_group(
        "slides without a bag",
        "how they are read and encoded, on one device; um/px, patch size, pooling are the head's",
    )
    add_options(group, EmbedOptions, skip=SETTLED_BY_HEAD)


def named_sources(args: argparse.Namespace, geojson: Path | None = None) -> list[SlideSource]:
    """The slides that the arguments name.

    Args:
        args: With `slides`, `slides_csv` and `slides_dir`.
        geojson: A file for the only slide, or a folder of `<slide_id>.geojson`.

    Raises:
        CorpusError: None, an unusable CSV, or one annotation for several slides.
    """
    if args.slides and args.slides_csv:
        rows = with_csv_metadata(find_slides(args.slides), args.slides_csv)
    elif args.slides_csv:
        rows = read_slides_csv(args.slides_csv, args.slides_dir)
    elif args.slides:
        rows = find_slides(args.slides)
    else:
        raise CorpusError("No slides. Name files, folders or globs, or give --slides-csv.")
    if geojson is not None and not geojson.is_dir() and len(rows) > 1:
        raise CorpusError(
            f"--tissue-geojson {geojson}: one file for {len(rows)} slides. Give a folder of "
            "SLIDE_ID.geojson."
        )
    return [
        SlideSource(row.path, row.slide_id, row.mpp, row.patient_id, _annotation(geojson, row))
        for row in rows
    ]


def _annotation(geojson: Path | None, row: SlideRow) -> Path | None:
    if geojson is None or not geojson.is_dir():
        return geojson
    return geojson / f"{row.slide_id}.geojson"

"""Show where a head looks: picture, GeoJSON for QuPath, and the patches with most attention.

Uses the stored bags; only a slide without one is embedded, as the head wants it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.slides import add_head_arguments, add_slide_arguments, named_sources
from xmag_hf.data_builders import CorpusError
from xmag_hf.embedding.embed import check_sources
from xmag_hf.embedding.options import EmbedError, EmbedOptions
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.heatmap import HeatmapOptions, make_heatmaps

EXAMPLE = "xmag heatmap slides/*.svs --head study/head --bags bags --out heatmaps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Slides, head, folder, every field of `HeatmapOptions`, and how slides are read."""
    add_slide_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="gets the files")
    add_options(parser, HeatmapOptions)
    add_head_arguments(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the files of every slide; 1 if one failed or lost patches."""
    from transformers.utils.logging import disable_progress_bar

    try:
        options, reading = read_options(HeatmapOptions, args), read_options(EmbedOptions, args)
        sources = named_sources(args)
        check_sources(sources)
    except (CorpusError, EmbedError, MILError) as error:
        parser.error(str(error))
    disable_progress_bar()  # transformers' own, while weights are loaded
    problems = 0
    for record in make_heatmaps(
        sources, args.head, args.out, options, encoder=args.model, reading=reading
    ):
        problems += record.problem
        if record.status == "ok":
            print(
                f"{record.slide_id}: {record.label} {record.probability:.3f}, "
                f"{record.patches:,} patches, {record.seconds:.1f} s -> "
                f"{', '.join(str(path) for path in record.files)}"
            )
        if record.reason:
            print(f"{'incomplete' if record.files else record.status}: {record.reason}")
    return 1 if problems else 0

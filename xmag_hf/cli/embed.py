"""Turn slides into bags of embeddings: one HDF5 file a slide, resumable, shared by processes."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.cli.progress import slides_bar
from xmag_hf.cli.slides import add_model_argument, add_slide_arguments, named_sources
from xmag_hf.data_builders import CorpusError
from xmag_hf.embedding.embed import check_sources, embed_slides
from xmag_hf.embedding.options import EmbedError, EmbedOptions
from xmag_hf.embedding.records import RunSummary
from xmag_hf.embedding.run import on_every_gpu
from xmag_hf.reporting.tables import wide_console

EXAMPLE = "xmag embed slides/*.svs --model xmag_folder --out bags"

LOW_SHARE = 0.8  # of the tissue in patches: below it, small slides lose much at their edges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_slide_arguments(parser)
    add_model_argument(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="gets the bags")
    add_options(parser, EmbedOptions)
    parser.add_argument(
        "--tissue-geojson",
        type=Path,
        metavar="F",
        help="polygons, as QuPath exports them, that say where tissue is: a file for one slide, "
        "or a folder of SLIDE_ID.geojson",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Embed; 0 if every slide was done, was there, or has no tissue, else 1."""
    from transformers.utils.logging import disable_progress_bar

    try:
        options = on_every_gpu(read_options(EmbedOptions, args))
        sources = named_sources(args, args.tissue_geojson)
        check_sources(sources)
    except (CorpusError, EmbedError) as error:
        parser.error(str(error))
    if args.quiet:
        disable_progress_bar()  # transformers' own, while weights are loaded
    with slides_bar(args.quiet, "patches") as progress:
        summary = embed_slides(sources, args.out, args.model, options, progress=progress)
    _print_summary(summary)
    return 1 if summary.problems else 0


def _print_summary(summary: RunSummary) -> None:
    console = wide_console()
    patches = sum(record.patches for record in summary.records)
    table = Table(title=escape(f"{patches:,} patches in {summary.out_dir}"))
    table.add_column("slide", overflow="fold")
    table.add_column("status")
    for name in ("patches", "lost", "um/px", "mm2", "seen", "read s", "enc. s"):
        table.add_column(name, justify="right")
    for record in summary.records:
        table.add_row(
            escape(record.slide_id),
            record.status,
            f"{record.patches:,}",
            f"{record.unreadable:,}",
            "" if record.mpp0 is None else f"{record.mpp0:.4g}",
            "" if record.tissue_mm2 is None else f"{record.tissue_mm2:.1f}",
            "" if record.tissue_share is None else f"{record.tissue_share:.0%}",
            f"{record.seconds['read']:.1f}",
            f"{record.seconds['encode']:.1f}",
        )
    console.print(table)
    for record in summary.records:
        reason = record.reason or record.first_unreadable
        if reason:
            console.print(f"{record.status}: {reason}", markup=False, soft_wrap=True)
    thin = [r for r in summary.records if r.tissue_share is not None and r.tissue_share < LOW_SHARE]
    if thin:
        console.print(
            f"less than {LOW_SHARE:.0%} of the tissue lies in patches (column seen) in {len(thin)} "
            f"of {len(summary.records)}: --pad-edges keeps patches past the edge; a lower --tissue "
            "those with less.",
            soft_wrap=True,
        )
    counts = ", ".join(f"{n} {status}" for status, n in summary.counts.items())
    console.print(f"{counts}; see {summary.out_dir / 'summary.csv'}", markup=False, soft_wrap=True)

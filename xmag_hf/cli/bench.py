"""Measure how fast this machine embeds slides, stage by stage, and beside the paper's encoders."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xmag_hf.atomic_write import write_atomically
from xmag_hf.cli.options import add_options, new_file, read_options
from xmag_hf.cli.progress import slides_bar
from xmag_hf.cli.slides import add_model_argument, add_slide_arguments, named_sources
from xmag_hf.data_builders import CorpusError
from xmag_hf.embedding.bench import (
    BenchOptions,
    EncoderTiming,
    PassTiming,
    bench,
)
from xmag_hf.embedding.embed import check_sources
from xmag_hf.embedding.options import EmbedError, EmbedOptions

EXAMPLE = "xmag bench slides/*.svs --model xmag_folder --json bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_slide_arguments(parser)
    add_model_argument(parser)
    add_options(parser, BenchOptions)
    add_options(parser, EmbedOptions)
    parser.add_argument("--json", type=new_file, metavar="F", help="write everything measured")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure and print; 0 if every slide could be embedded, else 1."""
    from transformers.utils.logging import disable_progress_bar

    try:
        options, what = read_options(EmbedOptions, args), read_options(BenchOptions, args)
        sources = named_sources(args)
        check_sources(sources)
    except (CorpusError, EmbedError) as error:
        parser.error(str(error))
    if args.quiet:
        disable_progress_bar()  # transformers' own, while weights are loaded
    with slides_bar(args.quiet, "patches") as progress:
        report = bench(sources, args.model, options, what, progress=progress)
    console = Console()
    machine = report.machine
    said = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {report.precision}"
    console.print(said, markup=False)
    console.print(_passes(report.passes))
    console.print(_encoders(report.encoders, report.matrix_product_rate))
    if args.json is not None:
        content = json.dumps(dataclasses.asdict(report), indent=1)
        write_atomically(args.json, f"{content}\n")
    return 0 if all(timing.slides == len(sources) for timing in report.passes) else 1


def _passes(timings: tuple[PassTiming, ...]) -> Table:
    table = Table(title="seconds a slide (stages overlap; reading is summed over threads)")
    table.add_column("")
    for timing in timings:
        table.add_column(timing.name, justify="right")
    rows: dict[str, list[Any]] = {
        "slides": [timing.slides for timing in timings],
        "patches": [f"{timing.patches:,}" for timing in timings],
    }
    for stage in timings[0].stages:
        rows[stage] = [f"{timing.stages[stage]:.3f}" for timing in timings]
    rows["wall"] = [f"{timing.wall_seconds / timing.slides:.3f}" for timing in timings]
    rows["slides/min"] = [f"{timing.slides_per_minute:.2f}" for timing in timings]
    rows["patches/s"] = [f"{timing.patches_per_second:.1f}" for timing in timings]
    for name, cells in rows.items():
        table.add_row(name, *map(str, cells))
    return table


def _encoders(timings: tuple[EncoderTiming, ...], rate: float) -> Table:
    title = f"encoding alone; matrix products here: {rate / 1e9:,.0f} GFLOP/s"
    table = Table(title=title)
    table.add_column("")
    for row in timings:
        table.add_column(escape(row.name), justify="right")
    slides = [row.slide_seconds for row in timings]
    rows = {
        "million parameters": [f"{row.params_m:.1f}" for row in timings],
        "GFLOP a patch": [f"{row.gflops:.2f}" for row in timings],
        "patches timed": [str(row.sample) for row in timings],
        "patches/s": [f"{row.patches_per_second:.2f}" for row in timings],
        "of matrix products": [f"{row.share:.0%}" for row in timings],
    }
    if any(slides):
        rows |= {
            "patches a slide": ["" if r.patches is None else f"{r.patches:,}" for r in timings],
            "s/slide": ["" if s is None else f"{s:.2f}" for s in slides],
            "slides/min": ["" if s is None else f"{60 / s:.2f}" for s in slides],
            "s/slide, paper": [
                "" if r.paper_seconds is None else f"{r.paper_seconds:.2f}" for r in timings
            ],
        }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table

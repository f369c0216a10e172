"""Cut slides into pairs of 20x and 5x images of the same tissue: a Parquet data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xmag_hf.cli.options import add_options, add_workers, read_options
from xmag_hf.cli.progress import slides_bar
from xmag_hf.data_builders import CorpusError, CorpusOptions, SlideRow, find_slides, read_slides_csv
from xmag_hf.data_builders.build import CorpusSummary, build_corpus
from xmag_hf.data_builders.card import count_cancer_types
from xmag_hf.data_builders.slide_list import with_csv_metadata
from xmag_hf.data_builders.tcga import TCGA_CORPUS, tcga_slides

EXAMPLE = "xmag corpus slides/*.svs --out corpus --stride 448 --slides-csv slides.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("slides", nargs="*", metavar="SLIDES", help="files, folders or globs")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the corpus")
    add_options(parser, CorpusOptions)
    parser.add_argument(
        "--slides-csv",
        type=Path,
        metavar="F",
        help="columns slide (path) or slide_id; patient_id, cancer_type, mpp, source, others",
    )
    parser.add_argument(
        "--slides-dir", type=Path, metavar="DIR", help="where the CSV's or manifest's slides are"
    )
    add_workers(parser)
    tcga = parser.add_argument_group("TCGA", f"{TCGA_CORPUS.note}")
    tcga.add_argument("--preset", choices=["tcga"], help="slides from a GDC manifest")
    tcga.add_argument("--manifest", type=Path, metavar="F", help="GDC manifest (TSV)")
    tcga.add_argument(
        "--sample-sheet", type=Path, metavar="F", help="GDC sample sheet (TSV): cancer types"
    )
    tcga.add_argument(
        "--projects", nargs="+", default=(), metavar="ID", help="TCGA-BRCA ... (default: all)"
    )
    tcga.add_argument(
        "--skip-missing", action="store_true", help="leave out slides that are not downloaded yet"
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Build the corpus; 0 if every slide was used or has no tissue, else 1."""
    try:
        options = read_options(CorpusOptions, args)
        if args.workers < 1:
            raise CorpusError(f"--workers {args.workers}: at least 1.")
        slides = _slides(args)
    except CorpusError as error:
        parser.error(str(error))
    with slides_bar(args.quiet, "regions") as progress:
        summary = build_corpus(slides, args.out, options, workers=args.workers, progress=progress)
    _print_summary(summary)
    return 1 if summary.problems else 0


def _slides(args: argparse.Namespace) -> list[SlideRow]:
    if args.preset == "tcga":
        if args.manifest is None or args.slides_dir is None or args.slides or args.slides_csv:
            raise CorpusError(
                "--preset tcga takes --manifest and --slides-dir (and --sample-sheet for cancer "
                "types), and neither SLIDES nor --slides-csv."
            )
        return tcga_slides(
            args.manifest,
            args.slides_dir,
            sample_sheet=args.sample_sheet,
            projects=args.projects,
            skip_missing=args.skip_missing,
        )
    if args.manifest or args.sample_sheet or args.projects or args.skip_missing:
        raise CorpusError(
            "--manifest, --sample-sheet, --projects and --skip-missing need --preset tcga."
        )
    if args.slides and args.slides_csv:
        return with_csv_metadata(find_slides(args.slides), args.slides_csv)
    if args.slides_csv:
        return read_slides_csv(args.slides_csv, args.slides_dir)
    if not args.slides:
        raise CorpusError("No slides. Name files, folders or globs, or give --slides-csv.")
    return find_slides(args.slides)


def _print_summary(summary: CorpusSummary) -> None:
    console = Console()
    table = Table(title=f"{summary.pairs:,} pairs in {summary.path}")
    table.add_column("cancer type")
    for name in ("slides", "patients", "pairs"):
        table.add_column(name, justify="right")
    for count in count_cancer_types(summary.records):
        table.add_row(
            count.cancer_type, f"{count.slides:,}", f"{count.patients:,}", f"{count.pairs:,}"
        )
    console.print(table)
    no_tissue = [record.slide_id for record in summary.records if record.status == "no_tissue"]
    if no_tissue:
        console.print(f"no tissue: {', '.join(no_tissue)}", markup=False)
    for record in summary.problems:
        text = record.reason or f"{record.slide_id}: {record.first_unreadable}"
        console.print(f"{record.status}: {text}", markup=False, soft_wrap=True)
    if summary.already_done:
        console.print("Already done; nothing was built.")
        if summary.problems:
            console.print(f"To try the slides above again, remove {summary.path} first.")
    console.print(f"fingerprint {summary.fingerprint[:16]}; load_dataset({str(summary.path)!r})")

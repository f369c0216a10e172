"""Say what slides are: size, levels, um/px, tissue, and their patches at 5x and 20x."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io

from xmag_hf.atomic_write import write_atomically
from xmag_hf.cli.options import new_file
from xmag_hf.cli.slides import add_slide_arguments, named_sources
from xmag_hf.data_builders import CorpusError
from xmag_hf.embedding.describe import SlideDescription, describe_slide
from xmag_hf.embedding.options import EmbedError, EmbedOptions
from xmag_hf.embedding.sources import SLIDE_FAULTS, reason_of, status_of

EXAMPLE = "xmag info slides/*.svs --csv cohort.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_slide_arguments(parser)
    parser.add_argument(
        "--slide-mpp", type=float, metavar="F", help="um/px of level 0; overrules the files"
    )
    parser.add_argument(
        "--tissue",
        type=float,
        default=EmbedOptions().tissue,
        metavar="F",
        help="least share of a patch that is tissue (default: %(default)s)",
    )
    parser.add_argument(
        "--patch-px",
        type=int,
        default=224,
        metavar="PX",
        help="side of a patch at 2 um/px (default: %(default)s)",
    )
    parser.add_argument(
        "--patch-px-20x",
        type=int,
        default=256,
        metavar="PX",
        help="side of a patch at 0.5 um/px (default: %(default)s, as cut for Phikon and UNI2)",
    )
    parser.add_argument("--csv", type=new_file, metavar="F", help="write a line a slide")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print and write; 0 if every slide could be described, else 1."""
    try:
        options = EmbedOptions(tissue=args.tissue, slide_mpp=args.slide_mpp, patch_px=args.patch_px)
        EmbedOptions(patch_px=args.patch_px_20x)
        sources = named_sources(args)
    except (CorpusError, EmbedError) as error:
        parser.error(str(error))
    found: list[SlideDescription] = []
    failed = 0
    for source in sources:
        if source.mpp is None:
            source = dataclasses.replace(source, mpp=options.slide_mpp)
        try:
            description = describe_slide(
                source,
                patch_px_5x=args.patch_px,
                patch_px_20x=args.patch_px_20x,
                least_tissue=options.tissue,
            )
        except SLIDE_FAULTS as error:
            failed += 1
            print(f"{status_of(error)}: {reason_of(source.slide_id, error)}", flush=True)
            continue
        found.append(description)
        _print(description)
    _print_totals(found)
    if args.csv is not None and found:
        write_atomically(args.csv, _csv(found))
    return 1 if failed else 0


def _print(slide: SlideDescription) -> None:
    level = "too coarse for 5x" if slide.level_5x is None else f"5x from level {slide.level_5x}"
    levels = ", ".join(f"{mpp:.4g}" for mpp in slide.level_mpps)
    ratio = "" if slide.ratio is None else f" ({slide.ratio:.1f} times as many)"
    print(
        f"{slide.slide_id}: {slide.format}, {slide.bytes:,} bytes, {slide.width:,} x "
        f"{slide.height:,} px, objective {slide.objective or 'not given'}\n"
        f"  um/px {slide.mpp0:.4g} ({slide.mpp_source}), levels {levels}; {level}\n"
        f"  tissue {slide.tissue_mm2:.1f} mm2; patches {slide.patches_5x:,} at 5x, "
        f"{slide.patches_20x:,} at 20x{ratio}",
        flush=True,  # a cohort takes hours
    )


def _print_totals(found: list[SlideDescription]) -> None:
    if len(found) > 1:
        at_5x, at_20x = (sum(getattr(s, f"patches_{m}") for s in found) for m in ("5x", "20x"))
        times = f" ({at_20x / at_5x:.1f} times as many)" if at_5x else ""
        print(f"{len(found)} slides: {at_5x:,} patches at 5x, {at_20x:,} at 20x{times}")


def _csv(found: list[SlideDescription]) -> str:
    rows = []
    for slide in found:
        row = dataclasses.asdict(slide) | {"ratio": slide.ratio}
        row["level_mpps"] = " ".join(f"{mpp:.6g}" for mpp in slide.level_mpps)
        rows.append(row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()

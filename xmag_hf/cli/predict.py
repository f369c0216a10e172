"""Ask a head about slides: class probabilities as CSV, from stored bags or from the slides.

Give bags (files, or folders of them), or slides, which are embedded as the head wants them; where
no table names the head's encoder, --model says where it is. Both at once is not possible.
"""

from __future__ import annotations

import argparse
import csv
import signal
from pathlib import Path

from xmag_hf.cli.options import new_file, read_options
from xmag_hf.cli.progress import counting_bars
from xmag_hf.cli.slides import add_head_arguments, add_slide_arguments, named_sources
from xmag_hf.data_builders import CorpusError
from xmag_hf.embedding.embed import check_sources
from xmag_hf.embedding.options import EmbedError, EmbedOptions

EXAMPLE = "xmag predict bags/ --head study/head --out predictions.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Bags or slides, the head, and how slides are read."""
    add_slide_arguments(
        parser,
        "BAGS_OR_SLIDES",
        "files, or folders: one with .h5 files is a folder of bags, any other is searched for "
        "slides; slides also by globs",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=new_file,
        metavar="CSV",
        help="gets a line a slide, once all are done; what a stopped run had is in CSV.partial",
    )
    add_head_arguments(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the CSV and print it; 1 if a slide with tissue has no answer, or lost patches."""
    from transformers.utils.logging import disable_progress_bar

    from xmag_hf.mil.predict import (
        check_replaceable,
        load_head,
        predict_bags,
        predict_slides,
        write_answers,
    )
    from xmag_hf.mil.training_slides import warn_of_training_slides

    disable_progress_bar()
    bags = _bags(args, parser)
    partial = args.out.with_name(f"{args.out.name}.partial")
    for path in (args.out, partial):
        check_replaceable(path)
    if bags:
        model = load_head(args.head)
        answers, names = predict_bags(model, bags), [path.stem for path in bags]
    else:
        try:
            options, sources = read_options(EmbedOptions, args), named_sources(args)
            check_sources(sources)
        except (CorpusError, EmbedError) as error:
            parser.error(str(error))
        model = load_head(args.head)
        answers = predict_slides(model, sources, args.model, options)
        names = [source.slide_id for source in sources]
    warn_of_training_slides(args.head, names)
    told = []
    classes = [model.config.id2label[n] for n in range(model.config.num_labels)]
    # SIGTERM, a scheduler's warning before it kills, then ends the loop as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with counting_bars(args.quiet) as advance:
            for answer in answers:
                told.append(answer)
                advance("slides", 1, len(names))
    finally:  # what hours have given is kept, and an older file of all slides too
        signal.signal(signal.SIGTERM, before)
        kept = _answers(partial)  # of an earlier run that was stopped later
        if len(told) == len(names) or len(told) > kept:
            write_answers(partial, classes, told)
        if len(told) < len(names):
            kept = max(kept, len(told))
            print(f"{partial}: {kept} of {len(names)} slides; the rest was not reached")
    partial.replace(args.out)
    for answer in told:
        if answer.prediction is not None:
            share = answer.prediction.probabilities.max()
            print(f"{answer.slide_id}: {answer.prediction.label} {share:.3f}")
        if answer.reason:
            what = "skipped" if answer.skipped else "incomplete" if answer.prediction else "failed"
            print(f"{what}: {answer.reason}")
    print(f"-> {args.out}")
    return int(any(answer.problem for answer in told))


def _answers(path: Path) -> int:
    """Slides in a file of answers; 0 if it is not there."""
    if not path.exists():
        return 0
    with path.open(newline="", encoding="utf-8") as stream:
        return sum(1 for _ in csv.reader(stream)) - 1


def _bags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Path]:
    """Bags that are named, or lie in named folders; none if slides are meant."""
    found: list[Path] = []
    others = ["--slides-csv"] if args.slides_csv else []
    for name in args.slides:
        path = Path(name)
        bags = sorted(path.glob("[!.]*.h5")) if path.is_dir() else [path] * (path.suffix == ".h5")
        found += bags
        others += [] if bags else [name]
    if found and others:
        parser.error(
            f"{found[0]} is a bag, and {others[0]} is none. Bags and slides take a command each."
        )
    first: dict[str, Path] = {}
    for path in found:
        if first.setdefault(path.stem, path) != path:
            parser.error(f"{first[path.stem]} and {path}: two bags of one name. Keep one of them.")
    return found

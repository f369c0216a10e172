"""Compute the teacher features of a paired corpus once, so that training needs no teacher.

Start it on several machines or GPUs at once with --rank 0, 1, ... and the same --world: each does
its share of the shards, and the last to end completes the cache. On two GPUs of one machine that is
--world 2 --rank 0 --device cuda:0 and --world 2 --rank 1 --device cuda:1. Stop and start it at any
moment; `xmag distill --cache-teacher` with the same options then finds it. --push-to-hub sends it
to the corpus's own data set repository (--hub-model-id ORG/NAME); training on the corpus from there
pulls it shard by shard.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from xmag_hf.cli.options import add_options, read_options
from xmag_hf.distillation.options import DistillOptions

if TYPE_CHECKING:
    from xmag_hf.distillation.cache_run import CacheReport

EXAMPLE = "xmag cache --data corpus --teacher uni2-h --world 2 --rank 1 --device cuda:1"
USED = {
    *("data", "teacher", "teacher_view", "cache_dir", "cache_views", "share_sub_patches"),
    *("teacher_precision", "teacher_batch_size", "num_workers", "streaming"),
    *("push_to_hub", "hub_model_id", "hub_private"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `DistillOptions` that a cache depends on, and the share of this process."""
    names = [field.name for field in dataclasses.fields(DistillOptions)]
    add_options(parser, DistillOptions, skip=tuple(name for name in names if name not in USED))
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="share of this process")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="TEXT",
        help="of the teacher in this process: cpu, cuda:0, cuda:1, ...; auto is the first GPU if "
        "there is one (default: auto)",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Fill the cache and say what it costs."""
    import torch
    from rich.progress import Progress

    from xmag_hf.distillation.cache_run import fill_cache
    from xmag_hf.distillation.teacher import best_device
    from xmag_hf.embedding.options import EmbedError
    from xmag_hf.embedding.run import checked_device

    options = read_options(DistillOptions, args, cache_teacher=True)
    try:
        auto = args.device == "auto"
        device = best_device() if auto else torch.device(checked_device(args.device))
    except EmbedError as error:
        parser.error(str(error))
    with Progress(disable=args.quiet) as bar:
        task = bar.add_task("pairs", total=None)
        report = fill_cache(
            options,
            device,
            rank=args.rank,
            world=args.world,
            advance=lambda pairs: bar.advance(task, pairs),
        )
    _print_report(report)
    if not options.push_to_hub:
        return 0
    if report.missing:
        print("Not pushed: run this again when no shard is missing.")
        return 1
    return _push(report.folder, options, args.quiet)


def _push(folder: Path, options: DistillOptions, quiet: bool) -> int:
    """Send the cache to the corpus's repository, where training looks for it."""
    from rich.progress import Progress

    from xmag_hf.distillation.hub_cache import push_cache

    repository = str(options.hub_model_id)
    with Progress(disable=quiet) as bar:
        task = bar.add_task("files", total=None)
        sent = push_cache(
            folder,
            repository,
            private=options.hub_private,
            advance=lambda files: bar.advance(task, files),
        )
    print(f"{sent} files sent to {repository}, teacher/{folder.name}.")
    return 0


def _print_report(report: CacheReport) -> None:
    if report.missing:
        print(f"{report.folder}: {report.missing} shards are left to other processes.")
    else:
        print(f"{report.folder} is complete.")
    if not report.pairs:
        print("Nothing was left to do for this process.")
        return
    hours = 1e6 * report.seconds / report.pairs / 3600
    gigabytes = 1e6 * report.bytes_per_pair / 1e9
    print(
        f"{report.pairs} pairs in {report.seconds:.1f} s, {report.bytes_per_pair:.0f} bytes each."
    )
    print(
        f"Extrapolated from these {report.pairs}: a million pairs would take {hours:.1f} hours in "
        f"one such process, and {gigabytes:.1f} GB."
    )

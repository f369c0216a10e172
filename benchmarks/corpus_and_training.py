"""Pairs/s of the corpus builder; steps/s and data wait of training, live and cached teacher.

    python benchmarks/corpus_and_training.py SLIDE [--student lite] [--steps 12]

Every figure comes from this run on this machine; compare them with each other, as ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import datasets
import torch
from rich.console import Console
from rich.table import Table

from xmag_hf.data_builders import CorpusOptions, SlideRow
from xmag_hf.data_builders.build import build_corpus
from xmag_hf.distillation.options import DistillOptions
from xmag_hf.distillation.trainer import distill
from xmag_hf.host_memory import keep_freed_memory


def main() -> int:
    """Build a corpus, train on it twice, print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slide")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--student", default="lite")
    parser.add_argument("--stride", type=int, default=448, help="px at 0.5 um/px")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    args = parser.parse_args()
    table = Table(title=f"{Path(args.slide).name}, teacher {args.teacher}, student {args.student}")
    for heading in ("what", "rate", "waiting for data"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"  # the mapped copy goes, too
        corpus = str(Path(folder) / "corpus")
        began = time.perf_counter()
        summary = build_corpus(
            [SlideRow(Path(args.slide))], corpus, CorpusOptions(stride=args.stride), workers=1
        )
        rate = summary.pairs / (time.perf_counter() - began)
        table.add_row(f"corpus, {summary.pairs} pairs, one process", f"{rate:.1f} pairs/s", "")
        for cached in (False, True):
            wait, pairs_per_second = train(args, corpus, folder, cached)
            name = "cached" if cached else "live"
            steps = pairs_per_second / args.batch_size
            table.add_row(
                f"training, {name} teacher, batch {args.batch_size}",
                f"{steps:.2f} steps/s ({pairs_per_second:.1f} pairs/s)",
                f"{100 * wait:.0f}%",
            )
    console = Console()
    console.print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("xmag-hf", "torch", "timm"))
    console.print(f"{device}, {os.cpu_count()} cores, {versions}")
    return 0


def train(args: argparse.Namespace, corpus: str, folder: str, cached: bool) -> tuple[float, float]:
    """Data-wait share and pairs/s of the step with the median rate, after the first quarter."""
    out = str(Path(folder) / f"out-{cached}")
    options = DistillOptions(
        data=corpus,
        teacher=args.teacher,
        student=args.student,
        init=None if args.student == "lite" else "random",
        output_dir=out,
        batch_size=args.batch_size,
        max_steps=args.steps,
        num_workers=args.workers,
        cache_teacher=cached,
        log_steps=1,
        checkpoint_steps=args.steps,
    )
    distill(options)
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    lines = sorted(lines[len(lines) // 4 :], key=lambda line: line["pairs_per_second"])
    middle = lines[len(lines) // 2]
    return middle["data_wait_share"], middle["pairs_per_second"]


if __name__ == "__main__":
    sys.exit(main())

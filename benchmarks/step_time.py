"""Time of a training step with and without each measure that should make it cheaper.

    python benchmarks/step_time.py CORPUS [--student lite] [--batch-size 16] [--rounds 3]

Rows change one thing against "as trained": cached teacher, channels last, loader processes, the
default optimiser, float32 on a CPU. All rows take turns in one run, `--rounds` times, each turn a
fresh loader, some steps to warm up and some that are timed; the median over all of them is shown,
as a ratio too. Each row's share of time spent waiting for data is of the same steps.
`torch.compile` compiles once, before the turns, within `--compile-limit` seconds, or is left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from xmag_hf.distillation.corpus import Corpus, open_corpus
from xmag_hf.distillation.distiller import Distiller, prepare_batch
from xmag_hf.distillation.loss import DistillationLoss
from xmag_hf.distillation.options import DistillOptions
from xmag_hf.distillation.pairs import PairReader, Placement, batches
from xmag_hf.distillation.scoring import PixelStatistics
from xmag_hf.distillation.teacher import best_device
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    build_cache,
    finish_cache,
    teacher_identity,
)
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.modeling.convert import build_student, image_processor_for


@dataclass
class Row:
    """One way to train.

    Attributes:
        name: In the table.
        cached: Whether the teacher's features are.
        workers: Loader processes.
        channels_last: Memory format of student and pixels.
        fused: AdamW's implementation.
        bf16: Autocast of the student.
        compiled: torch.compile of the student.
    """

    name: str
    cached: bool = True
    workers: int = 1
    channels_last: bool = True
    fused: bool = False
    bf16: bool = False
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


ROWS = (
    Row("as trained"),
    Row("live teacher", cached=False),
    Row("no loader process", workers=0),
    Row("two loader processes", workers=2),
    Row("contiguous memory format", channels_last=False),
    Row("fused AdamW", fused=True),
    Row("bf16 autocast", bf16=True),
    Row("torch.compile", compiled=True),
)


def main() -> int:
    """Let the rows take turns, print one table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", help="folder made by xmag corpus")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--student", default="lite")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed in each turn")
    parser.add_argument("--rows", nargs="+", default=[], help="names; default all")
    parser.add_argument("--compile-limit", type=int, default=180, metavar="S")
    parser.add_argument("--cache-dir", help="complete or to be filled; default: temporary")
    args = parser.parse_args()
    device = best_device()
    corpus = open_corpus(args.corpus)
    teacher = load_encoder(args.teacher, device=device)
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "datasets"  # the mapped copy goes, too
        features = cached_features(corpus, teacher, Path(args.cache_dir or folder))
        trainers = [Trainer(row, args, corpus, teacher, features, device) for row in rows]
        trainers = [trainer for trainer in trainers if trainer.ready(args.compile_limit)]
        for _ in range(args.rounds):
            for trainer in trainers:
                trainer.turn(args.steps)
    report(args, [trainer.row for trainer in trainers], device)
    return 0


def cached_features(corpus: Corpus, teacher: Encoder, folder: Path) -> TeacherFeatures:
    """The teacher's features, computed if they are not there."""
    identity = teacher_identity(teacher, corpus)
    if not (folder / identity.key).is_dir():
        finish_cache(build_cache(corpus, teacher, folder))
    return TeacherFeatures(folder / identity.key, corpus, identity)


class Trainer:
    """A student, its optimiser and the way it is fed; a step is the trainer's, without EMA."""

    def __init__(
        self,
        row: Row,
        args: argparse.Namespace,
        corpus: Corpus,
        teacher: Encoder,
        features: TeacherFeatures,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self.row, self.corpus, self.device = row, corpus, device
        self.encoder = None if row.cached else teacher
        self.options = DistillOptions(
            data=args.corpus,
            teacher=args.teacher,
            student=args.student,
            batch_size=args.batch_size,
            num_workers=row.workers,
            cache_teacher=row.cached,
        )
        self.reader = PairReader.of(self.options, features if row.cached else None, corpus)
        student = build_student(args.student, None if args.student == "lite" else "random")
        self.pixels = PixelStatistics.of(image_processor_for(student))
        self.format = torch.channels_last if row.channels_last else torch.contiguous_format
        student.to(device=device, memory_format=self.format)  # type: ignore[call-overload]
        loss = DistillationLoss(student.config.hidden_size, features.teacher_dim).to(device)
        module: nn.Module = Distiller(student, loss).train()
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=row.fused)
        self.module: Any = torch.compile(module) if row.compiled else module

    def ready(self, limit_s: int) -> bool:
        """Compile what is to be compiled; False if that fails or takes too long."""
        if not self.row.compiled:
            return True
        try:
            began = time.perf_counter()
            with deadline(limit_s):
                self._run(1, timed=False)
            print(f"torch.compile took {time.perf_counter() - began:.0f} s, first step included")
        except (RuntimeError, TimeoutError) as error:
            print(f"torch.compile left out: {str(error).splitlines()[0]}")
            return False
        return True

    def turn(self, steps: int) -> None:
        """A fresh loader, steps until its processes have no head start, then timed ones."""
        self._run(steps, timed=True)

    def _run(self, steps: int, *, timed: bool) -> None:
        # Two batches per process are loaded ahead while the first step still runs.
        unseen = 1 + 2 * self.row.workers if timed else 0
        loader = batches(
            self.corpus,
            np.arange(len(self.corpus.index)),
            self.reader,
            self.options,
            Placement(),
            start=0,
            stop=unseen + steps,
        )
        with closing(loader):  # type: ignore[type-var]
            for number in range(unseen + steps):
                began = time.perf_counter()
                batch = {k: v.to(self.device) for k, v in next(loader).items()}
                waited = time.perf_counter() - began
                self._step(batch)
                if timed and number >= unseen:
                    self.row.seconds.append(time.perf_counter() - began)
                    self.row.waited.append(waited)

    def _step(self, batch: dict[str, torch.Tensor]) -> None:
        view, targets = prepare_batch(batch, self.pixels, self.encoder, 128)
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16) if self.row.bf16 else nullcontext():
            loss = self.module(view.contiguous(memory_format=self.format), targets)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if kind == "cuda":
            torch.cuda.synchronize()


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so many seconds."""

    def ring(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def report(args: argparse.Namespace, rows: list[Row], device: torch.device) -> None:
    """Median step, ratio to the first row, share of time waited."""
    table = Table(title=f"student {args.student}, batch {args.batch_size}, {args.teacher}")
    headings = ("", "s a step", "quartiles", f"times {rows[0].name!r}", "waiting for data")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    base = statistics.median(rows[0].seconds)
    for row in rows:
        low, middle, high = np.percentile(row.seconds, [25, 50, 75])
        wait = sum(row.waited) / sum(row.seconds)
        spread = f"{low:.2f}-{high:.2f}"
        table.add_row(row.name, f"{middle:.2f}", spread, f"{middle / base:.2f}", f"{wait:.0%}")
    console = Console()
    console.print(table)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in ("xmag-hf", "torch"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) for the step, load "
        f"{load} at the end, {len(rows[0].seconds)} timed steps a row, {versions}"
    )


if __name__ == "__main__":
    raise SystemExit(main())

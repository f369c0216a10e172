"""Time of a five-fold ABMIL study on generated bags: 1,000 of 554 x 768 float16, 20 epochs.

    python benchmarks/mil_1000_bags.py [--folds-run 1 --epochs 2] [--jobs 2]

Without options everything is run, as `xmag mil` runs it. With --folds-run and --epochs a part is
trained, and the rest is extrapolated: every fold and epoch costs the same, since early stopping is
off. The bags' share of shifted patches decides their class, so that training has something to do.
Prints seconds and CPU seconds of generating, checking, training and reporting.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from xmag_hf.embedding import Bag, BagInfo, write_bag
from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.mil import HeadOptions, StudyOptions, run_study
from xmag_hf.mil.bags import LabelledBags
from xmag_hf.mil.folds import make_folds, validation_rows
from xmag_hf.mil.labels import class_names, join, read_labels
from xmag_hf.mil.train import predict_head, train_head

INFO = BagInfo(encoder="generated", encoder_revision="0", pooling="cls", mpp=2.0, patch_px=224)


def generate(folder: Path, slides: int, patches: int, columns: int) -> Path:
    """Bags and labels.csv; every second slide has a tenth of its patches shifted."""
    (folder / "bags").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["slide_id,patient_id,label"]
    direction = rng.standard_normal(columns, dtype=np.float32)
    for number in range(slides):
        features = rng.standard_normal((patches, columns), dtype=np.float32)
        label = number % 2
        features[: patches // 10] += 0.5 * label * direction
        name = f"slide-{number:05d}"
        coords = np.zeros((patches, 2), np.int64)
        bag = Bag(name, features.astype(np.float16), coords, INFO)
        write_bag(folder / "bags" / f"{name}.h5", bag)
        lines.append(f"{name},patient-{number},{'ab'[label]}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print seconds of a step, and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:<44}{wall:8.1f} s {cpu:8.1f} CPU s", flush=True)


def part(folder: Path, head: HeadOptions, folds_run: int, epochs: int) -> None:
    """Train a part on one thread, as one of several processes would, and extrapolate."""
    torch.set_num_threads(1)
    rows = read_labels(folder / "labels.csv")
    with timed("bags read once and checked"):
        cohort = join("internal", rows, [folder / "bags"], class_names(rows))
    folds = make_folds(cohort, 5, 0)
    bags: LabelledBags = cohort.labelled(0)
    shorter = dataclasses.replace(head, epochs=epochs)
    device = torch.device("cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    for fold in range(folds_run):
        outside = folds != fold
        validation = validation_rows(cohort, outside, 0.2, 0)
        training = bags.rows(outside & ~validation)
        with timed(f"fold {fold}, {epochs} epochs of {len(training)} slides"):
            model, trained = train_head(
                "abmil", cohort.classes, training, bags.rows(validation), shorter,
                device=device, seed=fold,
            )  # fmt: skip
            right = predict_head(model, bags.rows(~outside), shorter, device)[0].argmax(1)
        share = (right == cohort.labels[~outside]).mean()
        print(f"  loss {trained.history[-1].validation_loss:.3f}, accuracy {share:.3f}")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    factor = 5 / folds_run * head.epochs / epochs
    print(
        f"five folds of {head.epochs} epochs: {cpu * factor:.0f} CPU s, so "
        f"{cpu * factor / 60 / 2:.1f} min on 2 cores of which each trains a fold "
        f"(by wall time, at this load: {wall * factor / 60 / 2:.1f})"
    )


def main() -> None:
    """Generate, train, tell."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (
        ("slides", 1000), ("patches", 554), ("columns", 768), ("epochs", 20), ("folds-run", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--jobs", type=int, default=None)
    args = parser.parse_args()
    head = HeadOptions(hidden_dim=512, attention_dim=256, epochs=20, patience=0)
    with tempfile.TemporaryDirectory() as name:
        with timed(f"{args.slides} bags of {args.patches} x {args.columns}, generated"):
            folder = generate(Path(name) / "made", args.slides, args.patches, args.columns)
        if args.folds_run < 5 or args.epochs < head.epochs:
            part(folder, head, args.folds_run, args.epochs)
            return
        options = StudyOptions(
            labels=str(folder / "labels.csv"), out=str(Path(name) / "study"), jobs=args.jobs
        )
        with timed("the whole study, report included"):
            result = run_study([folder / "bags"], options, head)
        print({score.metric: round(score.interval.estimate, 3) for score in result.scores})


if __name__ == "__main__":
    main()

"""Time and memory of a probe on features of SPIDER-Breast's size, generated.

    nice -n 5 python benchmarks/probe_80k.py [--train 64000 --validation 16000 --test 12000]

80,000 x 1,536 float32 to learn from (of which a fifth chooses C) and 12,000 to be asked about, 18
classes. Columns are correlated as embeddings' are: a random rotation of directions whose standard
deviation falls with k^-0.5, class means apart in the first forty. Prints the seconds of every step
(learning, intervals, paired tests against a second row, writing predictions) and the peak of
resident memory, features included.
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from xmag_hf.evaluation import accuracy
from xmag_hf.probing.images import ImageSplit, LabelledImages
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.protocols import Predictions, official_split
from xmag_hf.probing.report import FEW_SHOT_DIGITS
from xmag_hf.probing.scoring import FEW_SHOT, class_questions, compare, score
from xmag_hf.reporting.predictions import write_class_predictions
from xmag_hf.reporting.records import EXACT_DIGITS

SLIDES = 400
SEPARATION = 0.35  # of class means, in standard deviations: accuracy ends near that of the paper


def generate(rows: int, columns: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) float32 features and labels; the same classes whatever the seed."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    scale = (np.arange(1, columns + 1) ** -0.5).astype(np.float32)
    rotation = np.linalg.qr(fixed.standard_normal((columns, columns), dtype=np.float32))[0]
    means = fixed.standard_normal((classes, columns), dtype=np.float32) * SEPARATION
    means[:, 40:] = 0
    labels = rng.integers(0, classes, rows)
    x = np.empty((rows, columns), dtype=np.float32)
    for first in range(0, rows, 4000):
        own = labels[first : first + 4000]
        drawn = rng.standard_normal((len(own), columns), dtype=np.float32) + means[own]
        x[first : first + 4000] = (drawn * scale) @ rotation
    return x, labels


def split_of(name: str, labels: np.ndarray) -> ImageSplit:
    """A split without pixels."""
    number = np.arange(len(labels))
    return ImageSplit(
        ids=np.char.add(f"{name}-", number.astype(str)),
        labels=labels,
        groups=np.char.add(f"{name}-slide-", (number % SLIDES).astype(str)),
        mpp=np.full(len(labels), 2.0),
        read=lambda index: b"",
    )


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the seconds of a step, and the peak of memory so far."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<34}{seconds:8.1f} s   peak so far {peak:.2f} GiB", flush=True)


def main() -> None:
    """Generate, probe, score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (
        ("train", 64000), ("validation", 16000), ("test", 12000), ("columns", 1536),
        ("classes", 18), ("samples", 1000),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", default=["linear", "knn", "few-shot"])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    for pool in threadpool_info():
        print(f"{pool['internal_api']}: {pool['num_threads']} threads")
    sizes = {name: getattr(args, name) for name in ("train", "validation", "test")}
    with timed("generating features"):
        made = {
            name: generate(rows, args.columns, args.classes, seed)
            for seed, (name, rows) in enumerate(sizes.items(), 1)
        }
    features = {name: x for name, (x, _) in made.items()}
    splits = {name: split_of(name, labels) for name, (_, labels) in made.items()}
    names = tuple(f"class {number:02d}" for number in range(args.classes))
    images = LabelledImages("generated", "0" * 64, splits, names)
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            options = ProbeOptions(data="generated", methods=(method,), out=str(Path(folder)))
            with timed(method):
                answers = official_split(features, images, options)
            for answer in answers:
                p = answer.probabilities
                told = p if p.ndim == 2 else p[0]
                share = accuracy(answer.labels, told.argmax(1))
                print(f"  {answer.method}: accuracy {share:.4f} {answer.details}")
            report(answers, args)


def report(answers: list[Predictions], args: argparse.Namespace) -> None:
    """Everything that follows the predictions: scores with intervals, and a test of two rows."""
    ours, other = [], []
    for answer in answers:
        p = answer.probabilities
        noisy = p + np.random.default_rng(0).normal(0, 0.02, p.shape).astype(p.dtype)
        for rows, name, own in ((ours, "a", p), (other, "b", noisy)):
            rows += class_questions(name, answer.method, answer.labels, own, answer.groups)
    for question in ours:
        with timed(f"{question.method} {question.metric}, intervals"):
            score(question, samples=args.samples, level=0.95, seed=0)
    with timed(f"{answers[0].method}: paired tests"):
        compare([ours, other], samples=args.samples, level=0.95, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        for answer in answers:
            classes = [str(number) for number in range(args.classes)]
            few = answer.method.startswith(FEW_SHOT)
            path = Path(folder) / f"{answer.method}.csv"
            with timed(f"{answer.method}: predictions"):
                write_class_predictions(
                    path, answer.ids, answer.groups, answer.labels, answer.probabilities, classes,
                    digits=FEW_SHOT_DIGITS if few else EXACT_DIGITS,
                )  # fmt: skip
            print(f"  {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

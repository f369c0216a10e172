"""Time and memory of a probe on features of SPIDER-Breast's size, generated.

    nice -n 5 python benchmarks/probe_80k.py [--train 64000 --validation 16000 --test 12000]

80,000 x 1,536 float32 to learn from (of which a fifth chooses C) and 12,000 to be asked about, 18
classes. Columns are correlated as embeddings' are: a random rotation of directions whose standard
deviation falls with k^-0.5, class means apart in the first forty. Prints the seconds of every step
and the peak of resident memory, features included.
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from xmag_hf.evaluation import accuracy, bootstrap_ci, f1, roc_auc
from xmag_hf.probing.images import ImageSplit, LabelledImages
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.protocols import official_split

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
                probabilities = answer.probabilities
                chosen = probabilities if probabilities.ndim == 2 else probabilities[0]
                print(
                    f"  {answer.method}: accuracy {accuracy(answer.labels, chosen.argmax(1)):.4f}"
                    f" {answer.details}"
                )
            if method == "linear":
                score(answers[0].labels, answers[0].probabilities, answers[0].groups, args)


def score(labels: np.ndarray, p: np.ndarray, groups: np.ndarray, args: argparse.Namespace) -> None:
    """Intervals of accuracy, macro F1 and macro AUC, by image and by slide."""
    macro_f1 = partial(f1, n_classes=args.classes)
    cases = {
        "accuracy": (accuracy, p.argmax(1)),
        "F1": (macro_f1, p.argmax(1)),
        "AUC": (roc_auc, p),
    }
    for name, (metric, predicted) in cases.items():
        for unit, clusters in (("image", None), ("slide", groups)):
            with timed(f"{name}, {args.samples} resamples by {unit}"):
                bootstrap_ci(metric, labels, predicted, clusters=clusters, samples=args.samples)


if __name__ == "__main__":
    main()

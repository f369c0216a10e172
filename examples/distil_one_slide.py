"""From one slide to a distilled encoder, and a picture of what it learnt. Needs no network.

Cuts the slide into 20x/5x pairs, computes the 20x teacher's features once, distils XMAG-lite on
the upper part of the slide, and tests it on the lower part, which no training region touches. One
small slide: this shows that everything works, not how good the method is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from transformers import AutoImageProcessor, AutoModel

import xmag_hf  # noqa: F401  (registers XMAG with the Auto classes)
from xmag_hf.cli.main import main as xmag
from xmag_hf.distillation.alignment import spatial_folds
from xmag_hf.distillation.corpus import (
    Corpus,
    PairIndex,
    count_disjoint,
    open_corpus,
    split_pairs,
)
from xmag_hf.distillation.scoring import PixelStatistics, embed_views, fit_maps, read_views
from xmag_hf.distillation.teacher_cache import TeacherFeatures, find_cache
from xmag_hf.modeling.convert import build_student
from xmag_hf.slides import open_slide

EMBEDDED = Path(__file__).parent / "data" / "CMU-1-Small-Region.svs"
BAND = "y>0.6"  # the lower 40% of the slide is kept for the test
TEACHER = "efficientnet-lite0"
THUMBNAIL_MPP = 4.0
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind eyes


def main() -> int:
    """Run the whole path and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slide", default=str(EMBEDDED), help="a slide OpenSlide reads")
    parser.add_argument("--out", default="xmag_demo/xmag", help="folder of the distilled encoder")
    parser.add_argument("--work", default="xmag_demo", help="folder of the corpus and the picture")
    parser.add_argument("--epochs", default="40")
    args = parser.parse_args()
    began = time.perf_counter()
    slide_id, corpus_dir = Path(args.slide).stem, f"{args.work}/corpus"
    run("corpus", args.slide, "--out", corpus_dir, "--stride", "224", "--quiet")
    options = {
        "--data": corpus_dir,
        "--teacher": TEACHER,
        "--student": "lite",
        "--epochs": args.epochs,
        "--batch-size": "8",
        "--learning-rate": "1e-3",
        "--holdout": f"{slide_id}:{BAND}",
        "--output-dir": args.out,
    }
    if Path(args.slide) == EMBEDDED:
        options["--data-licence"] = "CC0-1.0"
        options["--data-source"] = "OpenSlide's test data, CMU-1-Small-Region"
    # Turned views, though a cached teacher answers them by an approximation (docs/method.md):
    # without them the student learns these few pairs by heart.
    run("distill", "--cache-teacher", *(text for pair in options.items() for text in pair))

    corpus = open_corpus(corpus_dir)
    split = split_pairs(corpus.index, [f"{slide_id}:{BAND}"])
    held = split.held_out[f"{slide_id}:{BAND}"]
    print(
        f"{count_disjoint(corpus.index, held)} disjoint held-out regions: a smoke test, which "
        "shows that everything runs, and no evidence about the method."
    )

    # What anybody does with the result: load it, embed a 5x patch.
    model = AutoModel.from_pretrained(args.out)
    processor = AutoImageProcessor.from_pretrained(args.out)
    corner = float(corpus.index.x[held[0]]), float(corpus.index.y[held[0]])
    with open_slide(args.slide) as slide:
        patch = slide.read_region(corner, 224, mpp=model.config.mpp)
        thumbnail, thumbnail_mpp = slide.thumbnail(mpp=THUMBNAIL_MPP)
        scale = thumbnail_mpp / slide.mpp0  # level-0 px per thumbnail px
    with torch.no_grad():
        output = model(**processor(patch, return_tensors="pt"))
    print(f"\nAutoModel.from_pretrained({args.out!r}) -> {type(model).__name__}")
    print(f"a 5x patch {patch.shape} -> embedding {tuple(output.pooler_output.shape)}")

    picture = Path(args.work) / "similarity.png"
    draw(picture, thumbnail, scale, corpus, split.train, held, model, processor)
    print(
        f"\nMade in {time.perf_counter() - began:.0f} s: {args.out}/ (encoder, image processor, "
        f"card), {corpus_dir}/ (pairs and teacher features), {picture}.\n"
        "Next: your own slides with `xmag corpus SLIDES --out corpus`, then\n"
        "  accelerate launch train_distill.py --data corpus --teacher uni2-h --student base "
        "--cache_teacher"
    )
    return 0


def run(verb: str, *arguments: str) -> None:
    """Show a command, run it, stop if it fails."""
    print(f"\n$ xmag {verb} {shlex.join(arguments)}", flush=True)
    if xmag([verb, *arguments]):
        sys.exit(1)


def draw(
    picture: Path, thumbnail, scale: float, corpus: Corpus, train, held, model, processor
) -> None:
    """Regions on the slide; similarity of every held-out cell before and after."""
    students = {"before": build_student("lite"), "after": model}
    maps = {
        title: on_slide(
            corpus.index, held, cell_similarity(corpus, train, held, student, processor)
        )
        for title, student in students.items()
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 6.6), layout="constrained")
    axes[0].imshow(thumbnail)
    for rows, colour, name in ((train, BLUE, "trained on"), (held, ORANGE, "held out")):
        for i, row in enumerate(rows):
            corner = corpus.index.x[row] / scale, corpus.index.y[row] / scale
            side = corpus.index.width0[row] / scale
            label = f"{name}: {len(rows)} regions" if i == 0 else None
            axes[0].add_patch(
                Rectangle(corner, side, side, fill=False, edgecolor=colour, lw=1.2, label=label)
            )
    axes[0].set_title("The slide and its 5x regions (448 um, overlapping)")
    axes[0].legend(loc="upper right", framealpha=0.9)
    x0, y0, x1, y1 = bounds(corpus.index, held)
    for axis, (title, values) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(thumbnail, alpha=0.35)
        image = axis.imshow(
            values, cmap="viridis", vmin=0, vmax=1, alpha=0.8,
            extent=(x0 / scale, x1 / scale, y1 / scale, y0 / scale),
        )  # fmt: skip
        axis.set_xlim(x0 / scale - 10, x1 / scale + 10)
        axis.set_ylim(y1 / scale + 10, y0 / scale - 10)
        axis.set_title(
            f"Student and teacher agree, {title} distillation\nmean {np.nanmean(values):.2f}"
        )
    figure.colorbar(
        image, ax=axes[1:], shrink=0.7, label="centred cosine per 112 um cell, held out"
    )
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(picture, dpi=110)


def cell_similarity(corpus: Corpus, train, held, student, processor) -> np.ndarray:
    """(n, 16) centred cosine of ridge-mapped student cells with the teacher's, held out."""
    cache = Path(corpus.location) / "teacher"
    identity = find_cache(cache, TEACHER, corpus)
    if identity is None:
        raise SystemExit("the teacher cache is gone; run again")
    teacher = TeacherFeatures(cache / identity.key, corpus, identity)
    pixels = PixelStatistics.of(processor)
    folds = spatial_folds(corpus.index.slide[train], corpus.index.y[train])
    targets = teacher.rows(train).astype(np.float64)
    maps = fit_maps(embed_views(student, pixels, read_views(corpus, train)), targets, folds)
    _, spatial = embed_views(student, pixels, read_views(corpus, held))
    mean = targets.mean((0, 1))
    predicted, wanted = maps["local"](spatial) - mean, teacher.rows(held) - mean
    norms = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(wanted, axis=-1)
    return (predicted * wanted).sum(-1) / norms


def bounds(index: PairIndex, rows: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of some regions, level-0 px."""
    right, bottom = index.x[rows] + index.width0[rows], index.y[rows] + index.width0[rows]
    return index.x[rows].min(), index.y[rows].min(), right.max(), bottom.max()


def on_slide(index: PairIndex, rows: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Mean over the overlapping regions that show a cell; NaN where none does."""
    step = index.width0[rows[0]] / 4
    x0, y0, x1, y1 = bounds(index, rows)
    shape = round((y1 - y0) / step), round((x1 - x0) / step)
    total, count = np.zeros(shape), np.zeros(shape)
    for row, cells in zip(rows, similarity, strict=True):
        top, left = round((index.y[row] - y0) / step), round((index.x[row] - x0) / step)
        total[top : top + 4, left : left + 4] += cells.reshape(4, 4)
        count[top : top + 4, left : left + 4] += 1
    return np.divide(total, count, out=np.full(shape, np.nan), where=count > 0)


if __name__ == "__main__":
    sys.exit(main())

"""What the shortcuts of the teacher cache do to the teacher's features, as cosines.

    python benchmarks/feature_shifts.py SLIDE [SLIDE ...] [--teacher efficientnet-lite0]

- jpeg: the sub-patch after the corpus's JPEG 95 4:4:4, against the undamaged pixels;
- shared: the sub-patch as the neighbouring pair (one stride of 224 px before) shows it, against
  the pair's own, both after JPEG: pairs start at whole level-0 pixels, so they differ by a shift;
- turned: the features of the untouched sub-patch, which a permuted cache gives for a view, against
  the features of the turned sub-patch, mean over the seven other views;
- other: another sub-patch of the same region, for scale.

Centred cosines have the mean feature of all sub-patches subtracted: raw ones flatter.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from xmag_hf.data_builders.pairs import encode
from xmag_hf.distillation.augmentation import dihedral_view, sub_patches
from xmag_hf.distillation.teacher_encoding import encode_sub_patches
from xmag_hf.encoders import load_encoder
from xmag_hf.slides import find_tissue, grid_origins, open_slide

REGION_PX, STRIDE_PX, MPP = 896, 224, 0.5


def main() -> int:
    """Measure over random tissue regions, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="+")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--regions", type=int, default=4, help="a slide")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    teacher = load_encoder(args.teacher)
    patches = defaultdict(list)
    for path in args.slides:
        for name, images in region_patches(path, args.regions, args.seed).items():
            patches[name].append(images)
    features = {
        name: encode_sub_patches(teacher, np.concatenate(images), 32)
        for name, images in patches.items()
    }
    report(args.teacher, len(args.slides), features)
    return 0


def region_patches(path: str, n_regions: int, seed: int) -> dict[str, np.ndarray]:
    """Variants of the sub-patches of some regions, (n, 224, 224, 3) each, in one order."""
    rng = np.random.default_rng(seed)
    found = defaultdict(list)
    with open_slide(path) as slide:
        origins = grid_origins(slide, patch_px=REGION_PX, stride_px=STRIDE_PX, mpp=MPP)
        fractions = find_tissue(slide).fractions(origins, REGION_PX * MPP / slide.mpp0)
        kept = {tuple(xy) for xy in origins[fractions >= 0.25].tolist()}
        columns = np.unique(origins[:, 0]).tolist()
        # A region and its left neighbour, one stride before.
        pairs = [
            ((x, y), (columns[columns.index(x) - 1], y)) for x, y in sorted(kept) if x > columns[0]
        ]
        pairs = [(own, left) for own, left in pairs if left in kept]
        for i in rng.choice(len(pairs), min(n_regions, len(pairs)), replace=False):
            own, left = (slide.read_region(xy, REGION_PX, MPP) for xy in pairs[i])
            cells = sub_patches(own)
            found["own"].append(cells)
            found["jpeg"].append(sub_patches(jpeg(own)))
            # Cells 0, 1, 2 of a row of `own` are cells 1, 2, 3 of the neighbour's.
            neighbour = sub_patches(jpeg(left)).reshape(4, 4, 224, 224, 3)
            found["shared"].append(neighbour[:, 1:].reshape(12, 224, 224, 3))
            for view in range(1, 8):
                found[f"turned {view}"].append(np.stack([dihedral_view(c, view) for c in cells]))
    return {name: np.concatenate(images) for name, images in found.items()}


def jpeg(pixels: np.ndarray) -> np.ndarray:
    """Through the corpus's default codec and back."""
    return np.asarray(Image.open(io.BytesIO(encode(pixels, "jpeg95")["bytes"])))


def report(teacher: str, n_slides: int, features: dict[str, np.ndarray]) -> None:
    """Print mean, first percentile and least cosine of every comparison."""
    own, mean = features["own"], features["own"].mean(0)
    cells = np.arange(16).reshape(4, 4)
    has_left = np.concatenate([16 * i + cells[:, :3].ravel() for i in range(len(own) // 16)])
    others = np.arange(len(own)).reshape(-1, 16)[:, np.roll(np.arange(16), 5)].ravel()
    comparisons = {
        "jpeg": (features["jpeg"], own),
        "shared": (features["shared"], features["jpeg"][has_left]),
        "turned": (
            np.concatenate([features[f"turned {v}"] for v in range(1, 8)]),
            np.tile(own, (7, 1)),
        ),
        "other": (own[others], own),
    }
    table = Table(title=f"{teacher}: {len(own)} sub-patches of {n_slides} slide(s)")
    for heading in ("against its own", "cosine", "1st percentile", "least", "centred", "1st pct."):
        table.add_column(heading, justify="left" if heading.startswith("against") else "right")
    for name, (a, b) in comparisons.items():
        raw, centred = cosines(a, b), cosines(a - mean, b - mean)
        values = [
            raw.mean(),
            np.percentile(raw, 1),
            raw.min(),
            centred.mean(),
            np.percentile(centred, 1),
        ]
        table.add_row(name, *(f"{value:.4f}" for value in values))
    Console().print(table)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, (n,)."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


if __name__ == "__main__":
    sys.exit(main())

"""On which measures of nuclei does 20x beat the same picture reduced to 5x and enlarged again?

Only such a measure can tell whether a student carries 20x detail. The teacher answers, per cell of
the 4 x 4 grid, from sixteen passes over the 20x pixels and over the enlarged 5x ones: types of
nuclei as pathologists named them, and number, crowding and size of all nuclei. Size is measured in
the 20x image, no pathologist drew it. Runs after magnification.py, on its features.

    python studies/nuclei_yardsticks.py --glas glas --crchisto crchisto --out study --score-only
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import magnification
import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from xmag_hf.encoders import load_encoder
from xmag_hf.evaluation import bootstrap_test, holm, mean_over_repeats, spearman
from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.probing.counts import count_probe
from xmag_hf.probing.dense import cell_boxes, embed_cells

MPP = magnification.CRCHISTO_MPP
REACH_UM = 8.0  # a pixel farther from every annotated centre belongs to no nucleus
CROWDED_UM = 6.0  # to the nearest neighbour: about the lower quartile here
SMALL_UM2, LARGE_UM2 = 20.0, 50.0  # about the lower and upper quartile here
# Optical densities of haematoxylin, eosin and the rest; Ruifrok & Johnston 2001.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
# Row: um/px at which the encoder sees the tissue, and whether it is enlarged from 2.0.
ROWS = {
    "teacher at 20x": (0.5, False),
    "teacher on enlarged 5x": (0.5, True),
    "start at 5x": (2.0, False),
}


def main() -> None:
    """Measure nuclei, predict the measures from each row's features, compare the teacher's two."""
    keep_freed_memory()
    args = magnification.parse()
    ids, truth = measured_cells(args)
    blocks = magnification.field_blocks(args, ids)
    units = ids if blocks is None else blocks
    predictions = {name: predicted(args, name, units, truth) for name in ROWS}
    metric = partial(mean_over_repeats, spearman)
    found: list[dict[str, Any]] = []
    for kind, counts in truth.items():
        values = np.log1p(counts)
        test = bootstrap_test(
            metric, values, predictions["teacher at 20x"][kind],
            predictions["teacher on enlarged 5x"][kind], clusters=units, samples=args.samples,
        )  # fmt: skip
        scores = {name: metric(values, predictions[name][kind]) for name in ROWS}
        found.append({"measure": kind, "scores": scores} | vars(test))
    for row, adjusted in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = float(adjusted)
    (args.out / "nuclei_yardsticks.json").write_text(json.dumps(found, indent=1))
    print(as_table(found))


def measured_cells(args: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Field of every grid cell (m,), and measures of the nuclei in it, each (m,) whole numbers."""
    fields = magnification.yardsticks(args, enlarged=False)[1]
    ids, typed = magnification.cell_counts(args, fields)
    truth = dict(zip(magnification.TYPES, typed.T, strict=True))
    split = fields.splits["all"]
    centres = read_centres(args.crchisto / "nuclei.csv")
    rows = []
    for number, name in enumerate(split.ids):
        xy = centres[Path(str(name)).stem]
        area = nuclear_areas(split.image(number), xy)
        neighbour = cKDTree(xy).query(xy, k=2)[0][:, 1] * MPP
        for left, top, right, bottom in cell_boxes(split.size(number), MPP)[0]:
            inside = (xy >= (left, top)).all(axis=1) & (xy < (right, bottom)).all(axis=1)
            rows.append(cell_measures(area[inside], neighbour[inside]))
    names = ("all nuclei", "crowded", "small", "large", "median area", "sd of area")
    return ids, truth | dict(zip(names, np.array(rows).T, strict=True))


def read_centres(path: Path) -> dict[str, np.ndarray]:
    """Centres of all nuclei of each field, (k, 2) px, typed or not."""
    centres: dict[str, list[tuple[float, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            centres.setdefault(row["field"], []).append((float(row["x"]), float(row["y"])))
    return {field: np.array(xy) for field, xy in centres.items()}


def nuclear_areas(image: Image.Image, xy: np.ndarray) -> np.ndarray:
    """um2 of haematoxylin-stained pixels that lie nearest to each centre, (k,).

    Args:
        image: RGB at 0.5 um/px.
        xy: (k, 2) px.
    """
    density = -np.log10((np.asarray(image.convert("RGB"), float) + 1) / 256)
    stains = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    haematoxylin = ndimage.gaussian_filter((density @ np.linalg.inv(stains))[..., 0], 1)
    height, width = haematoxylin.shape
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    distance, nearest = cKDTree(xy).query(pixels)
    stained = (haematoxylin > otsu(haematoxylin)).ravel() & (distance * MPP < REACH_UM)
    return np.bincount(nearest[stained], minlength=len(xy)) * MPP**2


def otsu(values: np.ndarray) -> float:
    """Threshold between two classes of pixels; Otsu 1979, doi:10.1109/TSMC.1979.4310076."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    gap = total / np.maximum(below, 1) - (total[-1] - total) / np.maximum(above, 1)
    return float(centres[np.argmax(below * above * gap**2)])


def cell_measures(area: np.ndarray, neighbour: np.ndarray) -> list[int]:
    """Of the nuclei in one cell; areas in tenths of um2, 0 where there is no nucleus."""
    seen = area[area > 0]
    return [
        len(area),
        int((neighbour < CROWDED_UM).sum()),
        int((area < SMALL_UM2).sum()),
        int((area > LARGE_UM2).sum()),
        round(10 * float(np.median(seen))) if len(seen) else 0,
        round(10 * float(seen.std())) if len(seen) else 0,
    ]


def predicted(
    args: Any, name: str, units: np.ndarray, truth: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Out-of-fold predictions of each measure, (m, repeats), each with a penalty of its own."""
    mpp, enlarged = ROWS[name]
    (spec,) = magnification.reference_rows(args)[name]
    fields = magnification.yardsticks(args, enlarged)[1]
    options = {"cache_dir": args.out / "features", "max_enlarge": 4.2 if enlarged else 1.25}
    x, _ = embed_cells(fields, load_encoder(spec), mpp, **options)["all"]
    return {
        kind: count_probe(x, counts[:, None], groups=units)[:, :, 0].T
        for kind, counts in truth.items()
    }


def as_table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| per cell | " + " | ".join(ROWS) + " | 20x - enlarged | 95% CI | p | Holm |"]
    lines += ["|---|" + "--:|" * (len(ROWS) + 4)]
    for row in found:
        scores = " | ".join(f"{row['scores'][name]:.3f}" for name in ROWS)
        lines.append(
            f"| {row['measure']} | {scores} | {row['difference']:+.3f} | {row['low']:+.3f} to "
            f"{row['high']:+.3f} | {row['p_value']:.3f} | {row['p_holm']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

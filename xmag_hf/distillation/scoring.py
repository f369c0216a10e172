"""Score frozen students on held-out pairs: embed, fit the ridge maps, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xmag_hf.distillation.alignment import (
    AlignmentScores,
    RidgeMap,
    fit_ridge,
    score_predictions,
    spatial_folds,
)
from xmag_hf.distillation.corpus import Corpus, Split, count_disjoint, read_pairs
from xmag_hf.distillation.teacher_encoding import (
    CELLS,
    VIEW_PX,
    cut_cells,
    decode_image,
    teacher_image,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xmag_hf.modeling import XMAGImageProcessor

BATCH = 64


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and sd, per channel in [0, 1], that a student's image processor applies."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: XMAGImageProcessor) -> PixelStatistics:
        """Those of an image processor."""
        return cls(tuple(processor.image_mean), tuple(processor.image_std))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) float in [0, 1] -> normalised."""
        mean, std = pixels.new_tensor(self.mean), pixels.new_tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


def read_views(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """The 5x views of some pairs: (n, 224, 224, 3) uint8, in ascending order of row."""
    views = [
        decode_image(values["image_5x"]["bytes"], VIEW_PX, f"pair {row}, image_5x")
        for row, values in read_pairs(corpus, rows, ["image_5x"])
    ]
    return np.stack(views)


@torch.no_grad()
def embed_views(
    student: PreTrainedModel, pixels: PixelStatistics, views: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Embed 5x views, without augmentation.

    Args:
        student: XMAG or XMAG-lite; put into eval mode.
        pixels: Its normalisation.
        views: (n, 224, 224, 3) uint8.

    Returns:
        (n, d) pooled and (n, 16, d) spatial features, float32.
    """
    student.eval()
    pooled, spatial = [], []
    for start in range(0, len(views), BATCH):
        batch = torch.from_numpy(views[start : start + BATCH]).permute(0, 3, 1, 2)
        output = student(pixel_values=pixels.normalise(batch.to(student.device).float() / 255))
        pooled.append(output.pooler_output.float().cpu().numpy())
        local = student.spatial_features(output.last_hidden_state)  # type: ignore[operator]
        spatial.append(local.float().cpu().numpy())
    return np.concatenate(pooled), np.concatenate(spatial)


def score_students(
    students: Mapping[str, PreTrainedModel],
    pixels: PixelStatistics,
    corpus: Corpus,
    split: Split,
    teacher_features: Callable[[np.ndarray], np.ndarray],
    *,
    max_pairs: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Alignment of every student, and of the constant, on every held-out part.

    Args:
        students: Name to frozen encoder, such as {"start": ..., "distilled": ...}.
        pixels: Normalisation shared by them.
        corpus: To read.
        split: Training rows (for the ridge maps) and held-out parts (for the scores).
        teacher_features: (n,) rows -> (n, 16, d_T).
        max_pairs: Drawn at random from the training rows, and from each part that has more.
        seed: Of that draw.

    Returns:
        One dict a part, student and level: `part`, `n_pairs`, `n_disjoint`, `student`, `level`
        ("global" or "local"), `cosine`, `centred_cosine`, `retrieval`, `chance`.
    """
    draw = np.random.default_rng(seed)
    train = _some(split.train, max_pairs, draw)
    parts = {name: _some(rows, max_pairs, draw) for name, rows in split.held_out.items()}
    index = corpus.index
    folds = spatial_folds(index.slide[train], index.y[train])
    train_targets = teacher_features(train).astype(np.float32)
    targets = {name: teacher_features(rows).astype(np.float32) for name, rows in parts.items()}
    mean = train_targets.mean((0, 1))  # of cells, and so of their means: one constant for both
    facts = {
        name: {"part": name, "n_pairs": len(rows), "n_disjoint": count_disjoint(index, rows)}
        for name, rows in parts.items()
    }
    table = []
    for name in parts:
        for level in ("global", "local"):
            target = _groups(targets[name], level)
            constant = np.broadcast_to(mean, target.shape)
            scores = score_predictions(constant, target, mean)
            table.append(_row(facts[name], "constant", level, scores))
    train_views = read_views(corpus, train)
    views = {name: read_views(corpus, rows) for name, rows in parts.items()}
    for student_name, student in students.items():
        maps = fit_maps(embed_views(student, pixels, train_views), train_targets, folds)
        for name in parts:
            pooled, spatial = embed_views(student, pixels, views[name])
            predicted = {"global": maps["global"](pooled)[None], "local": maps["local"](spatial)}
            for level in ("global", "local"):
                target = _groups(targets[name], level)
                scores = score_predictions(predicted[level], target, mean)
                table.append(_row(facts[name], student_name, level, scores))
    order = {name: i for i, name in enumerate(parts)}
    return sorted(table, key=lambda row: (order[row["part"]], row["level"]))


def beats_start(table: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether, part by part, the distilled student beats start and constant on every measure."""
    verdict = {}
    for part in dict.fromkeys(row["part"] for row in table):
        rows = {(r["student"], r["level"]): r for r in table if r["part"] == part}
        verdict[part] = all(
            rows["distilled", level][measure] > rows[other, level][measure]
            for level in ("global", "local")
            for measure in ("cosine", "centred_cosine", "retrieval")
            for other in ("start", "constant")
        )
    return verdict


def fit_maps(
    features: tuple[np.ndarray, np.ndarray], targets: np.ndarray, folds: np.ndarray
) -> dict[str, RidgeMap]:
    """Ridge maps to the teacher's space.

    Args:
        features: (n, d) pooled and (n, 16, d) spatial, from `embed_views`.
        targets: (n, 16, d_T) teacher features.
        folds: (n,) from `spatial_folds`.

    Returns:
        "global": pooled to the mean target; "local": each cell to its own.
    """
    pooled, spatial = features
    return {
        "global": fit_ridge(pooled, targets.mean(1), folds),
        "local": fit_ridge(
            spatial.reshape(-1, spatial.shape[-1]),
            targets.reshape(-1, targets.shape[-1]),
            np.repeat(folds, CELLS),
        ),
    }


def _groups(targets: np.ndarray, level: str) -> np.ndarray:
    """Candidates of each retrieval: all pairs of the part, or the sixteen cells of a pair."""
    return targets.mean(1)[None] if level == "global" else targets


def _row(facts: dict, student: str, level: str, scores: AlignmentScores) -> dict[str, Any]:
    return facts | {"student": student, "level": level} | vars(scores)


def _some(rows: np.ndarray, most: int, draw: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= most else np.sort(draw.choice(rows, most, replace=False))


def live_features(
    corpus: Corpus, encode: Callable[[np.ndarray], np.ndarray], pairs_per_call: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Teacher features of the 20x sub-patches computed on demand, where nothing is cached.

    Args:
        corpus: To read.
        encode: (k, 224, 224, 3) uint8 -> (k, d_T).
        pairs_per_call: Pairs whose sub-patches are encoded together.

    Returns:
        A function (n,) rows -> (n, 16, d_T).
    """

    def features(rows: np.ndarray) -> np.ndarray:
        found, waiting = [], []
        for n, (row, values) in enumerate(read_pairs(corpus, rows, ["image_20x"]), start=1):
            waiting.append(cut_cells(teacher_image(values, "20x", f"pair {row},"), "20x", 0))
            if len(waiting) == pairs_per_call or n == len(rows):
                found.append(encode(np.concatenate(waiting)))
                waiting = []
        return np.concatenate(found).reshape(len(rows), CELLS, -1)

    return features

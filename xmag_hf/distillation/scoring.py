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
from xmag_hf.distillation.augmentation import sub_patches
from xmag_hf.distillation.corpus import REGION_PX, Corpus, Split, count_disjoint, read_pairs
from xmag_hf.distillation.pairs import VIEW_PX
from xmag_hf.distillation.teacher_cache import CELLS, decode_image

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 64


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and sd, per channel in [0, 1], that a student's image processor applies."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) float in [0, 1] -> normalised."""
        mean, std = pixels.new_tensor(self.mean), pixels.new_tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def embed_pairs(
    student: PreTrainedModel, pixels: PixelStatistics, corpus: Corpus, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Embed the 5x views of some pairs, without augmentation.

    Args:
        student: XMAG or XMAG-lite; put into eval mode.
        pixels: Its normalisation.
        corpus: To read.
        rows: (n,) ascending rows.

    Returns:
        (n, d) pooled and (n, 16, d) spatial features, float32.
    """
    student.eval()
    pooled, spatial, images = [], [], []
    for n, (row, values) in enumerate(read_pairs(corpus, rows, ["image_5x"]), start=1):
        image = decode_image(values["image_5x"]["bytes"], VIEW_PX, f"pair {row}, image_5x")
        images.append(torch.from_numpy(image.copy()).permute(2, 0, 1))
        if len(images) == BATCH or n == len(rows):
            batch = torch.stack(images).to(student.device).float() / 255
            output = student(pixel_values=pixels.normalise(batch))
            pooled.append(output.pooler_output.float().cpu().numpy())
            local = student.spatial_features(output.last_hidden_state)  # type: ignore[operator]
            spatial.append(local.float().cpu().numpy())
            images = []
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
    table = []
    for name, rows in parts.items():
        facts = {
            "part": name,
            "n_pairs": len(rows),
            "n_disjoint": count_disjoint(index, rows),
        }
        for level in ("global", "local"):
            target = _groups(targets[name], level)
            constant = np.broadcast_to(mean, target.shape)
            scores = score_predictions(constant, target, mean)
            table.append(_row(facts, "constant", level, scores))
    for student_name, student in students.items():
        maps = _fit_maps(embed_pairs(student, pixels, corpus, train), train_targets, folds)
        for name, rows in parts.items():
            facts = next(row for row in table if row["part"] == name)
            facts = {key: facts[key] for key in ("part", "n_pairs", "n_disjoint")}
            pooled, spatial = embed_pairs(student, pixels, corpus, rows)
            predicted = {"global": maps["global"](pooled)[None], "local": maps["local"](spatial)}
            for level in ("global", "local"):
                target = _groups(targets[name], level)
                scores = score_predictions(predicted[level], target, mean)
                table.append(_row(facts, student_name, level, scores))
    order = {name: i for i, name in enumerate(parts)}
    return sorted(table, key=lambda row: (order[row["part"]], row["level"]))


def beats_start(table: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether, part by part, the distilled student is above the start on every measure."""
    verdict = {}
    for part in dict.fromkeys(row["part"] for row in table):
        rows = {(r["student"], r["level"]): r for r in table if r["part"] == part}
        verdict[part] = all(
            rows["distilled", level][measure] > rows["start", level][measure]
            for level in ("global", "local")
            for measure in ("cosine", "centred_cosine", "retrieval")
        )
    return verdict


def _fit_maps(
    features: tuple[np.ndarray, np.ndarray], targets: np.ndarray, folds: np.ndarray
) -> dict[str, RidgeMap]:
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
    corpus: Corpus, encode: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """Teacher features computed on demand, where nothing is cached.

    Args:
        corpus: To read.
        encode: (16, 224, 224, 3) uint8 -> (16, d_T).

    Returns:
        A function (n,) rows -> (n, 16, d_T).
    """

    def features(rows: np.ndarray) -> np.ndarray:
        found = []
        for row, values in read_pairs(corpus, rows, ["image_20x"]):
            data = values["image_20x"]["bytes"]
            found.append(encode(sub_patches(decode_image(data, REGION_PX, f"pair {row}"))))
        return np.stack(found)

    return features

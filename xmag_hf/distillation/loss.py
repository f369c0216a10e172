"""The loss of XMAG: two projection heads and negative cosine similarity to the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmag_hf.distillation.augmentation import shares_shown
from xmag_hf.distillation.targets import TargetMap

# A view within this share of the pair's own um/px shows, in every cell, at least four fifths of
# the sub-patch that the target is of; further off the cells no longer match.
MATCHING_ZOOM = 0.05


def negative_cosine(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean negative cosine similarity, -mean(w p . t / max(|p| |t|, 1e-8)).

    XMAG, arXiv 2509.23097, Sec. 2 (distillation objective).

    Args:
        prediction: (..., d), student's projection.
        target: (..., d), teacher's feature; gets no gradient.
        weight: (...), w of each row; None for 1. The mean is over all rows, whatever they weigh.

    Returns:
        Scalar, float32, in [-1, 1].

    Raises:
        ValueError: Shapes differ; both are named.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ."
        )
    # float32: a sum of 1,536 squares of half-precision features can pass fp16's largest value.
    cosine = F.cosine_similarity(prediction.float(), target.detach().float(), dim=-1, eps=1e-8)
    return -(cosine if weight is None else cosine * weight).mean()


def relational_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of the pairwise cosine similarities within a batch.

    sum over i != j of (cos(p_i, p_j) - cos(t_i, t_j))^2 / (B (B - 1)): what is like what, whatever
    the directions. After Tung and Mori 2019 (arXiv:1907.09682), with cosines in place of row-
    normalised products.

    Args:
        prediction: (B, d), B >= 2.
        target: (B, d_T); gets no gradient.

    Returns:
        Scalar, float32, in [0, 4].
    """
    # Half-precision products would round the differences that this loss is made of.
    with torch.autocast(prediction.device.type, enabled=False):
        p = F.normalize(prediction.float(), dim=-1)
        t = F.normalize(target.detach().float(), dim=-1)
        difference = p @ p.T - t @ t.T  # (B, B), diagonal 0 but for rounding
    n = len(p)
    return difference.fill_diagonal_(0).square().sum() / (n * (n - 1))


def projection_head(student_dim: int, teacher_dim: int) -> nn.Sequential:
    """Linear(d_S, d_T) -> BatchNorm -> GELU -> Linear(d_T, d_T), arXiv 2509.23097, Sec. 2.

    Args:
        student_dim: d_S, width of the student's features.
        teacher_dim: d_T, width of the teacher's features.

    Returns:
        A module that takes (N, d_S) and gives (N, d_T).
    """
    return nn.Sequential(
        nn.Linear(student_dim, teacher_dim),
        nn.BatchNorm1d(teacher_dim),
        nn.GELU(),
        nn.Linear(teacher_dim, teacher_dim),
    )


class DistillationLoss(nn.Module):
    """Global and local alignment, with the heads that are thrown away after training.

    loss = global_weight * L_global + local_weight * L_local (arXiv 2509.23097: 1.0 and 0.5).
    The global target is the mean of the sixteen teacher features, the local targets are they
    themselves. The local head's BatchNorm sees all (B * 16, d_S) rows at once.

    Args:
        student_dim: d_S.
        teacher_dim: d_T.
        global_weight: Weight of the class-token term.
        local_weight: Weight of the 4 x 4 term.
        relational_weight: Weight of `relational_loss` on the global projections; 0 leaves it out.
        target_map: Centres or whitens the teacher's features before anything else.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        global_weight: float = 1.0,
        local_weight: float = 0.5,
        relational_weight: float = 0.0,
        target_map: TargetMap | None = None,
    ) -> None:
        super().__init__()
        self.global_head = projection_head(student_dim, teacher_dim)
        self.local_head = projection_head(student_dim, teacher_dim)
        self.global_weight = global_weight
        self.local_weight = local_weight
        self.relational_weight = relational_weight
        self.target_map = target_map

    def forward(
        self,
        pooled: Tensor,
        spatial: Tensor,
        teacher_features: Tensor,
        zoom: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss and its parts.

        A pair whose view has another um/px has the mean of what the view shows as its global
        target, and no local loss unless its cells still match.

        Args:
            pooled: (B, d_S), student's class token.
            spatial: (B, 16, d_S), student's 4 x 4 pooled tokens, row-major.
            teacher_features: (B, 16, d_T), of the sub-patches in the same order.
            zoom: (B,), um/px of the views in units of the pair's own; None for 1.

        Returns:
            `loss`, `loss_global`, `loss_local`, and `loss_relational` if it has a weight: scalars,
            float32.

        Raises:
            ValueError: Batch sizes or cell counts differ.
        """
        if spatial.shape[:2] != teacher_features.shape[:2] or len(pooled) != len(spatial):
            raise ValueError(
                f"pooled {tuple(pooled.shape)}, spatial {tuple(spatial.shape)} and teacher "
                f"{tuple(teacher_features.shape)} do not belong to the same (B, 16) cells."
            )
        if self.target_map is not None:
            teacher_features = self.target_map(teacher_features)
        local = self.local_head(spatial.flatten(0, 1))  # (B * 16, d_T)
        projected = self.global_head(pooled)  # (B, d_T)
        if zoom is None:
            global_target, matching = teacher_features.float().mean(1), None
        else:
            shown = shares_shown(zoom.float())[..., None]  # (B, 16, 1)
            global_target = (teacher_features.float() * shown).sum(1) / shown.sum(1)
            matching = ((zoom - 1).abs() <= MATCHING_ZOOM).repeat_interleave(spatial.shape[1])
        loss_global = negative_cosine(projected, global_target)
        loss_local = negative_cosine(local, teacher_features.flatten(0, 1), matching)
        loss = self.global_weight * loss_global + self.local_weight * loss_local
        parts = {"loss": loss, "loss_global": loss_global, "loss_local": loss_local}
        if self.relational_weight:
            parts["loss_relational"] = relational_loss(projected, global_target)
            parts["loss"] = loss + self.relational_weight * parts["loss_relational"]
        return parts


def mean_pairwise_cosine(embeddings: Tensor) -> Tensor:
    """Mean cosine similarity over all pairs of rows: 1 means that the encoder has collapsed.

    Computed from the sum of the unit vectors, |sum u|^2 = n + sum over i != j of u_i . u_j.

    Args:
        embeddings: (n, d), n >= 2.

    Returns:
        Scalar, float32.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    n = len(unit)
    return (unit.sum(0).square().sum() - n) / (n * (n - 1))

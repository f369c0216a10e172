"""What a training step computes: the batch made ready, the student, the loss."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xmag_hf.distillation.augmentation import color_jitter, stain_jitter
from xmag_hf.distillation.loss import DistillationLoss, mean_pairwise_cosine
from xmag_hf.distillation.pairs import Batch
from xmag_hf.distillation.scoring import PixelStatistics


class Distiller(nn.Module):
    """Student and loss heads in one module, so that DDP sees every trained parameter.

    Args:
        student: XMAG or XMAG-lite.
        loss: With its heads.
        masks_tokens: Whether batches come with masks. The token that stands in for masked ones is
            trained here and thrown away with the heads; it starts at 0, as DINOv2's does.
    """

    def __init__(
        self, student: PreTrainedModel, loss: DistillationLoss, *, masks_tokens: bool = False
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        width = student.config.hidden_size
        self.mask_token = nn.Parameter(torch.zeros(width)) if masks_tokens else None

    def forward(
        self,
        pixel_values: Tensor,
        teacher_features: Tensor,
        mask: Tensor | None = None,
        zoom: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pixel_values: (B, 3, 224, 224), normalised 5x views.
            teacher_features: (B, 16, d_T).
            mask: (B, 256) bool, patch tokens to mask; only with `masks_tokens`.
            zoom: (B,), um/px of the views in units of the pair's own; None for 1.

        Returns:
            `loss` and its parts, and `student_cosine`, the mean pairwise cosine of the batch's
            class tokens (1 = collapsed).
        """
        output = self._encode(pixel_values, mask)
        spatial = self.student.spatial_features(output.last_hidden_state)  # type: ignore[operator]
        parts = self.loss(output.pooler_output, spatial, teacher_features, zoom)
        return parts | {"student_cosine": mean_pairwise_cosine(output.pooler_output.detach())}

    def _encode(self, pixel_values: Tensor, mask: Tensor | None) -> Any:
        if mask is None:
            return self.student(pixel_values=pixel_values)
        # The published student has no mask token: its embedding of the patches is changed on the
        # way, before the positions are added.
        replace = functools.partial(_masked, mask=mask, token=cast(Tensor, self.mask_token))
        hook = self.student.get_input_embeddings().register_forward_hook(replace)
        try:
            return self.student(pixel_values=pixel_values)
        finally:
            hook.remove()


def _masked(module: nn.Module, args: Any, tokens: Tensor, *, mask: Tensor, token: Tensor) -> Tensor:
    """(B, 256, D) patch tokens with the masked ones replaced."""
    return torch.where(mask[..., None], token.to(tokens.dtype), tokens)


def prepare_batch(
    batch: Batch,
    pixels: PixelStatistics,
    encoder: nn.Module | None,
    teacher_batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Augment a batch on its device and get its targets.

    Args:
        batch: From `pairs.batches`.
        pixels: Student's normalisation.
        encoder: Live teacher, for batches without `features`.
        teacher_batch_size: Sub-patches per teacher call.

    Returns:
        Student's pixels (B, 3, 224, 224) and teacher features (B, 16, d_T).
    """
    view = _augmented(batch["image_5x"].float() / 255, batch)
    view = pixels.normalise(view).contiguous(memory_format=torch.channels_last)
    if "features" in batch:
        return view, batch["features"].float()
    if encoder is None:
        raise RuntimeError("no features in the batch and no live teacher")
    patches = batch["sub_patches"]  # (B, 16, 3, 224, 224) uint8
    if "jitter" in batch or "stain" in batch:
        patches = _augmented(patches.float() / 255, batch)
    chunks = patches.flatten(0, 1).split(teacher_batch_size)
    with torch.no_grad():
        features = torch.cat([encoder(chunk) for chunk in chunks])
    return view, features.float().unflatten(0, patches.shape[:2])


def _augmented(images: Tensor, batch: Batch) -> Tensor:
    if "stain" in batch:
        images = stain_jitter(images, batch["stain"])
    if "jitter" in batch:
        images = color_jitter(images, batch["jitter"])
    return images

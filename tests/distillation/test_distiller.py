"""Masked patch tokens, against transformers' own DINOv2 embeddings."""

from __future__ import annotations

import functools

import pytest
import torch

from xmag_hf.distillation.distiller import Distiller
from xmag_hf.distillation.loss import DistillationLoss
from xmag_hf.modeling import XMAGConfig, XMAGModel


@pytest.fixture
def distiller() -> Distiller:
    torch.manual_seed(0)
    config = XMAGConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    made = Distiller(XMAGModel(config), DistillationLoss(24, 5), masks_tokens=True)
    assert made.mask_token is not None and not made.mask_token.any()  # DINOv2's start
    torch.nn.init.normal_(made.mask_token)
    return made.eval()


def test_masked_tokens_are_dinov2s(distiller: Distiller) -> None:
    pixels, targets = torch.randn(3, 3, 224, 224), torch.randn(3, 16, 5)
    mask = torch.rand(3, 256) < 0.4
    got = distiller(pixels, targets, mask)
    student = distiller.student
    embeddings = student.embeddings
    embeddings.mask_token = torch.nn.Parameter(distiller.mask_token.detach()[None])
    masked = functools.partial(type(embeddings).forward, embeddings, bool_masked_pos=mask)
    embeddings.forward = masked
    output = student(pixel_values=pixels)
    spatial = student.spatial_features(output.last_hidden_state)
    expected = distiller.loss(output.pooler_output, spatial, targets)
    assert got["loss"].item() == pytest.approx(expected["loss"].item(), abs=1e-5)


def test_what_is_masked_is_not_seen_and_the_token_learns(distiller: Distiller) -> None:
    pixels, targets = torch.randn(2, 3, 224, 224), torch.randn(2, 16, 5)
    mask = torch.zeros(2, 256, dtype=torch.bool)
    mask[:, 16 * 3 + 5] = True
    changed = pixels.clone()
    changed[:, :, 3 * 14 : 4 * 14, 5 * 14 : 6 * 14] += 1
    loss = distiller(pixels, targets, mask)["loss"]
    assert torch.equal(loss, distiller(changed, targets, mask)["loss"])
    assert not torch.equal(distiller(pixels, targets)["loss"], distiller(changed, targets)["loss"])
    loss.backward()
    assert distiller.mask_token is not None and distiller.mask_token.grad.abs().max() > 0
    assert not distiller.student.get_input_embeddings()._forward_hooks

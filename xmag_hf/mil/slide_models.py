"""Encoder and head as one model: put together for training, and used on new slides."""

from __future__ import annotations

import copy
from typing import Any

import torch

from xmag_hf.embedding.encode import own_pooling
from xmag_hf.embedding.plan import PatchGeometry
from xmag_hf.encoder_files import identity, tensors_digest
from xmag_hf.encoders import Encoder, EncoderCard
from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGForSlideClassification,
    XMAGMeanPoolConfig,
    XMAGSlideConfig,
)
from xmag_hf.modeling.convert import image_processor_for

from .errors import MILError

SCRATCH = {"abmil": XMAGABMILConfig, "mean-pool": XMAGMeanPoolConfig}
TRAINABLE = ("xmag", "xmag_lite")


def slide_model(
    encoder: Encoder,
    head: Any,
    *,
    frozen_stages: int | None = None,
    chunk_size: int = 32,
    class_weights: list[float] | None = None,
) -> XMAGForSlideClassification:
    """Put an encoder and a head together; both are copied.

    Args:
        encoder: XMAG or XMAG-lite.
        head: A configuration, for a head from scratch, or a trained head.
        frozen_stages: See `XMAGSlideConfig`.
        chunk_size: See there.
        class_weights: For the loss.

    Returns:
        The model, on the CPU, in eval mode.

    Raises:
        MILError: Another encoder, one with a normalisation of its own, or a number of stages that
            it does not have.
    """
    config = getattr(encoder.model, "config", None)
    kind = getattr(config, "model_type", type(encoder.model).__name__)
    if kind not in TRAINABLE:
        raise MILError(
            f"{encoder.name}: is {kind}; end to end trains XMAG and XMAG-lite. Distil one "
            "(`xmag distill`), or take a student."
        )
    usual = image_processor_for(config)
    if (encoder.mean, encoder.std) != (tuple(usual.image_mean), tuple(usual.image_std)):
        raise MILError(
            f"{encoder.name}: its image processor normalises with mean {encoder.mean} and sd "
            f"{encoder.std}; end to end trains with XMAG's own, {tuple(usual.image_mean)} and "
            f"{tuple(usual.image_std)}, to which these weights are not used. Distil a student, "
            "whose processor is that."
        )
    trained = isinstance(head, torch.nn.Module)
    head_config: Any = copy.deepcopy(head.config if trained else head)
    head_config.class_weights = class_weights
    try:
        slide_config = XMAGSlideConfig(
            encoder_config=copy.deepcopy(config),  # type: ignore[arg-type]
            head_config=head_config,
            frozen_stages=frozen_stages,
            chunk_size=chunk_size,
        )
    except ValueError as error:
        raise MILError(str(error)) from error
    model = XMAGForSlideClassification(slide_config)
    model.encoder.load_state_dict(encoder.model.state_dict())
    if trained:
        model.head.load_state_dict(head.state_dict())
    # Channels last: faster for a convolutional encoder on a CPU, nothing to a ViT.
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def stamp(model: XMAGForSlideClassification, geometry: PatchGeometry) -> None:
    """Write into the head's configuration which bags it takes: of the encoder as it is now."""
    encoder = own_encoder(model)
    config = model.config.head_config
    config.encoder, config.encoder_revision = encoder.name, encoder.revision
    config.pooling, config.normalisation = own_pooling(encoder), encoder.normalisation
    config.mpp, config.patch_px = geometry.mpp, geometry.patch_px
    config.target_magnification = None


def own_encoder(
    model: XMAGForSlideClassification,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Encoder:
    """The model's encoder as `embed_slide` takes it, so that its bags fit the model's head.

    Args:
        model: Trained end to end; its weights are shared, and frozen from here on.
        device: Where it runs.
        precision: fp32, bf16 or fp16.

    Returns:
        The encoder; its revision is the digest of its tensors, its name says that it is no plain
        XMAG any more.
    """
    config = model.encoder.config
    processor = image_processor_for(config)
    fields = config.to_dict()
    card = EncoderCard(
        name=f"e2e-{identity(fields)}",
        repository="",
        builder="transformers",
        architecture=type(model.encoder).__name__,
        build={},
        params_m=round(model.encoder.num_parameters() / 1e6, 2),
        embed_dim=config.hidden_size,
        input_px=config.image_size,
        mpp=config.mpp,
        field_patch_px=config.image_size,
        field_fit="as is",
        mean=tuple(processor.image_mean),  # type: ignore[arg-type]
        std=tuple(processor.image_std),  # type: ignore[arg-type]
        pooling="pooler",
        licence=config.licence,
        gated=False,
        revision=tensors_digest(
            {name: tensor.cpu() for name, tensor in model.encoder.state_dict().items()}
        ),
        source="trained end to end here",
    )
    return Encoder(model.encoder, card, precision=precision).to(device)

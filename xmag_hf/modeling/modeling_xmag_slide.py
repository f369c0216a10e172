"""Pixels of a whole slide -> class: encoder and head as one model, trained end to end.

The encoder runs over a bag in chunks of patches. What is frozen runs without gradient; what is
trained runs under gradient checkpointing, a chunk at a time, so that memory for activations is that
of one chunk and a bag needs one frozen map per patch beside it. Nothing of this changes a gradient:
a patch's embedding depends on no other patch. BatchNorm would be the exception, so every BatchNorm
of the encoder uses its running statistics, in training too, and these never change; its scale and
shift are trained where their stage is.

Travels to the Hub with the weights: imports torch, transformers and nothing of ours but siblings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_xmag_slide import XMAGSlideConfig
from .modeling_xmag import XMAGModel, check_input
from .modeling_xmag_abmil import SlideOutput, XMAGABMILModel, XMAGMeanPoolModel
from .modeling_xmag_lite import STRIDE_PX, XMAGLiteModel

ENCODERS = {"xmag": XMAGModel, "xmag_lite": XMAGLiteModel}
HEADS = {"xmag_abmil": XMAGABMILModel, "xmag_mean_pool": XMAGMeanPoolModel}


class XMAGForSlideClassification(PreTrainedModel):
    """XMAG or XMAG-lite under an attention or mean-pool head.

    Attributes:
        encoder: `XMAGModel` or `XMAGLiteModel`.
        head: `XMAGABMILModel` or `XMAGMeanPoolModel`; takes bags of this very encoder.
    """

    config: XMAGSlideConfig
    config_class = XMAGSlideConfig
    base_model_prefix = "xmag_slide"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True  # of each block too, within a chunk's
    _supports_sdpa = True  # if the encoder does
    _auto_class = "AutoModel"

    def __init__(self, config: XMAGSlideConfig):
        super().__init__(config)
        encoder, head = config.encoder_config, config.head_config
        self.encoder: Any = ENCODERS[encoder.model_type](encoder)  # type: ignore[arg-type]
        self.head: Any = HEADS[head.model_type](head)  # type: ignore[arg-type]
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> XMAGForSlideClassification:
        """Training mode for what is trained; frozen stages and every BatchNorm stay in eval.

        Also freezes anew: from_pretrained makes parameters anew, all trained, and then calls this.
        """
        super().train(mode)
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        frozen_states: Tensor | None = None,
    ) -> SlideOutput:
        """Classify slides.

        Args:
            pixel_values: (B, M, 3, 224, 224), normalised by XMAGImageProcessor.
            mask: (B, M) bool, True for patches and False for padding, which is not encoded.
            labels: (B,) class indices.
            frozen_states: Instead of pixels, (B, M, ...), what `frozen` made of them.

        Returns:
            logits (B, C), attentions (B, M), slide_embedding (B, H), and the loss if labels.

        Raises:
            ValueError: Pixels and frozen states both or neither, or of another shape.
        """
        if (pixel_values is None) == (frozen_states is None):
            raise ValueError(
                "XMAGForSlideClassification: give pixel_values or frozen_states, one of the two."
            )
        rows: Any = frozen_states if pixel_values is None else pixel_values
        least = 4 if pixel_values is None else 5
        if rows.ndim < least or (mask is not None and mask.shape != rows.shape[:2]):
            raise ValueError(
                f"XMAGForSlideClassification: patches {tuple(rows.shape)}, mask "
                f"{None if mask is None else tuple(mask.shape)}; expected (B, M, 3, H, W) pixels "
                "or (B, M, ...) frozen states, and (B, M)."
            )
        kept = rows.flatten(0, 1) if mask is None else rows[mask]  # (n, ...)
        embeddings = self.embed(kept, frozen=pixel_values is None)  # (n, D)
        if mask is None:
            features = embeddings.unflatten(0, rows.shape[:2])  # (B, M, D)
        else:
            features = embeddings.new_zeros((*mask.shape, embeddings.shape[-1]))
            features[mask] = embeddings
        return self.head(features, mask=mask, labels=labels, return_dict=True)

    def embed(self, rows: Tensor, *, frozen: bool = False) -> Tensor:
        """Embed patches, chunk by chunk.

        Args:
            rows: (N, 3, 224, 224) pixels, or (N, ...) of `frozen` states.
            frozen: `rows` are frozen states.

        Returns:
            (N, D): the class token (XMAG) or the mean of the last map (lite), as the encoder's
            own pooler_output. With gradient, through the trained stages only.
        """
        parts = []
        for chunk in rows.split(self.config.chunk_size):
            hidden = chunk if frozen else self.frozen(chunk)
            if torch.is_grad_enabled():
                part = checkpoint(self.trained, hidden, use_reentrant=False)
            else:
                part = self.trained(hidden)
            parts.append(part)
        if not parts:
            return rows.new_zeros((0, self.encoder.config.hidden_size))
        return torch.cat(parts)

    @torch.no_grad()
    def frozen(self, pixel_values: Tensor) -> Tensor:
        """Run the frozen part over patches, without gradient.

        Args:
            pixel_values: (N, 3, 224, 224).

        Returns:
            (N, 257, D) tokens (XMAG) or (N, C, H, W) maps (lite) before the first trained stage;
            the pixels themselves where nothing is frozen.

        Raises:
            ValueError: Pixels of another size.
        """
        config = self.encoder.config
        check_input(pixel_values, config, False, getattr(config, "patch_size", STRIDE_PX))
        if not self.config.frozen_stages:
            return pixel_values
        return self._run(self._stem(pixel_values), 0, self.config.frozen_stages)

    def trained(self, hidden: Tensor) -> Tensor:
        """Run the trained part over what `frozen` returns: -> (N, D) embeddings."""
        # Kept states may be half precision; under autocast each layer casts for itself.
        hidden = hidden.to(next(self.encoder.parameters()).dtype)
        if not self.config.frozen_stages:
            hidden = self._stem(hidden)
        hidden = self._run(hidden, self.config.frozen_stages, None)
        if isinstance(self.encoder, XMAGLiteModel):
            net: Any = self.encoder.backbone
            return net.bn2(net.conv_head(hidden)).mean(dim=(2, 3))  # (N, 1280, 7, 7) -> (N, 1280)
        return self.encoder.layernorm(hidden)[:, 0]

    def _stem(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.encoder, XMAGLiteModel):
            net: Any = self.encoder.backbone
            return net.bn1(net.conv_stem(pixel_values.to(net.conv_stem.weight.dtype)))
        return self.encoder.embeddings(pixel_values)

    def _stages(self) -> nn.ModuleList | nn.Sequential:
        if isinstance(self.encoder, XMAGLiteModel):
            return self.encoder.backbone.blocks  # type: ignore[return-value]
        return self.encoder.encoder.layer

    def _run(self, hidden: Tensor, start: int, stop: int | None) -> Tensor:
        for stage in list(self._stages())[start:stop]:
            output = stage(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def frozen_modules(self) -> list[nn.Module]:
        """What is not trained, in the order in which it runs."""
        count = self.config.frozen_stages
        if not count:
            return []
        net: Any = self.encoder
        if isinstance(self.encoder, XMAGLiteModel):
            stem: list[Any] = [net.backbone.conv_stem, net.backbone.bn1]
        else:
            stem = [net.embeddings]
        return [*stem, *list(self._stages())[:count]]

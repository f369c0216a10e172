"""XMAG-lite: EfficientNet-Lite0 that reads tissue at 5x (2.0 um/px), for machines without a GPU.

The network is timm's `tf_efficientnet_lite0`; here are only its outputs in XMAG's form.

Travels to the Hub with the weights: imports torch, transformers, timm and siblings.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_xmag_lite import XMAGLiteConfig
from .modeling_xmag import check_input, classify, linear_head, pool_to_grid

TIMM_NAME = "tf_efficientnet_lite0"
STRIDE_PX = 32  # input px per token of the last map


class XMAGLitePreTrainedModel(PreTrainedModel):
    """Initialisation is TensorFlow's for EfficientNet; loading and saving are transformers'."""

    config: XMAGLiteConfig
    config_class = XMAGLiteConfig
    base_model_prefix = "xmag_lite"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            # As timm, after the TensorFlow original: a small network without residual scaling
            # does not train from the fixed 0.02 that transformers would give it.
            height, width = module.kernel_size
            fan_out = height * width * module.out_channels // module.groups
            init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))


class XMAGLiteModel(XMAGLitePreTrainedModel):
    """The encoder: 224 px at 2.0 um/px -> a 7 x 7 map of 1,280 channels. 3.4M parameters."""

    _auto_class = "AutoModel"

    def __init__(self, config: XMAGLiteConfig):
        super().__init__(config)
        # pretrained=False: weights come from the folder, never from timm's own download.
        self.backbone = timm.create_model(
            TIMM_NAME,
            pretrained=False,
            num_classes=0,
            in_chans=config.num_channels,
            drop_path_rate=config.drop_path_rate,
            bn_eps=config.batch_norm_eps,
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution."""
        return self.backbone.conv_stem  # type: ignore[return-value]

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Encode patches.

        Args:
            pixel_values: (B, 3, 224, 224), normalised by XMAGImageProcessor (0.5 and 0.5).
            output_attentions: Not available; a convolutional network has none.
            output_hidden_states: Also return the map after the stem and after each of the seven
                stages, each (B, C, H, W).
            interpolate_pos_encoding: Allow other squares (multiples of 32 px). There is no position
                embedding to resample; the name is XMAGModel's, so that callers need not ask.

        Returns:
            last_hidden_state (B, 49, 1280), the last map row-major; pooler_output (B, 1280), its
            mean; hidden_states on request. `return_dict=False` gives a tuple.

        Raises:
            ValueError: Input of another size or rank, or attentions asked for.
        """
        check_input(pixel_values, self.config, interpolate_pos_encoding, STRIDE_PX)
        if output_attentions:
            raise ValueError("output_attentions: XMAG-lite is convolutional and has no attention.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        net: Any = self.backbone
        hidden = net.bn1(net.conv_stem(pixel_values.to(net.conv_stem.weight.dtype)))
        hidden_states = [hidden]
        for stage in net.blocks:
            hidden = self._run_stage(stage, hidden)
            hidden_states.append(hidden)
        last_map = net.bn2(net.conv_head(hidden))  # (B, 1280, 7, 7)
        tokens = last_map.flatten(2).transpose(1, 2)  # (B, 49, 1280)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def spatial_features(self, last_hidden_state: Tensor) -> Tensor:
        """Sixteen local features, aligned with the 4 x 4 sub-patches at 20x, row-major.

        Args:
            last_hidden_state: (B, 49, 1280) as `forward` returns it.

        Returns:
            (B, 16, 1280), by adaptive average pooling of 7 x 7 to 4 x 4: a cell takes two or three
            tokens a side, and neighbouring cells share a row or column.

        Raises:
            ValueError: Tokens of a non-square image.
        """
        return pool_to_grid(last_hidden_state, self.config.spatial_grid)

    def _run_stage(self, stage: nn.Module, hidden: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and self.training):
            return stage(hidden)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _frozen_statistics(stage)

        output = checkpoint(stage, hidden, use_reentrant=False, context_fn=contexts)
        return output  # type: ignore[return-value]


class XMAGLiteForImageClassification(XMAGLitePreTrainedModel):
    """XMAG-lite with a linear head on the mean of the last map."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: XMAGLiteConfig):
        super().__init__(config)
        self.xmag_lite = XMAGLiteModel(config)
        self.classifier = linear_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify patches.

        Args:
            pixel_values: (B, 3, 224, 224).
            labels: (B,) class indices; (B,) numbers if num_labels is 1.
            output_hidden_states: See `XMAGLiteModel.forward`.
            interpolate_pos_encoding: See `XMAGLiteModel.forward`.

        Returns:
            logits (B, num_labels); loss, if labels (cross-entropy, or as transformers'
            `problem_type` says); hidden_states on request.

        Raises:
            ValueError: See `XMAGLiteModel.forward`.
        """
        outputs = self.xmag_lite(
            pixel_values,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        logits, loss = classify(self, outputs.pooler_output, labels)
        return ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )


@contextmanager
def _frozen_statistics(stage: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are while a stage is computed again.

    Checkpointing runs the forward pass twice; without this, every batch would count twice in the
    running mean and variance, and the trained network would differ from the plain one.
    """
    norms: list[Any] = [
        m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)

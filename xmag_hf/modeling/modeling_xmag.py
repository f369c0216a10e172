"""XMAG: a ViT with DINOv2's block that reads tissue at 5x (2.0 um/px).

Composed of transformers' DINOv2. Attention and block are written out here, because their parameter
names and signatures changed between transformers 5.17 and 5.23: weights on the Hub must not depend
on the release that saved them. The names are those of 5.23.

Travels to the Hub with the weights: imports torch, transformers and nothing of ours but siblings.
"""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2DropPath,
    Dinov2Embeddings,
    Dinov2LayerScale,
    Dinov2MLP,
    Dinov2PreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .configuration_xmag import XMAGBaseConfig, XMAGConfig


def pool_to_grid(tokens: Tensor, grid: int) -> Tensor:
    """Average a square map of tokens over a grid x grid raster, row-major.

    Args:
        tokens: (B, n * n, D), row-major, without class token.
        grid: Cells a side. Where it does not divide n, neighbouring cells share a row of tokens
            (adaptive average pooling).

    Returns:
        (B, grid * grid, D).

    Raises:
        ValueError: Tokens that are not 3-D or not a square map at least as fine as the grid.
    """
    if tokens.ndim != 3:
        raise ValueError(f"spatial_features: expected (B, N, D), got {tuple(tokens.shape)}.")
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1] or side < grid:
        raise ValueError(
            f"spatial_features: {tokens.shape[1]} patch tokens are no square map of at least "
            f"{grid} x {grid}. Pass last_hidden_state of a square image, as the model returned it."
        )
    maps = tokens.transpose(1, 2).unflatten(2, (side, side))  # (B, D, n, n)
    return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)  # (B, grid * grid, D)


def check_input(pixel_values: Tensor, config: XMAGBaseConfig, other_sizes: bool, step: int) -> None:
    """Refuse what the encoder would take and misread.

    Args:
        pixel_values: (B, C, H, W).
        config: Gives image_size and num_channels.
        other_sizes: The caller asked for sizes other than image_size.
        step: The side must be a multiple of it, px.

    Raises:
        ValueError: Wrong rank, channels or size, or no square; the remedy is named.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values: expected (B, {config.num_channels}, H, W), got "
            f"{tuple(pixel_values.shape)}. XMAGImageProcessor makes it."
        )
    height, width = pixel_values.shape[-2:]
    if (height, width) == (config.image_size, config.image_size):
        return
    if not other_sizes:
        raise ValueError(
            f"pixel_values: {height} x {width} px, but this encoder reads {config.image_size} x "
            f"{config.image_size} px at {config.mpp:g} um/px. Let XMAGImageProcessor resample "
            "(mpp=), or pass interpolate_pos_encoding=True if another size is meant."
        )
    if height != width:  # whose tokens spatial_features would take for those of a square
        raise ValueError(
            f"pixel_values: {height} x {width} px are not square. Cut a square, or several."
        )
    if height % step or width % step:
        raise ValueError(f"pixel_values: {height} x {width} px are not multiples of {step} px.")


def linear_head(config: Any) -> nn.Module:
    """Linear (D -> num_labels), or the identity where there are no labels."""
    if not config.num_labels:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.num_labels)


def classify(model: Any, pooled: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits (B, num_labels) of `model.classifier` and, given labels, transformers' loss."""
    logits = model.classifier(pooled)
    loss = None if labels is None else model.loss_function(labels, logits, model.config)
    return logits, loss


class XMAGAttention(nn.Module):
    """Multi-head self-attention over (B, N, D), by the attention function of the config."""

    def __init__(self, config: XMAGConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) -> (B, N, D) and weights (B, heads, N, N), which only eager returns."""
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)  # (B, heads, N, D / heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        mixed, weights = attention(
            self, query, key, value, None, dropout=0.0, scaling=self.scaling
        )  # (B, N, heads, D / heads)
        return self.o_proj(mixed.flatten(2).contiguous()), weights


class XMAGLayer(GradientCheckpointingLayer):
    """DINOv2's block: pre-norm attention and MLP, each with LayerScale and stochastic depth."""

    def __init__(self, config: XMAGConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = XMAGAttention(config)
        self.layer_scale1 = Dinov2LayerScale(config)
        self.drop_path = Dinov2DropPath(config.drop_path_rate)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Dinov2MLP(config)  # type: ignore[arg-type]
        self.layer_scale2 = Dinov2LayerScale(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) -> (B, N, D) and the attention weights, if any."""
        mixed, weights = self.attention(self.norm1(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(mixed))
        widened = self.layer_scale2(self.mlp(self.norm2(hidden_states)))
        return hidden_states + self.drop_path(widened), weights


class XMAGEncoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: XMAGConfig):
        super().__init__()
        self.layer = nn.ModuleList([XMAGLayer(config) for _ in range(config.num_hidden_layers)])


class XMAGPreTrainedModel(Dinov2PreTrainedModel):
    """Initialisation is DINOv2's; loading and saving are transformers'."""

    config: XMAGConfig  # type: ignore[assignment]
    config_class = XMAGConfig
    base_model_prefix = "xmag"
    _no_split_modules = ["Dinov2Embeddings", "XMAGLayer"]
    # Hidden states and attentions are collected in the open, in XMAGModel.forward.
    _can_record_outputs = {}


class XMAGModel(XMAGPreTrainedModel):
    """The encoder: 224 px at 2.0 um/px -> class token and 16 x 16 patch tokens.

    Parameters: base 85.7M, small 21.6M, tiny 5.5M.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: XMAGConfig):
        super().__init__(config)  # type: ignore[arg-type]
        self.embeddings = Dinov2Embeddings(config)  # type: ignore[arg-type]
        self.encoder = XMAGEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that makes patch tokens."""
        return self.embeddings.patch_embeddings

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
            pixel_values: (B, 3, 224, 224), normalised by XMAGImageProcessor.
            output_attentions: Also return the attention weights; needs eager attention.
            output_hidden_states: Also return the tokens before the first and after every block.
            interpolate_pos_encoding: Allow other squares (multiples of 14 px); the position
                embedding is then resampled, bicubic, as transformers' DINOv2 does.

        Returns:
            last_hidden_state (B, 1 + 256, D) after the final norm; pooler_output (B, D), its class
            token; hidden_states, layers + 1 of (B, 257, D) before the final norm; attentions,
            layers of (B, heads, 257, 257). `return_dict=False` gives a tuple.

        Raises:
            ValueError: Input of another size or rank, or attentions without eager attention.
        """
        check_input(pixel_values, self.config, interpolate_pos_encoding, self.config.patch_size)
        collect_attentions = _either(output_attentions, self.config.output_attentions)
        collect_states = _either(output_hidden_states, self.config.output_hidden_states)
        if collect_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions: {self.config._attn_implementation!r} attention keeps no "
                'weights. Load the model with attn_implementation="eager".'
            )
        hidden = self.embeddings(pixel_values)  # (B, 1 + N, D)
        hidden_states, attentions = [hidden], []
        for layer in self.encoder.layer:
            hidden, weights = layer(hidden)
            if collect_states:
                hidden_states.append(hidden)
            if collect_attentions:
                attentions.append(weights)
        last = self.layernorm(hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[:, 0],
            hidden_states=tuple(hidden_states) if collect_states else None,
            attentions=tuple(attentions) if collect_attentions else None,
        )

    def spatial_features(self, last_hidden_state: Tensor) -> Tensor:
        """Sixteen local features, aligned with the 4 x 4 sub-patches at 20x, row-major.

        Args:
            last_hidden_state: (B, 1 + n * n, D) as `forward` returns it, class token first.

        Returns:
            (B, 16, D): cell i is the mean of the patch tokens that cover sub-patch i.

        Raises:
            ValueError: Tokens of a non-square image.
        """
        return pool_to_grid(last_hidden_state[:, 1:], self.config.spatial_grid)


class XMAGForImageClassification(XMAGPreTrainedModel):
    """XMAG with a linear head on the class token."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: XMAGConfig):
        super().__init__(config)  # type: ignore[arg-type]
        self.xmag = XMAGModel(config)
        self.classifier = linear_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageClassifierOutput:
        """Classify patches.

        Args:
            pixel_values: (B, 3, 224, 224).
            labels: (B,) class indices; (B,) numbers if num_labels is 1.
            output_attentions: See `XMAGModel.forward`.
            output_hidden_states: See `XMAGModel.forward`.
            interpolate_pos_encoding: See `XMAGModel.forward`.

        Returns:
            logits (B, num_labels); loss, if labels (cross-entropy, or as transformers'
            `problem_type` says); hidden_states and attentions on request.

        Raises:
            ValueError: See `XMAGModel.forward`.
        """
        outputs = self.xmag(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        logits, loss = classify(self, outputs.pooler_output, labels)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _either(asked: bool | None, default: bool | None) -> bool:
    """What the caller asked for, else the config's default."""
    return bool(default if asked is None else asked)

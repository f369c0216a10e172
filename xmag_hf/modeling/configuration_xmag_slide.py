"""Configuration of a whole slide's classifier: an XMAG encoder and a head in one model.

Travels to the Hub with the weights: imports transformers and nothing of ours but siblings.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .configuration_xmag import XMAGBaseConfig, XMAGConfig, check_whole
from .configuration_xmag_abmil import XMAGABMILConfig, XMAGMeanPoolConfig
from .configuration_xmag_lite import XMAGLiteConfig

ENCODER_CONFIGS = {config.model_type: config for config in (XMAGConfig, XMAGLiteConfig)}
HEAD_CONFIGS = {config.model_type: config for config in (XMAGABMILConfig, XMAGMeanPoolConfig)}
# What readers of a head's configuration ask for, of the head in here.
HEAD_FIELDS = (
    *("encoder", "encoder_revision", "pooling", "normalisation", "mpp", "patch_px"),
    *("target_magnification", "embed_dim"),
)
LITE_STAGES = 7  # of EfficientNet-Lite0, behind its stem
TRAINED_STAGES = 2  # by default: blocks of a ViT, stages of lite


class XMAGSlideConfig(PreTrainedConfig):
    """Configuration of `XMAGForSlideClassification`.

    `id2label` and `label2id` are the head's: classes have one home. So is the identity of the bags
    that the head takes, which are those of the encoder in here, as it was after training.

    Args:
        encoder_config: Of XMAG or XMAG-lite, as a configuration or its fields. Default XMAG base.
        head_config: Of the attention or mean-pool head, as a configuration or its fields; its
            embed_dim is the encoder's hidden_size. Default an attention head for the encoder.
        frozen_stages: Blocks (ViT) or stages (lite, of 7) that are never trained, from the input
            on; with one or more, what comes before the first (patch embedding, stem) is frozen
            too. None: all but the last two. What comes after the last is trained always.
        chunk_size: Patches that the encoder takes at once. Bounds memory, and changes nothing else.
        **kwargs: Anything else a transformers configuration takes.

    Raises:
        ValueError: Parts that are none of ours or do not fit together; field and value are named.
    """

    model_type = "xmag_slide"
    # Takes the attention implementation that is asked for; the heads have none to choose.
    sub_configs = {"encoder_config": XMAGBaseConfig}  # type: ignore[assignment]
    _auto_class = "AutoConfig"

    def __init__(
        self,
        encoder_config: XMAGBaseConfig | dict[str, Any] | None = None,
        head_config: PreTrainedConfig | dict[str, Any] | None = None,
        frozen_stages: int | None = None,
        chunk_size: int = 32,
        **kwargs: Any,
    ):
        encoder: Any = _part("encoder_config", encoder_config or XMAGConfig(), ENCODER_CONFIGS)
        head: Any = head_config or XMAGABMILConfig(embed_dim=encoder.hidden_size)
        head = _part("head_config", head, HEAD_CONFIGS)
        if head.embed_dim != encoder.hidden_size:
            raise ValueError(
                f"XMAGSlideConfig: the head takes embed_dim={head.embed_dim}, the encoder gives "
                f"hidden_size={encoder.hidden_size}. Take a head that was trained on this encoder."
            )
        self.encoder_config, self.head_config = encoder, head
        stages = getattr(encoder, "num_hidden_layers", LITE_STAGES)
        frozen = max(0, stages - TRAINED_STAGES) if frozen_stages is None else frozen_stages
        if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen <= stages:
            raise ValueError(
                f"XMAGSlideConfig: frozen_stages={frozen!r} must be a whole number from 0 to "
                f"{stages}, the stages of {encoder.model_type}."
            )
        self.frozen_stages = frozen
        self.chunk_size = check_whole("chunk_size", chunk_size)
        kwargs |= {"id2label": dict(head.id2label), "label2id": dict(head.label2id)}
        attention = encoder._attn_implementation
        super().__init__(**kwargs)
        if self._attn_implementation is None:  # none asked for: as the encoder was
            encoder._attn_implementation = attention

    def __getattr__(self, name: str) -> Any:
        """The head's fields that say which bags it takes."""
        if name in HEAD_FIELDS and "head_config" in self.__dict__:
            return getattr(self.head_config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _part(
    field: str, config: PreTrainedConfig | dict[str, Any], known: dict[str, Any]
) -> PreTrainedConfig:
    """A part's configuration, built from its fields if need be."""
    fields = config if isinstance(config, dict) else {"model_type": config.model_type}
    kind = fields.get("model_type")
    if kind not in known:
        raise ValueError(
            f"XMAGSlideConfig: {field} has model_type={kind!r}; it must be one of "
            f"{', '.join(known)}."
        )
    if isinstance(config, dict):
        return known[kind](
            **{name: value for name, value in config.items() if name != "model_type"}
        )
    # Code that came with a folder has classes of its own: same name and fields, another module.
    return config if isinstance(config, known[kind]) else _part(field, config.to_dict(), known)

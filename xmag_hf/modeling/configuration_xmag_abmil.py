"""Configurations of the slide-level heads: gated attention, and mean pooling as its baseline.

Travels to the Hub with the weights: imports transformers and nothing of ours but siblings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .configuration_xmag import _same_fields, check_range, check_text, check_whole


class XMAGSlideHeadConfig(PreTrainedConfig):
    """What both heads have in common: their widths, and the identity of the bags they take.

    Args:
        embed_dim: Length D of a patch embedding.
        hidden_dim: Width H of the slide embedding.
        dropout: In training, 0 <= rate < 1.
        class_weights: One number above 0 for each class, for the loss; None for 1 each. Read by
            `loss` alone: logits do not depend on them.
        encoder: That made the bags, as `encoder` in their root attributes; None if they do not say.
        encoder_revision: Of that encoder.
        pooling: Of that encoder (`cls`, `mean`, `cls+mean`, `model`).
        normalisation: Of the pixels that it saw, as bags write it; None if they do not say.
        mpp: um/px of the patches.
        patch_px: Side of a patch, px at `mpp`.
        target_magnification: Nominal, of bags that say no um/px.
        **kwargs: Anything else a transformers configuration takes (`id2label`, ...).

    Raises:
        ValueError: A value that cannot be meant; field, value and what is allowed are named.
    """

    _auto_class = "AutoConfig"

    def __init__(
        self,
        embed_dim: int = 768,
        hidden_dim: int = 512,
        dropout: float = 0.25,
        class_weights: Sequence[float] | None = None,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        pooling: str | None = None,
        normalisation: str | None = None,
        mpp: float | None = None,
        patch_px: int | None = None,
        target_magnification: float | None = None,
        **kwargs: Any,
    ):
        self.embed_dim = check_whole("embed_dim", embed_dim)
        self.hidden_dim = check_whole("hidden_dim", hidden_dim)
        self.dropout = check_range("dropout", dropout, 0.0, 1.0, low_ok=True)
        self.encoder = check_text("encoder", encoder)
        self.encoder_revision = check_text("encoder_revision", encoder_revision)
        self.pooling = check_text("pooling", pooling)
        self.normalisation = check_text("normalisation", normalisation)
        # From 100x to a thumbnail, as for the encoder.
        self.mpp = None if mpp is None else check_range("mpp", mpp, 0.05, 20.0, low_ok=True)
        self.patch_px = None if patch_px is None else check_whole("patch_px", patch_px)
        self.target_magnification = target_magnification
        super().__init__(**kwargs)
        self.class_weights = None if class_weights is None else list(class_weights)
        _check_class_weights(self.class_weights, self.num_labels or 0)

    def __init_subclass__(cls, *args: Any, **kwargs: Any):
        super().__init_subclass__(*args, **kwargs)
        cls.__eq__ = _same_fields  # type: ignore[assignment]  # see XMAGBaseConfig


class XMAGABMILConfig(XMAGSlideHeadConfig):
    """Configuration of `XMAGABMILModel`.

    Args:
        attention_dim: Width A of the gated attention.
        **kwargs: See `XMAGSlideHeadConfig`.

    Raises:
        ValueError: See `XMAGSlideHeadConfig`.
    """

    model_type = "xmag_abmil"
    _auto_class = "AutoConfig"

    def __init__(self, attention_dim: int = 256, **kwargs: Any):
        self.attention_dim = check_whole("attention_dim", attention_dim)
        super().__init__(**kwargs)


class XMAGMeanPoolConfig(XMAGSlideHeadConfig):
    """Configuration of `XMAGMeanPoolModel`; see `XMAGSlideHeadConfig`."""

    model_type = "xmag_mean_pool"
    _auto_class = "AutoConfig"

    # transformers makes a dataclass of a subclass, whose __init__ would hide the inherited one.
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)


def _check_class_weights(weights: list[float] | None, num_labels: int) -> None:
    if weights is None:
        return
    good = all(isinstance(w, int | float) and math.isfinite(w) and w > 0 for w in weights)
    if not good or len(weights) != num_labels:
        raise ValueError(
            f"XMAG configuration: class_weights={weights!r} must be {num_labels} numbers above 0, "
            "one for each class, or None."
        )

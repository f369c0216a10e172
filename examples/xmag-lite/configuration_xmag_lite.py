"""Configuration of XMAG-lite, the 5x student for machines without a GPU.

Travels to the Hub with the weights: imports transformers and nothing of ours but siblings.
"""

from __future__ import annotations

from typing import Any

from .configuration_xmag import XMAGBaseConfig, check_range

XMAG_LITE_AUTO_MAP = {
    "AutoConfig": "configuration_xmag_lite.XMAGLiteConfig",
    "AutoModel": "modeling_xmag_lite.XMAGLiteModel",
    "AutoModelForImageClassification": "modeling_xmag_lite.XMAGLiteForImageClassification",
}


class XMAGLiteConfig(XMAGBaseConfig):
    """Configuration of `XMAGLiteModel`: timm's `tf_efficientnet_lite0` at 224 px and 2.0 um/px.

    The architecture is fixed, so there is little to configure.

    Args:
        hidden_size: Channels of the last map; 1280, stored so that readers find it.
        batch_norm_eps: Epsilon of every BatchNorm; TensorFlow's 1e-3, which the ImageNet weights
            were made with.
        **kwargs: See `XMAGBaseConfig`.

    Raises:
        ValueError: A value that cannot be meant, or a hidden_size other than 1280.
    """

    model_type = "xmag_lite"
    auto_classes = XMAG_LITE_AUTO_MAP
    _auto_class = "AutoConfig"

    def __init__(self, hidden_size: int = 1280, batch_norm_eps: float = 1e-3, **kwargs: Any):
        if hidden_size != 1280:
            raise ValueError(
                f"XMAGLiteConfig: hidden_size={hidden_size!r}, but EfficientNet-Lite0 has 1280. "
                "For another width use XMAGConfig."
            )
        self.hidden_size = hidden_size
        self.batch_norm_eps = check_range("batch_norm_eps", batch_norm_eps, 0.0, 1.0)
        super().__init__(**kwargs)

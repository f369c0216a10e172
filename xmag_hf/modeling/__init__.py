"""What travels to the Hub: configurations, models, image processor; and the weight converter.

Imports nothing of the rest of xmag_hf. Names are loaded on first use, so that
`xmag_hf.modeling.configuration_xmag` does not bring torch along.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_xmag import XMAGConfig
    from .configuration_xmag_abmil import XMAGABMILConfig, XMAGMeanPoolConfig
    from .configuration_xmag_lite import XMAGLiteConfig
    from .configuration_xmag_slide import XMAGSlideConfig
    from .image_processing_xmag import XMAGImageProcessor
    from .modeling_xmag import XMAGForImageClassification, XMAGModel
    from .modeling_xmag_abmil import SlideOutput, XMAGABMILModel, XMAGMeanPoolModel
    from .modeling_xmag_lite import XMAGLiteForImageClassification, XMAGLiteModel
    from .modeling_xmag_slide import XMAGForSlideClassification
    from .registration import register_auto_classes

__all__ = [
    "SlideOutput",
    "XMAGABMILConfig",
    "XMAGABMILModel",
    "XMAGConfig",
    "XMAGForImageClassification",
    "XMAGForSlideClassification",
    "XMAGImageProcessor",
    "XMAGLiteConfig",
    "XMAGLiteForImageClassification",
    "XMAGLiteModel",
    "XMAGMeanPoolConfig",
    "XMAGMeanPoolModel",
    "XMAGModel",
    "XMAGSlideConfig",
    "register_auto_classes",
]

_HOME = {
    "SlideOutput": "modeling_xmag_abmil",
    "XMAGABMILConfig": "configuration_xmag_abmil",
    "XMAGABMILModel": "modeling_xmag_abmil",
    "XMAGConfig": "configuration_xmag",
    "XMAGForImageClassification": "modeling_xmag",
    "XMAGForSlideClassification": "modeling_xmag_slide",
    "XMAGImageProcessor": "image_processing_xmag",
    "XMAGLiteConfig": "configuration_xmag_lite",
    "XMAGLiteForImageClassification": "modeling_xmag_lite",
    "XMAGLiteModel": "modeling_xmag_lite",
    "XMAGMeanPoolConfig": "configuration_xmag_abmil",
    "XMAGMeanPoolModel": "modeling_xmag_abmil",
    "XMAGModel": "modeling_xmag",
    "XMAGSlideConfig": "configuration_xmag_slide",
    "register_auto_classes": "registration",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

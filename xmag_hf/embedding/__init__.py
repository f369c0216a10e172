"""Slides to bags of embeddings: plan, read, encode, write. Imports slides and encoders only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bag import Bag, BagError, BagInfo, read_bag, write_bag
    from .embed import embed_slide, embed_slides
    from .exchange import export_bag, import_bag
    from .options import EmbedError, EmbedOptions
    from .sources import SlideSource

__all__ = [
    "Bag",
    "BagError",
    "BagInfo",
    "EmbedError",
    "EmbedOptions",
    "SlideSource",
    "embed_slide",
    "embed_slides",
    "export_bag",
    "import_bag",
    "read_bag",
    "write_bag",
]

# Loaded on first use: who only reads bags needs neither OpenSlide nor torch.
_HOME = {
    "Bag": "bag",
    "BagError": "bag",
    "BagInfo": "bag",
    "EmbedError": "options",
    "EmbedOptions": "options",
    "SlideSource": "sources",
    "embed_slide": "embed",
    "embed_slides": "embed",
    "export_bag": "exchange",
    "import_bag": "exchange",
    "read_bag": "bag",
    "write_bag": "bag",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

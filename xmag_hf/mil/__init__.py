"""Slide-level learning: heads on bags, studies by patient, end to end, heatmaps, comparisons."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import MILError
    from .options import HeadOptions, StudyOptions
    from .predict import SlidePrediction, check_bag, load_head, predict_bag
    from .study import run_study

__all__ = [
    "HeadOptions",
    "MILError",
    "SlidePrediction",
    "StudyOptions",
    "check_bag",
    "load_head",
    "predict_bag",
    "run_study",
]

# Loaded on first use: options need neither torch nor scikit-learn.
_HOME = {
    "HeadOptions": "options",
    "MILError": "errors",
    "SlidePrediction": "predict",
    "StudyOptions": "options",
    "check_bag": "predict",
    "load_head": "predict",
    "predict_bag": "predict",
    "run_study": "study",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

"""Slides: open, um/px, regions by the resampling contract, tissue, grid. Needs no torch."""

from .errors import SlideError, SlideOpenError, SlideReadError, SlideScaleError
from .grid import grid_origins, grid_starts
from .reader import Slide, open_slide, resample, sha256_head
from .tissue import TissueMask, find_tissue, tissue_mask

__all__ = [
    "Slide",
    "SlideError",
    "SlideOpenError",
    "SlideReadError",
    "SlideScaleError",
    "TissueMask",
    "find_tissue",
    "grid_origins",
    "grid_starts",
    "open_slide",
    "resample",
    "sha256_head",
    "tissue_mask",
]

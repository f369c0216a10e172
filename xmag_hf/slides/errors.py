"""What can be wrong with a slide. Every message names the slide, the value and the remedy."""

from __future__ import annotations


class SlideError(ValueError):
    """A slide cannot be used as asked."""


class SlideOpenError(SlideError):
    """The file is missing, empty, truncated, or of no format that OpenSlide reads."""


class SlideScaleError(SlideError):
    """The um/px is missing or implausible, or the slide is too coarse for what was asked."""


class SlideReadError(SlideError):
    """A region's pixels could not be decoded; other regions of the slide may be readable."""

"""The folder's one error."""

from __future__ import annotations


class ProbeError(ValueError):
    """A probe that cannot be done as asked; the message names subject, value and remedy."""

"""The folder's one error."""

from __future__ import annotations


class MILError(ValueError):
    """A study or prediction that cannot be done as asked; names subject, value and remedy."""

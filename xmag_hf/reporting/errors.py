"""The folder's one error."""

from __future__ import annotations


class ReportError(ValueError):
    """Results that cannot be drawn or read back; names subject, value and remedy."""

"""xmag_hf: distil a 20x pathology encoder into a 5x student, Hub-native."""

from xmag_hf._version import __version__

__all__ = ["__version__"]

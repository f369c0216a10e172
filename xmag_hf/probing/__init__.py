"""Probes: what frozen embeddings know, by classifiers and regressions on top of them.

One module a step: options, images, patches, features (and dense), classifiers and counts,
protocols, report; probe is the flow. May import xmag_hf.encoders, xmag_hf.evaluation and
xmag_hf.data_builders.
"""

from .errors import ProbeError
from .options import ProbeOptions

__all__ = ["ProbeError", "ProbeOptions"]

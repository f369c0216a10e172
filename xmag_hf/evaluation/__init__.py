"""Metrics, bootstrap intervals and paired tests: arrays in, numbers out.

May import NumPy and SciPy. Imports nothing of xmag_hf and no torch, so that anyone can recompute a
table from the predictions alone.
"""

from .errors import EvaluationError
from .intervals import Interval, bootstrap_ci
from .metrics import accuracy, f1, mean_over_repeats, roc_auc, spearman
from .paired import (
    PairedTest,
    bootstrap_test,
    delong_test,
    f1_bootstrap_test,
    holm,
    mcnemar_test,
)

__all__ = [
    "EvaluationError",
    "Interval",
    "PairedTest",
    "accuracy",
    "bootstrap_ci",
    "bootstrap_test",
    "delong_test",
    "f1",
    "f1_bootstrap_test",
    "holm",
    "mcnemar_test",
    "mean_over_repeats",
    "roc_auc",
    "spearman",
]

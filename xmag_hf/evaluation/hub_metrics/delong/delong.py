"""DeLong's test of two models' AUC on the same cases, as an `evaluate` module.

>>> import evaluate
>>> delong = evaluate.load("xmag_hf/evaluation/hub_metrics/delong")
>>> delong.compute(references=y, predictions1=scores_a, predictions2=scores_b)["p_value"]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
import evaluate

from xmag_hf.evaluation import delong_test


class DeLong(evaluate.Comparison):
    """Wraps `xmag_hf.evaluation.delong_test`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        label = datasets.Value("int64")
        features = [
            datasets.Features({"predictions1": kind, "predictions2": kind, "references": label})
            for kind in (datasets.Value("float64"), datasets.List(datasets.Value("float64")))
        ]
        return evaluate.ComparisonInfo(
            module_type="comparison",
            description="DeLong's two-sided test of two correlated areas under the ROC curve; with "
            "several classes of their macro one-vs-rest means, by the joint covariance.",
            citation="DeLong et al. 1988, doi:10.2307/2531595; Sun & Xu 2014, "
            "doi:10.1109/LSP.2014.2337313",
            inputs_description="references: labels 0..C-1. predictions1, predictions2: scores of "
            "class 1, or a list of C scores per case. level: of the interval, 0.95 by default.",
            features=features,
        )

    def _compute(
        self, predictions1: Any, predictions2: Any, references: Any, level: float = 0.95
    ) -> dict[str, Any]:
        test = delong_test(references, predictions1, predictions2, level=level)
        return dataclasses.asdict(test)

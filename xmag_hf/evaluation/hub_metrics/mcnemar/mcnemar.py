"""McNemar's test of two models' accuracy on the same cases, as an `evaluate` module.

>>> import evaluate
>>> mcnemar = evaluate.load("xmag_hf/evaluation/hub_metrics/mcnemar")
>>> mcnemar.compute(references=y, predictions1=a, predictions2=b, mid_p=False)["p_value"]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
import evaluate

from xmag_hf.evaluation import mcnemar_test


class McNemar(evaluate.Comparison):
    """Wraps `xmag_hf.evaluation.mcnemar_test`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        label = datasets.Value("int64")
        return evaluate.ComparisonInfo(
            module_type="comparison",
            description="McNemar's two-sided test of two accuracies, mid-p or exact conditional "
            "(not the chi-squared approximation).",
            citation="Fagerland, Lydersen & Laake 2013, doi:10.1186/1471-2288-13-91",
            inputs_description="references, predictions1, predictions2: labels 0..C-1. mid_p: True "
            "by default; False is the exact test. level: of the interval, 0.95 by default.",
            features=datasets.Features(
                {"predictions1": label, "predictions2": label, "references": label}
            ),
        )

    def _compute(
        self,
        predictions1: Any,
        predictions2: Any,
        references: Any,
        mid_p: bool = True,
        level: float = 0.95,
    ) -> dict[str, Any]:
        test = mcnemar_test(references, predictions1, predictions2, mid_p=mid_p, level=level)
        return dataclasses.asdict(test)

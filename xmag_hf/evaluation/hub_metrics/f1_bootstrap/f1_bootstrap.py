"""Bootstrap test of two models' F1 on the same cases, as an `evaluate` module.

>>> import evaluate
>>> f1_bootstrap = evaluate.load("xmag_hf/evaluation/hub_metrics/f1_bootstrap")
>>> f1_bootstrap.compute(references=y, predictions1=a, predictions2=b, clusters=patients)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
import evaluate

from xmag_hf.evaluation import f1_bootstrap_test


class F1Bootstrap(evaluate.Comparison):
    """Wraps `xmag_hf.evaluation.f1_bootstrap_test`."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        label = datasets.Value("int64")
        return evaluate.ComparisonInfo(
            module_type="comparison",
            description="Two-sided paired bootstrap test of a difference of F1, by case or by "
            "cluster, stratified on request.",
            citation="Hall & Wilson 1991, doi:10.2307/2532163",
            inputs_description="references, predictions1, predictions2: labels 0..C-1. average: "
            "'macro' (default) or 'weighted'. clusters, strata: one per case. samples: 1000. seed. "
            "level: 0.95.",
            features=datasets.Features(
                {"predictions1": label, "predictions2": label, "references": label}
            ),
        )

    def _compute(
        self, predictions1: Any, predictions2: Any, references: Any, **options: Any
    ) -> dict[str, Any]:
        test = f1_bootstrap_test(references, predictions1, predictions2, **options)
        return dataclasses.asdict(test)

"""A metric with its bootstrap interval, as an `evaluate` module.

>>> import evaluate
>>> interval = evaluate.load("xmag_hf/evaluation/hub_metrics/bootstrap_interval", "auc")
>>> interval.compute(references=y, predictions=scores, clusters=patients)
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import datasets
import evaluate

from xmag_hf.evaluation import EvaluationError, accuracy, bootstrap_ci, f1, roc_auc

METRICS = {
    "auc": roc_auc,
    "accuracy": accuracy,
    "macro_f1": f1,
    "weighted_f1": partial(f1, average="weighted"),
}


class BootstrapInterval(evaluate.Metric):
    """Wraps `xmag_hf.evaluation.bootstrap_ci`; the configuration names the metric."""

    def _info(self) -> evaluate.EvaluationModuleInfo:
        if self.config_name not in METRICS:
            raise EvaluationError(
                f"bootstrap_interval: configuration {self.config_name!r}; name one of "
                f"{', '.join(METRICS)}."
            )
        label = datasets.Value("int64")
        kinds = [label]
        if self.config_name == "auc":
            kinds = [datasets.Value("float64"), datasets.List(datasets.Value("float64"))]
        return evaluate.MetricInfo(
            description="AUC, accuracy or F1 with a percentile bootstrap interval, by case or by "
            "cluster, stratified on request.",
            citation="Efron 1979, doi:10.1214/aos/1176344552",
            inputs_description="references: labels 0..C-1. predictions: labels, or for 'auc' "
            "scores of class 1 or a list of C scores. clusters, strata: one per case. samples: "
            "1000. seed. level: 0.95.",
            features=[
                datasets.Features({"predictions": kind, "references": label}) for kind in kinds
            ],
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        metric = METRICS[self.config_name]
        return dataclasses.asdict(bootstrap_ci(metric, references, predictions, **options))

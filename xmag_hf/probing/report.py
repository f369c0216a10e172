"""Scores with intervals, paired tests against the first row, and what is written of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xmag_hf.evaluation import (
    EvaluationError,
    PairedTest,
    accuracy,
    bootstrap_ci,
    bootstrap_test,
    delong_test,
    f1,
    holm,
    mcnemar_test,
    mean_over_repeats,
    roc_auc,
    spearman,
)

from .errors import ProbeError

RESULTS = "results.json"
FORMAT_VERSION = 1
AUC = "AUC"
ACCURACY = "accuracy"
# Few-shot draws differ between images drawn, not between encoders; a test of each number of shots
# would be many tests of one question. Their predictions are saved for whoever asks it.
UNTESTED = "few-shot"

Metric = Callable[..., float]


@dataclass(frozen=True)
class Question:
    """One number to be told about one row of the report.

    Attributes:
        row: Label of the row.
        method: linear, knn, few-shot-4, counts, cells ...
        metric: Name of the metric.
        function: Called with truth and one repeat's predictions.
        truth: (n,) labels, or measured values.
        predictions: (n, ...) or, with `repeats`, (n, R, ...).
        repeats: Whether axis 1 of the predictions is repeats.
        groups: (n,) patients or slides; None without.
    """

    row: str
    method: str
    metric: str
    function: Metric
    truth: np.ndarray
    predictions: np.ndarray
    repeats: bool
    groups: np.ndarray | None

    @property
    def scored(self) -> Metric:
        """The function over all repeats."""
        return partial(mean_over_repeats, self.function) if self.repeats else self.function


@dataclass(frozen=True)
class Score:
    """A score and its bootstrap interval.

    Attributes:
        row: Label of the row.
        method: As in `Question`.
        metric: As in `Question`.
        estimate: On all images; the mean over repeats.
        low: Lower end.
        high: Upper end.
        level: Of the interval.
        unit: What was drawn: `image` or `group`.
        samples: Bootstrap resamples.
        redrawn: Of them drawn again because the metric was undefined.
    """

    row: str
    method: str
    metric: str
    estimate: float
    low: float
    high: float
    level: float
    unit: str
    samples: int
    redrawn: int


@dataclass(frozen=True)
class Comparison:
    """A row against the first one, on the same images.

    Attributes:
        row: Label of the row.
        reference: Label of the first row.
        method: As in `Question`.
        metric: As in `Question`.
        test: Name; p-value two-sided; difference = row - reference with its 95% interval.
        p_holm: Adjusted over the rows, for this method and metric.
    """

    row: str
    reference: str
    method: str
    metric: str
    test: PairedTest
    p_holm: float


def class_questions(
    row: str,
    method: str,
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray | None,
) -> list[Question]:
    """Accuracy, macro F1, weighted F1 and macro one-vs-rest AUC of one set of predictions.

    Args:
        row: Label of the row.
        method: Of the classifier.
        labels: (n,) ints.
        probabilities: (n, C), or (R, n, C) for repeats.
        groups: (n,) or None.

    Returns:
        Four questions; the class of highest probability is the prediction.
    """
    repeats = probabilities.ndim == 3
    scores = probabilities.transpose(1, 0, 2) if repeats else probabilities  # (n, R, C) or (n, C)
    chosen = scores.argmax(axis=-1)
    return [
        Question(row, method, name, function, labels, predictions, repeats, groups)
        for name, function, predictions in (
            (ACCURACY, accuracy, chosen),
            ("macro F1", partial(f1, average="macro"), chosen),
            ("weighted F1", partial(f1, average="weighted"), chosen),
            (AUC, roc_auc, scores),
        )
    ]


def count_questions(
    row: str,
    method: str,
    types: Sequence[str],
    log_counts: np.ndarray,
    predictions: np.ndarray,
    groups: np.ndarray | None,
) -> list[Question]:
    """Spearman's rank correlation and R2 of each type's log counts.

    Args:
        row: Label of the row.
        method: `counts` (whole images) or `cells`.
        types: K names.
        log_counts: (n, K) log(1 + count).
        predictions: (seeds, n, K) of the same.
        groups: (n,) or None.

    Returns:
        Two questions a type.
    """
    questions = []
    for number, name in enumerate(types):
        predicted = predictions[:, :, number].T  # (n, seeds)
        for metric, function in (("Spearman", spearman), ("R2", r_squared)):
            subject = f"{metric} {name}"
            truth = log_counts[:, number]
            questions.append(
                Question(row, method, subject, function, truth, predicted, True, groups)
            )
    return questions


def r_squared(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """1 - residual over total sum of squares; NaN where y_true is constant."""
    total = float(((y_true - y_true.mean()) ** 2).sum())
    return 1 - float(((y_true - y_pred) ** 2).sum()) / total if total > 0 else math.nan


def score(question: Question, *, samples: int, level: float, seed: int) -> list[Score]:
    """The estimate with its interval by image and, where there are groups, by group.

    Args:
        question: What is asked.
        samples: Bootstrap resamples.
        level: Of the interval.
        seed: Of the bootstrap.

    Returns:
        One or two scores, which differ in their interval only. Without an interval (a metric that
        is undefined on nearly all resamples) its ends are NaN.
    """
    scores = []
    for unit, clusters in (("image", None), ("group", question.groups)):
        if unit == "group" and clusters is None:
            continue
        arrays = question.truth, question.predictions
        try:
            found = bootstrap_ci(
                question.scored,
                *arrays,
                clusters=clusters,
                samples=samples,
                level=level,
                seed=seed,
            )
            ends = found.estimate, found.low, found.high, level, unit, found.samples, found.redrawn
        except EvaluationError:
            ends = _undefined_or_raise(question), math.nan, math.nan, level, unit, 0, 0
        scores.append(Score(question.row, question.method, question.metric, *ends))
    return scores


def _undefined_or_raise(question: Question) -> float:
    """The estimate alone; raises where even that is refused."""
    return float(question.scored(question.truth, question.predictions))


def compare(rows: Sequence[Sequence[Question]], *, samples: int, seed: int) -> list[Comparison]:
    """Test every row against the first, method by method and metric by metric.

    Independent images and one set of predictions: DeLong for AUC, McNemar (mid-p) for accuracy.
    Everything else (groups, repeats of a cross-validation, F1, rank correlation) by a bootstrap of
    the difference, which draws groups where there are any.

    Args:
        rows: Questions of each row, the reference first.
        samples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        Comparisons in the order of the questions; few-shot is not tested.

    Raises:
        ProbeError: Rows that answer for different images.
    """
    if not rows:
        return []
    reference = {(q.method, q.metric): q for q in rows[0]}
    found: dict[tuple[str, str], list[tuple[Question, PairedTest]]] = {}
    for questions in rows[1:]:
        for question in questions:
            key = question.method, question.metric
            if key not in reference or question.method.startswith(UNTESTED):
                continue
            if not np.array_equal(question.truth, reference[key].truth):
                raise ProbeError(
                    f"{question.row} and {reference[key].row}: {key[0]} was done on different "
                    "images; they cannot be compared."
                )
            test = _test(question, reference[key], samples, seed)
            found.setdefault(key, []).append((question, test))
    comparisons = []
    for (method, metric), tests in found.items():
        adjusted = holm([test.p_value for _, test in tests])
        comparisons += [
            Comparison(q.row, reference[method, metric].row, method, metric, test, float(p))
            for (q, test), p in zip(tests, adjusted, strict=True)
        ]
    return comparisons


def _test(a: Question, b: Question, samples: int, seed: int) -> PairedTest:
    if a.groups is None and not a.repeats:
        if a.metric == ACCURACY:
            return mcnemar_test(a.truth, a.predictions, b.predictions)
        if a.metric == AUC:
            try:
                return delong_test(a.truth, a.predictions, b.predictions)
            except EvaluationError:
                pass  # a class with one case, or perfect scores: the bootstrap can still answer
    return bootstrap_test(
        a.scored,
        a.truth,
        a.predictions,
        b.predictions,
        clusters=a.groups,
        samples=samples,
        seed=seed,
    )


# --- files -----------------------------------------------------------------------------------


def predictions_name(row: str, method: str) -> str:
    """File name for a row and method; letters that file systems refuse become '_'."""
    return re.sub(r"[^A-Za-z0-9.@+_-]", "_", f"{row}-{method}") + ".csv"


def write_class_predictions(
    path: Path,
    ids: np.ndarray,
    groups: np.ndarray | None,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Write id, group, label and every repeat's probabilities, `r0:p:<class>` and so on.

    Args:
        path: CSV; its folder exists.
        ids: (n,) str.
        groups: (n,) str, or None: the column stays empty.
        labels: (n,) ints, written as class names.
        probabilities: (n, C) or (R, n, C).
        classes: C names.
    """
    repeats = probabilities if probabilities.ndim == 3 else probabilities[None]
    header = [f"r{r}:p:{name}" for r in range(len(repeats)) for name in classes]
    values = repeats.transpose(1, 0, 2).reshape(len(ids), -1)
    names: list[str] = [str(classes[label]) for label in labels]
    _write_csv(path, ["id", "group", "label", *header], ids, groups, [names], values)


def write_count_predictions(
    path: Path,
    ids: np.ndarray,
    groups: np.ndarray | None,
    log_counts: np.ndarray,
    predictions: np.ndarray,
    types: Sequence[str],
) -> None:
    """Write id, group, measured `y:<type>` and every seed's `r0:<type>`, all log(1 + count).

    Args:
        path: CSV; its folder exists.
        ids: (n,) str.
        groups: (n,) str, or None.
        log_counts: (n, K).
        predictions: (seeds, n, K).
        types: K names.
    """
    header = [f"y:{name}" for name in types]
    header += [f"r{r}:{name}" for r in range(len(predictions)) for name in types]
    flat = predictions.transpose(1, 0, 2).reshape(len(ids), -1)
    values = np.concatenate([log_counts, flat], axis=1)
    _write_csv(path, ["id", "group", *header], ids, groups, [], values)


def _write_csv(
    path: Path,
    header: list[str],
    ids: np.ndarray,
    groups: np.ndarray | None,
    names: Sequence[Sequence[str]],
    values: np.ndarray,
) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for i, name in enumerate(ids):
            group = "" if groups is None else groups[i]
            # 9 digits give a float32 back exactly: ranks and ties survive.
            numbers = [f"{value:.9g}" for value in values[i]]
            writer.writerow([name, group, *(column[i] for column in names), *numbers])


def check_out(out: Path) -> None:
    """Refuse an `out` that holds something that is no report, before any work.

    Raises:
        ProbeError: It does.
    """
    if out.exists() and not (out / RESULTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ProbeError(f"--out {out}: exists and is no report (no {RESULTS}); name another.")


def open_report(out: Path) -> Path:
    """An empty folder beside `out` to fill; `close_report` gives it its name.

    Raises:
        ProbeError: See `check_out`.
    """
    check_out(out)
    partial_folder = out.with_name(f"{out.name}.partial")
    if partial_folder.exists():
        shutil.rmtree(partial_folder)
    (partial_folder / "predictions").mkdir(parents=True)
    return partial_folder


def close_report(partial_folder: Path, out: Path, results: dict[str, Any]) -> None:
    """Write results.json and rename the folder to `out`, replacing an older report."""
    with (partial_folder / RESULTS).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(plain(results), indent=2, allow_nan=False))
        stream.flush()
        os.fsync(stream.fileno())
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial_folder, out)


def plain(value: Any) -> Any:
    """Dataclasses, arrays and NaN as what JSON has; NaN becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def resolution(
    comparisons: Iterable[Comparison], metric: str, method: str = "linear"
) -> tuple[float, float] | None:
    """Half-widths of the intervals of differences: what this data set cannot tell apart.

    Args:
        comparisons: Of all rows and methods.
        metric: Whose differences.
        method: Of which classifier.

    Returns:
        The narrowest and the widest, in the metric's units; None without such a comparison.
    """
    halves = [
        (c.test.high - c.test.low) / 2
        for c in comparisons
        if c.metric == metric and c.method == method
    ]
    return (min(halves), max(halves)) if halves else None

"""Two or more studies on the same slides: scores with intervals, and paired tests of each pair."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xmag_hf.evaluation import (
    EvaluationError,
    Interval,
    PairedTest,
    accuracy,
    bootstrap_ci,
    bootstrap_test,
    delong_test,
    f1,
    f1_bootstrap_test,
    holm,
    mcnemar_test,
    roc_auc,
)

from .errors import MILError
from .predictions import ONE, CohortPredictions, StudyPredictions, paired, read_predictions
from .presets import PRESETS, load_preset

# On null data of 16 or 30 clusters the clustered bootstrap test rejected 7% at the 5% level.
FEW = 30
AUC, ACCURACY, MACRO_F1, WEIGHTED_F1 = "AUC", "accuracy", "macro F1", "weighted F1"
# name -> (metric, whether it takes probabilities instead of the predicted class)
METRICS: dict[str, tuple[Callable[..., float], bool]] = {
    AUC: (roc_auc, True),
    ACCURACY: (accuracy, False),
    MACRO_F1: (f1, False),
    WEIGHTED_F1: (partial(f1, average="weighted"), False),
}


@dataclass(frozen=True)
class CompareOptions:
    """How studies are compared.

    Raises:
        MILError: A value outside its range, named.
    """

    names: tuple[str, ...] = field(
        default=(), metadata={"help": "of the studies in tables; none: of their folders"}
    )
    cohort: str | None = field(
        default=None, metadata={"help": "only this one ('internal' or an external one's name)"}
    )
    by_patient: bool | None = field(
        default=None,
        metadata={
            "help": "draw whole patients; all tests are then bootstrap tests, since DeLong and "
            "McNemar take slides as independent. Not given: where patients have several slides"
        },
    )
    stratify: bool = field(
        default=False, metadata={"help": "draw within each class, so that class sizes are kept"}
    )
    samples: int = field(default=1000, metadata={"help": "bootstrap resamples"})
    level: float = field(default=0.95, metadata={"help": "of the intervals"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "the paper's task whose published values are shown beside ours",
            "choices": tuple(PRESETS),
        },
    )

    def __post_init__(self) -> None:
        if self.samples < 2 or not 0 < self.level < 1:
            raise MILError(
                f"samples={self.samples}, level={self.level}: at least 2, and between 0 and 1 "
                "(0.95, say)."
            )
        if self.preset is not None:
            load_preset(self.preset)


@dataclass(frozen=True)
class StudyScore:
    """One metric of one study in one cohort.

    Attributes:
        cohort: Name.
        study: Name.
        metric: Name.
        interval: Of the pooled predictions; NaN ends where there is none.
        fold_mean: Mean over folds (models); NaN where no fold has the metric.
        fold_sd: Standard deviation over folds (n - 1); NaN with fewer than two.
        folds: That have the metric.
        reason: Why something is NaN; empty otherwise.
    """

    cohort: str
    study: str
    metric: str
    interval: Interval
    fold_mean: float
    fold_sd: float
    folds: int
    reason: str = ""


@dataclass(frozen=True)
class StudyTest:
    """One paired test of two studies in one cohort; `test.difference` is first - second.

    Attributes:
        cohort: Name.
        first: Name.
        second: Name.
        metric: Name.
        test: Named, two-sided.
        p_holm: Adjusted over all pairs of the cohort for this metric and test; NaN with one pair.
        reason: Why there is no answer, or another test than usual; empty otherwise.
    """

    cohort: str
    first: str
    second: str
    metric: str
    test: PairedTest
    p_holm: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class CohortFacts:
    """What a reader must know of a cohort.

    Attributes:
        name: Of the cohort.
        slides: In it.
        patients: In it; None where unknown.
        drawn: `patients` or `slides`: what the bootstrap draws, and tests take as independent.
        classes: Class -> slides.
        pooling: How folds became one prediction per slide.
        majority: Scores of always answering with the commonest class: metric -> value.
        short_folds: Folds in which a class has no slide.
    """

    name: str
    slides: int
    patients: int | None
    drawn: str
    classes: dict[str, int]
    pooling: str
    majority: dict[str, float]
    short_folds: int


@dataclass(frozen=True)
class CompareResult:
    """A finished comparison."""

    options: CompareOptions
    studies: tuple[str, ...]
    cohorts: tuple[CohortFacts, ...]
    scores: tuple[StudyScore, ...]
    tests: tuple[StudyTest, ...]
    remarks: tuple[str, ...]


def compare_studies(paths: Sequence[Path], options: CompareOptions) -> CompareResult:
    """Compare stored predictions.

    Args:
        paths: Study folders, predictions.csv files, or predictions of `xmag probe`.
        options: See there.

    Returns:
        Scores, tests of every pair, and remarks.

    Raises:
        MILError: Unreadable predictions, or studies that are not of the same cases.
    """
    if options.names and len(options.names) != len(paths):
        raise MILError(f"--names: {len(options.names)} names for {len(paths)} studies.")
    names = options.names or (None,) * len(paths)
    studies = [read_predictions(path, name) for path, name in zip(paths, names, strict=True)]
    if options.cohort is not None:
        studies = [_only(study, options.cohort) for study in studies]
    studies = paired(studies)
    for cohort, own in studies[0].cohorts.items():
        if options.by_patient and own.patient_ids is None:
            raise MILError(f"--by-patient: {cohort} has no patients. Leave it out.")
        if options.stratify and _by_patient(own, options):
            _check_strata(cohort, own)
    tests = [
        adjusted
        for cohort in studies[0].cohorts
        for adjusted in _adjusted(
            [
                test
                for one, other in itertools.combinations(studies, 2)
                for test in _tests(cohort, one, other, options)
            ]
        )
    ]
    return score_studies(studies, options, tests)


def score_studies(
    studies: Sequence[StudyPredictions],
    options: CompareOptions,
    tests: Sequence[StudyTest] = (),
) -> CompareResult:
    """Scores, facts and remarks of studies of the same cases; of a single one too.

    Args:
        studies: As `paired` gives them, or one.
        options: See there.
        tests: Between them.

    Returns:
        The result with these tests.
    """
    cohorts = studies[0].cohorts
    facts = [
        cohort_facts(name, cohort, studies[0].classes, options) for name, cohort in cohorts.items()
    ]
    scores = [
        study_score(name, study.name, study.cohorts[name], metric, options)
        for name in cohorts
        for study in studies
        for metric in METRICS
    ]
    return CompareResult(
        options,
        tuple(study.name for study in studies),
        tuple(facts),
        tuple(scores),
        tuple(tests),
        tuple(remarks_of(facts, scores, tests, options)),
    )


def _only(study: StudyPredictions, cohort: str) -> StudyPredictions:
    if cohort not in study.cohorts:
        raise MILError(
            f"--cohort {cohort}: {study.name} has {', '.join(study.cohorts)}. Name one of them."
        )
    return dataclasses.replace(study, cohorts={cohort: study.cohorts[cohort]})


def _answers(probabilities: np.ndarray, metric: str) -> np.ndarray:
    """What a metric takes: probabilities, or the class of the highest."""
    return probabilities if METRICS[metric][1] else probabilities.argmax(axis=1)


def _by_patient(cohort: CohortPredictions, options: CompareOptions) -> bool:
    """Whether a cohort's patients are drawn, not its slides."""
    if options.by_patient is not None:
        return options.by_patient
    return cohort.patient_ids is not None and 1 < len(set(cohort.patient_ids)) < len(cohort.labels)


def _check_strata(name: str, cohort: CohortPredictions) -> None:
    """Refuse to draw patients within classes where a patient has slides of several.

    Raises:
        MILError: Names one.
    """
    classes: dict[str, int] = {}
    for patient, label in zip(cohort.patient_ids, cohort.labels.tolist(), strict=True):  # type: ignore[arg-type]
        if classes.setdefault(str(patient), label) != label:
            raise MILError(
                f"--stratify: patient {patient} of {name} has slides of several classes, and "
                "patients are drawn, since some have several slides. Leave it out."
            )


def _draws(cohort: CohortPredictions, options: CompareOptions) -> dict[str, Any]:
    """Keywords of everything that resamples."""
    return {
        "clusters": cohort.patient_ids if _by_patient(cohort, options) else None,
        "strata": cohort.labels if options.stratify else None,
        "samples": options.samples,
        "level": options.level,
        "seed": options.seed,
    }


def study_score(
    name: str, study: str, cohort: CohortPredictions, metric: str, options: CompareOptions
) -> StudyScore:
    """A study's score in a cohort, with its interval; a metric of `METRICS`."""
    function = METRICS[metric][0]
    answers = _answers(cohort.probabilities, metric)
    reason = ""
    try:
        interval = bootstrap_ci(function, cohort.labels, answers, **_draws(cohort, options))
    except EvaluationError as error:
        reason, none = str(error), math.nan
        estimate = _value(metric, cohort.labels, cohort.probabilities)
        interval = Interval(estimate, none, none, options.level, 0, 0)
    values = np.array([
        _value(metric, cohort.labels[fold.rows], fold.probabilities) for fold in cohort.folds
    ])  # fmt: skip
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else math.nan
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return StudyScore(name, study, metric, interval, mean, sd, len(values), reason)


def _value(metric: str, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The metric; NaN where it is undefined (a fold of one class)."""
    try:
        return float(METRICS[metric][0](labels, _answers(probabilities, metric)))
    except EvaluationError:
        return math.nan


def _tests(
    cohort: str, one: StudyPredictions, other: StudyPredictions, options: CompareOptions
) -> list[StudyTest]:
    first, second = one.cohorts[cohort], other.cohorts[cohort]
    y, a, b = first.labels, first.probabilities, second.probabilities
    picked = a.argmax(axis=1), b.argmax(axis=1)
    draws, level = _draws(first, options), options.level
    found: list[tuple[str, Callable[[], PairedTest]]] = []
    if draws["clusters"] is not None:
        found.append((AUC, partial(bootstrap_test, roc_auc, y, a, b, name="bootstrap", **draws)))
        found.append((ACCURACY, partial(bootstrap_test, accuracy, y, *picked, **draws)))
    else:
        found.append((AUC, partial(delong_test, y, a, b, level=level)))
        for mid_p in (False, True):
            found.append((ACCURACY, partial(mcnemar_test, y, *picked, mid_p=mid_p, level=level)))
    found.append((MACRO_F1, partial(f1_bootstrap_test, y, *picked, **draws)))
    tests = []
    for metric, test in found:
        answer, reason = _answer(metric, test, first, second, draws)
        tests.append(StudyTest(cohort, one.name, other.name, metric, answer, reason=reason))
    return tests


def _answer(
    metric: str,
    test: Callable[[], PairedTest],
    first: CohortPredictions,
    second: CohortPredictions,
    draws: dict[str, Any],
) -> tuple[PairedTest, str]:
    """The test, or DeLong's stand-in, or NaN; and why it is not the usual one."""
    try:
        return test(), ""
    except EvaluationError as error:
        reason = str(error)
    if metric == AUC:
        try:  # DeLong needs two cases a class and some variance; the bootstrap can still answer
            both = first.probabilities, second.probabilities
            return bootstrap_test(roc_auc, first.labels, *both, **draws), reason
        except EvaluationError as error:
            reason = str(error)
    none = math.nan
    one, other = (_value(metric, c.labels, c.probabilities) for c in (first, second))
    return PairedTest(
        "none", none, none, one, other, one - other, none, none, len(first.labels)
    ), reason


def _adjusted(tests: list[StudyTest]) -> list[StudyTest]:
    """Holm over the pairs of a cohort, for each metric and test; nothing to adjust with one.

    A pair's tests of a metric come in one order, so a test that another had to replace stays in
    the family of the one it replaces.
    """
    families: dict[tuple[str, int], list[int]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for place, test in enumerate(tests):
        pair = (test.first, test.second, test.metric)
        if not math.isnan(test.test.p_value):
            families.setdefault((test.metric, seen[pair]), []).append(place)
        seen[pair] += 1
    out = list(tests)
    for places in families.values():
        if len(places) > 1:
            adjusted = holm([tests[place].test.p_value for place in places])
            for place, p_value in zip(places, adjusted, strict=True):
                out[place] = dataclasses.replace(tests[place], p_holm=float(p_value))
    return out


def cohort_facts(
    name: str, cohort: CohortPredictions, classes: tuple[str, ...], options: CompareOptions
) -> CohortFacts:
    """Sizes, pooling, and what always answering with the commonest class would score."""
    counts = np.bincount(cohort.labels, minlength=len(classes))
    always = np.full(len(cohort.labels), counts.argmax())
    majority = {
        metric: float(METRICS[metric][0](cohort.labels, always))
        for metric in METRICS
        if not METRICS[metric][1]
    }
    patients = None if cohort.patient_ids is None else len(set(cohort.patient_ids))
    return CohortFacts(
        name,
        len(cohort.labels),
        patients,
        "patients" if _by_patient(cohort, options) else "slides",
        dict(zip(classes, counts.tolist(), strict=True)),
        cohort.pooling,
        majority | {AUC: 0.5},
        sum(len(set(cohort.labels[fold.rows])) < len(classes) for fold in cohort.folds),
    )


def drawn_of(facts: Sequence[CohortFacts]) -> str:
    """What the bootstrap draws, with the cohorts' names where they differ."""
    if len({cohort.drawn for cohort in facts}) == 1:
        return facts[0].drawn
    return " and ".join(f"{cohort.drawn} ({cohort.name})" for cohort in facts)


def remarks_of(
    facts: Sequence[CohortFacts],
    scores: Sequence[StudyScore],
    tests: Sequence[StudyTest],
    options: CompareOptions,
) -> list[str]:
    """What a reader must know beside the tables, a sentence a line."""
    lines = []
    for cohort in facts:
        counts = ", ".join(f"{name} {n}" for name, n in cohort.classes.items())
        patients = "" if cohort.patients is None else f" of {cohort.patients:,} patients"
        lines.append(f"{cohort.name}: {cohort.slides:,} slides{patients} ({counts})")
        lines.append(f"{cohort.name}: {cohort.pooling}")
        if cohort.short_folds:
            lines.append(
                f"{cohort.name}: {cohort.short_folds} folds lack a class; the scores of these "
                "that 'per fold' averages are over fewer classes"
            )
        if cohort.drawn == "patients" and (cohort.patients or 0) < FEW:
            lines.append(
                f"{cohort.name}: with fewer than {FEW} patients intervals are somewhat too short "
                "and p-values too small"
            )
        several = cohort.patients is not None and cohort.patients < cohort.slides
        if several and cohort.drawn == "slides":
            lines.append(
                f"{cohort.name}: some patients have several slides, which are not independent: "
                "intervals are too short and p-values too small. Leave --no-by-patient out"
            )
    unit = drawn_of(facts)
    within = " within each class" if options.stratify else ""
    lines.append(
        f"intervals: {100 * options.level:g}%, percentile bootstrap of {unit}{within}, "
        f"{options.samples:,} resamples, seed {options.seed}; tests are two-sided"
    )
    if any(cohort.pooling != ONE for cohort in facts):
        lines.append(
            "per fold: mean +- standard deviation over folds. Tests and intervals are of these "
            "trained models: they do not say what another training would have given"
        )
    if len({(test.first, test.second) for test in tests}) > 1:
        lines.append("p (Holm): adjusted over the pairs of models, for each cohort and test")
    lines += [f"{s.cohort}, {s.study}, {s.metric}: {s.reason}" for s in scores if s.reason]
    lines += [
        f"{t.cohort}, {t.first} and {t.second}, {t.metric}: {t.reason}" for t in tests if t.reason
    ]
    redrawn = sum(score.interval.redrawn for score in scores)
    if redrawn:
        lines.append(f"{redrawn:,} resamples that lost a class were drawn again")
    return lines

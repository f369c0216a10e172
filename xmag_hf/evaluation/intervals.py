"""Bootstrap: resamples of rows or of whole clusters, within strata, and percentile intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import EvaluationError, same_length
from .metrics import Metric, WeightedForm, weighted_form

# Multiplicities held at once: 16 MB of float64, whatever n is, which stays near the cache.
_BATCH_VALUES = 2_000_000
# More draws than this for one usable resample, and the interval would describe other data.
_MOST_DRAWS_PER_SAMPLE = 50


@dataclass(frozen=True)
class Interval:
    """A point estimate with its bootstrap percentile interval.

    Attributes:
        estimate: The metric on the whole data.
        low: Lower end.
        high: Upper end.
        level: Nominal coverage, 0.95 say.
        samples: Resamples that the ends are quantiles of.
        redrawn: Resamples thrown away because the metric is undefined on them.
    """

    estimate: float
    low: float
    high: float
    level: float
    samples: int
    redrawn: int


def bootstrap_ci(
    metric: Metric,
    *arrays: Any,
    clusters: Any = None,
    strata: Any = None,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of `metric(*arrays)`.

    Efron 1979 (doi:10.1214/aos/1176344552): rows are drawn with replacement, the metric is taken
    of each resample, and the interval runs between the (1 - level) / 2 and (1 + level) / 2
    quantiles. With `clusters`, whole clusters are drawn (Field & Welsh 2007,
    doi:10.1111/j.1467-9868.2007.00593.x): rows of a patient are not independent, and resampling
    rows would give an interval that is too short. With few clusters (below about 30) percentile
    intervals are still somewhat too short.

    A resample on which the metric is undefined is drawn again and counted in `redrawn`. For the
    metrics of this package that is one that lost a class of the macro mean (see `weighted_form`),
    so that all resamples average the same classes. A metric of your own is undefined where it
    returns NaN or raises EvaluationError.

    The metrics of this package, and `functools.partial` of them, are scored from multiplicities
    (sorted once: 13,000 rows x 18 classes x 1,000 resamples take seconds); others are called with
    the repeated rows. For repeats of cross-validation see `mean_over_repeats`.

    Args:
        metric: Called as metric(*[array[rows] for array in arrays]).
        arrays: Share axis 0, n rows.
        clusters: (n,) patient, slide or other unit to draw whole; None draws rows.
        strata: (n,) drawing happens within each, so its size is kept (in clusters); constant
            within a cluster.
        samples: Resamples, at least 2.
        level: Between 0 and 1.
        seed: Same seed, same interval.

    Returns:
        The interval.

    Raises:
        EvaluationError: Empty or unequal arrays, what the metric refuses on the whole data, a
            single row or cluster, a cluster in two strata, or hardly a resample is defined.
    """
    if not 0 < level < 1:
        raise EvaluationError(f"level: {level}; give a coverage between 0 and 1, 0.95 say.")
    if not arrays:
        raise EvaluationError("bootstrap_ci: no arrays; give metric's arguments after it.")
    checked = tuple(np.asarray(array) for array in arrays)
    named = {f"array {number}": array for number, array in enumerate(checked, 1)}
    resamples = _Resamples(_rows(**named), clusters, strata)
    estimate = _estimate(metric, checked)
    values, redrawn = resamples.scored([(metric, checked)], samples, seed)
    low, high = np.quantile(values[0], [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level, samples, redrawn)


def paired_differences(
    metric: Metric,
    y_true: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    clusters: Any,
    strata: Any,
    samples: int,
    seed: int,
) -> tuple[float, float, np.ndarray, int]:
    """Bootstrap distribution of metric(y_true, a) - metric(y_true, b), both on the same resamples.

    Args:
        metric: As in `bootstrap_ci`.
        y_true: n rows.
        a: n rows.
        b: n rows.
        clusters: As in `bootstrap_ci`.
        strata: As in `bootstrap_ci`.
        samples: As in `bootstrap_ci`.
        seed: As in `bootstrap_ci`.

    Returns:
        The metric of a and of b on the whole data, (samples,) differences, and the number of
        resamples that were redrawn because either was undefined.

    Raises:
        EvaluationError: As `bootstrap_ci`.
    """
    resamples = _Resamples(_rows(y_true=y_true, a=a, b=b), clusters, strata)
    whole_a, whole_b = _estimate(metric, (y_true, a)), _estimate(metric, (y_true, b))
    cases = [(metric, (y_true, a)), (metric, (y_true, b))]
    values, redrawn = resamples.scored(cases, samples, seed)
    return whole_a, whole_b, values[0] - values[1], redrawn


class _Resamples:
    """Draws multiplicities of rows: of single rows or whole clusters, within strata."""

    def __init__(self, n: int, clusters: Any, strata: Any) -> None:
        self.n = n
        unit_of_row = np.arange(n) if clusters is None else _codes("clusters", clusters, n)
        units = int(unit_of_row.max()) + 1
        stratum_of_unit = np.zeros(units, dtype=np.int64)
        if strata is not None:
            stratum_of_row = _codes("strata", strata, n)
            stratum_of_unit[unit_of_row] = stratum_of_row
            torn = np.flatnonzero(stratum_of_unit[unit_of_row] != stratum_of_row)
            if len(torn):
                raise EvaluationError(
                    f"strata: cluster {str(np.asarray(clusters)[torn[0]])!r} lies in more than one "
                    "stratum; give strata that are constant within a cluster, or none."
                )
        self.members = [np.flatnonzero(stratum_of_unit == s) for s in np.unique(stratum_of_unit)]
        if max(map(len, self.members)) < 2:
            what = "cluster" if clusters is not None else "row"
            raise EvaluationError(
                f"bootstrap: one {what} only{' in every stratum' if strata is not None else ''}; "
                "resampling needs two, so no interval can be given."
            )
        self.unit_of_row = None if clusters is None else unit_of_row
        self.units = units

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """(count, n) float64 multiplicities of the rows in `count` resamples."""
        offsets = np.arange(count)[:, None] * self.units
        drawn = [
            (members[rng.integers(0, size, (count, size), dtype=np.int32)] + offsets).ravel()
            for members, size in zip(self.members, map(len, self.members), strict=True)
        ]
        counts = np.bincount(np.concatenate(drawn), minlength=count * self.units)
        counts = counts.reshape(count, self.units).astype(np.float64)
        return counts if self.unit_of_row is None else counts[:, self.unit_of_row]

    def scored(
        self, cases: list[tuple[Metric, tuple[np.ndarray, ...]]], samples: int, seed: int
    ) -> tuple[np.ndarray, int]:
        """Score all cases on the same resamples, drawing again where any is undefined.

        Returns:
            (cases, samples) values and the number of resamples redrawn.
        """
        if samples < 2:
            raise EvaluationError(f"samples: {samples}; at least 2 are needed, 1000 are usual.")
        forms = [weighted_form(*case) or _row_form(*case) for case in cases]
        rng = np.random.default_rng(seed)
        batch = max(1, _BATCH_VALUES // self.n)
        kept, wanted, redrawn = [], samples, 0
        while wanted:
            weights = self.draw(rng, min(batch, wanted))
            values = np.stack([form(weights) for form in forms])
            defined = ~np.isnan(values).any(axis=0)
            kept.append(values[:, defined])
            wanted -= int(defined.sum())
            redrawn += int((~defined).sum())
            if wanted and redrawn > _MOST_DRAWS_PER_SAMPLE * samples:
                raise EvaluationError(
                    f"bootstrap: the metric was undefined on {redrawn} resamples, and defined on "
                    f"{samples - wanted} of {samples} (a class with very few rows or clusters is "
                    "lost in most); resample with strata=labels, or merge rare classes."
                )
        return np.concatenate(kept, axis=1), redrawn


def _row_form(metric: Metric, arrays: tuple[np.ndarray, ...]) -> WeightedForm:
    """Any metric's form for multiplicities: repeat the rows, and call it."""

    def score(weights: np.ndarray) -> np.ndarray:
        values = np.empty(len(weights))
        for number, row in enumerate(weights):
            rows = np.repeat(np.arange(len(row)), row.astype(np.int64))
            try:
                values[number] = metric(*[array[rows] for array in arrays])
            except EvaluationError:
                values[number] = np.nan
        return values

    return score


def _estimate(metric: Metric, arrays: tuple[np.ndarray, ...]) -> float:
    value = float(metric(*arrays))
    if not np.isfinite(value):
        raise EvaluationError(
            f"metric: {value} on the whole data ({len(arrays[0])} rows); "
            "an interval needs a metric that is defined there."
        )
    return value


def _rows(**arrays: np.ndarray) -> int:
    for name, array in arrays.items():
        if array.ndim == 0:
            raise EvaluationError(f"{name}: a single number; give an array with a row per case.")
    n = same_length(**arrays)
    if n == 0:
        raise EvaluationError("bootstrap: empty arrays; there is nothing to score.")
    return n


def _codes(name: str, values: Any, n: int) -> np.ndarray:
    """Group numbers 0..G-1 of the rows.

    Raises:
        EvaluationError: Not one per row, or some are missing.
    """
    array = np.asarray(values)
    if array.shape != (n,):
        raise EvaluationError(f"{name}: shape {array.shape}; give one per row, shape ({n},).")
    missing = array.dtype.kind in "fO" and any(v is None or v != v for v in array.tolist())
    if missing or (array.dtype.kind in "US" and (array == array.dtype.type("")).any()):
        raise EvaluationError(f"{name}: some rows have none; drop those rows or name their group.")
    try:
        return np.unique(array, return_inverse=True)[1]
    except TypeError as error:
        raise EvaluationError(f"{name}: mixed types ({error}); give strings or integers.") from None

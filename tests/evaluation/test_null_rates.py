"""Rejection rates of the paired tests on data where both models are equally good."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from xmag_hf.evaluation import delong_test, f1_bootstrap_test, mcnemar_test

RUNS = 1000
# Two-sided 99% band of the number of rejections at 5%: 33 to 69 of 1,000.
LOW, HIGH = binom.ppf([0.005, 0.995], RUNS, 0.05)

pytestmark = pytest.mark.slow


def rejections(p_value: Callable[[np.random.Generator, int], float], seed: int) -> int:
    rng = np.random.default_rng(seed)
    return sum(p_value(rng, run) <= 0.05 for run in range(RUNS))


def equal_scores(rng: np.random.Generator, n: int, shares: list[float]) -> tuple[np.ndarray, ...]:
    """Labels and two correlated (n, C) score tables of the same distribution."""
    y = rng.choice(len(shares), n, p=shares)
    shared = rng.normal(size=(n, len(shares)))
    tables = [shared + rng.normal(size=shared.shape) for _ in range(2)]
    for table in tables:
        table[np.arange(n), y] += 1.5
    return y, *tables


def equal_predictions(rng: np.random.Generator, n: int, shares: list[float]) -> tuple:
    """Labels and two models wrong with the same chance, more often on the same cases."""
    y = rng.choice(len(shares), n, p=shares)
    hard = rng.random(n) < 0.5
    models = []
    for _ in range(2):
        guess = hard & (rng.random(n) < 0.5)
        models.append(np.where(guess, rng.integers(0, len(shares), n), y))
    return y, *models


@pytest.mark.parametrize("shares", [[0.7, 0.3], [0.5, 0.3, 0.2]])
def test_delong_keeps_its_level(shares: list[float]) -> None:
    count = rejections(lambda rng, _: delong_test(*equal_scores(rng, 200, shares)).p_value, 1)
    print(f"DeLong, {len(shares)} classes: {count} of {RUNS}")
    assert LOW <= count <= HIGH


def test_mcnemar_mid_p_keeps_its_level_and_exact_stays_below() -> None:
    def p_value(rng: np.random.Generator, mid_p: bool) -> float:
        return mcnemar_test(*equal_predictions(rng, 500, [0.5, 0.3, 0.2]), mid_p=mid_p).p_value

    mid_p = rejections(lambda rng, _: p_value(rng, True), 2)
    exact = rejections(lambda rng, _: p_value(rng, False), 2)
    print(f"McNemar mid-p: {mid_p}, exact: {exact} of {RUNS}")
    assert LOW <= mid_p <= HIGH
    assert exact <= HIGH
    assert exact <= mid_p


@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_f1_bootstrap_keeps_its_level(average) -> None:
    def p_value(rng: np.random.Generator, run: int) -> float:
        case = equal_predictions(rng, 500, [0.5, 0.3, 0.2])
        return f1_bootstrap_test(*case, average=average, seed=run).p_value

    count = rejections(p_value, 3)
    print(f"F1 bootstrap, {average}: {count} of {RUNS}")
    assert LOW <= count <= HIGH

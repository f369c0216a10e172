from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from xmag_hf.distillation.alignment import (
    RELATIVE_ALPHAS,
    fit_ridge,
    score_predictions,
    spatial_folds,
)


def _problem(n: int = 120, d: int = 10, t: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 3, d) + 5
    y = x @ rng.normal(size=(d, t)) * 0.1 + rng.normal(size=(n, t)) + 2
    return x, y, rng.integers(0, 5, n)


@pytest.mark.parametrize(("n", "d"), [(120, 10), (20, 30)])
def test_ridge_and_its_penalty_are_sklearns(n: int, d: int) -> None:
    x, y, folds = _problem(n, d)
    got = fit_ridge(x, y, folds)
    gram = ((x - x.mean(0)) ** 2).sum(0).mean()  # mean eigenvalue = mean diagonal
    errors = {}
    for alpha in RELATIVE_ALPHAS * gram:
        held_out = cross_val_predict(Ridge(alpha), x, y, groups=folds, cv=LeaveOneGroupOut())
        errors[alpha] = ((held_out - y) ** 2).sum()
    best = min(errors, key=errors.__getitem__)
    assert got.alpha == pytest.approx(best)
    reference = Ridge(best).fit(x, y)
    assert got(x) == pytest.approx(reference.predict(x), abs=1e-8)


def test_ridge_refuses_one_fold() -> None:
    x, y, _ = _problem()
    with pytest.raises(ValueError, match="at least two"):
        fit_ridge(x, y, np.zeros(len(x), int))


def test_scores_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    target = rng.normal(size=(2, 6, 5)) + 3
    predicted = target + rng.normal(size=target.shape)
    mean = np.full(5, 3.0)
    got = score_predictions(predicted, target, mean)
    cosines, centred, hits = [], [], []
    for p_group, t_group in zip(predicted, target, strict=True):
        for i in range(6):
            cosines.append(cosine_similarity(p_group[[i]], t_group[[i]])[0, 0])
            row = cosine_similarity(p_group[[i]] - mean, t_group - mean)[0]
            centred.append(row[i])
            hits.append(row.argmax() == i)
    assert got.cosine == pytest.approx(np.mean(cosines))
    assert got.centred_cosine == pytest.approx(np.mean(centred))
    assert got.retrieval == pytest.approx(np.mean(hits))
    assert got.chance == pytest.approx(1 / 6)


def test_the_constant_scores_its_cosine_zero_and_chance() -> None:
    rng = np.random.default_rng(2)
    target = rng.normal(size=(3, 4, 5)) + 3
    mean = np.full(5, 3.0)
    got = score_predictions(np.broadcast_to(mean, target.shape), target, mean)
    expected = cosine_similarity(target.reshape(-1, 5), mean[None]).mean()
    assert got.cosine == pytest.approx(expected)
    assert got.centred_cosine == 0
    assert got.retrieval == got.chance == 0.25


def test_identical_candidates_do_not_count_against_a_prediction() -> None:
    target = np.array([[[1.0, 0], [1.0, 0], [0, 1.0]]])
    got = score_predictions(target, target, np.zeros(2))
    assert got.retrieval == 1.0
    assert got.chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_folds_are_bands_within_slides_that_have_rows_enough() -> None:
    slide = np.repeat([0, 7], 20)
    y = np.concatenate([np.arange(20), np.arange(20)[::-1] * 7])
    folds = spatial_folds(slide, y)
    assert folds[:20].tolist() == np.repeat(range(5), 4).tolist()
    assert folds[20:].tolist() == np.repeat(range(5), 4)[::-1].tolist()


def test_folds_of_many_small_slides_are_whole_slides_of_even_weight() -> None:
    rng = np.random.default_rng(0)
    slide = rng.choice(2000, 3000)
    folds = spatial_folds(slide, rng.integers(0, 9000, 3000))
    assert np.bincount(folds).tolist() == pytest.approx([600] * 5, abs=5)
    assert all(len(set(folds[slide == number])) == 1 for number in np.unique(slide))
    assert set(spatial_folds(np.arange(3), np.zeros(3)).tolist()) == {0, 1, 2}  # one pair a slide
    with pytest.raises(ValueError, match="at least 2"):
        spatial_folds(np.zeros(1), np.zeros(1))

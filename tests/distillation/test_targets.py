from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from xmag_hf.distillation import targets
from xmag_hf.distillation.targets import WHITENING_FLOOR, fit_target_map

ROWS = np.arange(50, 600)  # the first fifty are held out


class Cached:
    """600 pairs of correlated features around a mean far from 0, read as a cache is."""

    teacher_dim = 6

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        mixing = rng.normal(size=(6, 6)) * np.array([3, 2, 1, 0.5, 0.1, 0.01])[:, None]
        self.values = (rng.normal(size=(600, 16, 6)) @ mixing + 20).astype(np.float16)
        self.values[:50] += 5

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[row]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows]


@pytest.fixture
def cached() -> Any:
    return Cached()


def test_centred_targets_lose_the_training_mean(cached) -> None:
    mapped = fit_target_map(cached, ROWS, "mean", 0)
    assert mapped is not None
    cells = cached.values[ROWS].astype(np.float64)
    got = mapped(torch.from_numpy(cached.values[:7]))
    assert np.abs(got.numpy() - (cached.values[:7] - cells.mean((0, 1)))).max() < 1e-3
    assert fit_target_map(cached, ROWS, "none", 0) is None


def test_whitened_targets_are_sklearns_components_over_the_floored_spread(cached) -> None:
    mapped = fit_target_map(cached, ROWS, "whiten", 0)
    assert mapped is not None
    cells = cached.values[ROWS].reshape(-1, 6).astype(np.float64)
    pca = PCA().fit(cells)
    variance = pca.explained_variance_ * (len(cells) - 1) / len(cells)
    expected = pca.transform(cells) / np.sqrt(variance + WHITENING_FLOOR * variance.mean())
    got = mapped(torch.from_numpy(cells)).numpy()[:, ::-1]  # sklearn's largest comes first
    assert np.abs(np.abs(got) - np.abs(expected)).max() < 2e-3  # a component has no sign
    assert variance.max() / variance.min() > 1e3 and got.var(0)[0] == pytest.approx(1, abs=0.01)


def test_statistics_of_a_draw_are_the_same_each_time(
    cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit_target_map(cached, ROWS, "mean", 0)
    monkeypatch.setattr(targets, "STATISTICS_PAIRS", 40)
    one, two, other = (fit_target_map(cached, ROWS, "mean", seed) for seed in (1, 1, 2))
    assert whole is not None and one is not None and two is not None and other is not None
    assert torch.equal(one.mean, two.mean)
    assert not torch.equal(one.mean, other.mean)
    assert (one.mean - whole.mean).abs().max() < 1.0  # 640 cells of spread 3

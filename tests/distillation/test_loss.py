from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from xmag_hf.distillation.loss import (
    DistillationLoss,
    mean_pairwise_cosine,
    negative_cosine,
    relational_loss,
)
from xmag_hf.distillation.targets import TargetMap


def test_negative_cosine_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    expected = -np.diag(cosine_similarity(a, b)).mean()
    assert negative_cosine(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, 1e-5)


def test_teacher_gets_no_gradient_and_zero_vectors_no_nan() -> None:
    prediction = torch.zeros(2, 3, requires_grad=True)
    target = torch.ones(2, 3, requires_grad=True)
    loss = negative_cosine(prediction, target)
    loss.backward()
    assert loss.item() == 0.0
    assert target.grad is None
    assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_loss_is_one_global_plus_half_local_by_hand() -> None:
    torch.manual_seed(0)
    loss = DistillationLoss(6, 4).double().eval()
    pooled, spatial = torch.randn(3, 6).double(), torch.randn(3, 16, 6).double()
    teacher = torch.randn(3, 16, 4).double()
    got = loss(pooled, spatial, teacher)

    def head(weights: dict, x: np.ndarray) -> np.ndarray:
        """Linear -> BatchNorm (fresh running statistics: 0 and 1) -> erf GELU -> Linear."""
        from scipy.special import erf

        h = x @ weights["0.weight"].T + weights["0.bias"]
        h = h / np.sqrt(1 + 1e-5)
        h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
        return h @ weights["3.weight"].T + weights["3.bias"]

    def weights(module: torch.nn.Module) -> dict:
        return {k: v.numpy() for k, v in module.state_dict().items()}

    g = head(weights(loss.global_head), pooled.numpy())
    expected_global = -np.diag(cosine_similarity(g, teacher.numpy().mean(1))).mean()
    local = head(weights(loss.local_head), spatial.numpy().reshape(48, 6))
    expected_local = -np.diag(cosine_similarity(local, teacher.numpy().reshape(48, 4))).mean()
    assert got["loss_global"].item() == pytest.approx(expected_global, rel=1e-5)
    assert got["loss_local"].item() == pytest.approx(expected_local, rel=1e-5)
    assert got["loss"].item() == pytest.approx(expected_global + 0.5 * expected_local, rel=1e-5)


def test_relational_loss_by_brute_force() -> None:
    rng = np.random.default_rng(2)
    p, t = rng.normal(size=(5, 3)), rng.normal(size=(5, 7)) + 1
    cosines = [(cosine_similarity(p)[i, j], cosine_similarity(t)[i, j]) for i in range(5)
               for j in range(5) if i != j]  # fmt: skip
    expected = np.mean([(a - b) ** 2 for a, b in cosines])
    assert relational_loss(torch.tensor(p), torch.tensor(t)).item() == pytest.approx(expected, 1e-5)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]  # keeps every angle, and scale is no angle
    turned = torch.tensor(3 * t @ rotation)
    assert relational_loss(turned, torch.tensor(t)).item() == pytest.approx(0, abs=1e-10)


def test_relational_weight_and_mapped_targets_enter_the_loss() -> None:
    torch.manual_seed(0)
    mean, basis = torch.randn(4), torch.randn(4, 4)
    plain = DistillationLoss(6, 4).eval()
    loss = DistillationLoss(6, 4, relational_weight=2.0, target_map=TargetMap(mean, basis)).eval()
    loss.load_state_dict(plain.state_dict(), strict=False)
    pooled, spatial, teacher = torch.randn(3, 6), torch.randn(3, 16, 6), torch.randn(3, 16, 4)
    got = loss(pooled, spatial, teacher)
    mapped = torch.tensor((teacher.numpy() - mean.numpy()) @ basis.numpy())
    expected = plain(pooled, spatial, mapped)
    relational = relational_loss(plain.global_head(pooled), mapped.mean(1)).item()
    assert got["loss_global"].item() == pytest.approx(expected["loss_global"].item(), abs=1e-5)
    assert got["loss_local"].item() == pytest.approx(expected["loss_local"].item(), abs=1e-5)
    assert got["loss_relational"].item() == pytest.approx(relational, abs=1e-5)
    total = expected["loss"].item() + 2 * relational
    assert got["loss"].item() == pytest.approx(total, abs=1e-5)
    assert "loss_relational" not in expected


def test_zoomed_views_are_compared_with_what_they_show() -> None:
    """Shares of sub-patches by counting pixels; local loss only where cells match."""
    torch.manual_seed(0)
    loss = DistillationLoss(6, 4, relational_weight=0.5).eval()
    pooled, spatial, teacher = torch.randn(4, 6), torch.randn(4, 16, 6), torch.randn(4, 16, 4)
    zoom = torch.tensor([0.8, 0.97, 1.0, 1.2])
    got = loss(pooled, spatial, teacher, zoom)
    targets = []
    for features, z in zip(teacher.numpy(), zoom.tolist(), strict=True):
        cell_of = np.arange(16).reshape(4, 4).repeat(100, 0).repeat(100, 1)  # a region of 400 px
        edge = max(0, round(200 - 200 * z))
        counts = np.bincount(cell_of[edge : 400 - edge, edge : 400 - edge].ravel(), minlength=16)
        targets.append(counts @ features / counts.sum())
    target = torch.tensor(np.array(targets)).float()
    projected = loss.global_head(pooled)
    assert got["loss_global"].item() == pytest.approx(negative_cosine(projected, target).item())
    relational = relational_loss(projected, target).item()
    assert got["loss_relational"].item() == pytest.approx(relational, rel=1e-5)
    local = loss.local_head(spatial.flatten(0, 1)).unflatten(0, (4, 16))
    two_of_four = 0.5 * negative_cosine(local[1:3], teacher[1:3]).item()
    assert got["loss_local"].item() == pytest.approx(two_of_four, rel=1e-5)
    plain, ones = loss(pooled, spatial, teacher), loss(pooled, spatial, teacher, torch.ones(4))
    assert all(torch.allclose(plain[name], ones[name]) for name in plain)


def test_local_batchnorm_sees_all_cells_at_once() -> None:
    loss = DistillationLoss(2, 3)
    loss(torch.randn(4, 2), torch.randn(4, 16, 2), torch.randn(4, 16, 3))
    hidden = []
    loss.local_head[1].register_forward_hook(lambda m, i, o: hidden.append(o))
    loss(torch.randn(4, 2), torch.randn(4, 16, 2), torch.randn(4, 16, 3))
    assert hidden[0].shape == (64, 3)
    assert hidden[0].mean(0).abs().max() < 1e-5  # normalised over the 64 rows together


def test_mismatched_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong"):
        DistillationLoss(2, 3)(torch.zeros(4, 2), torch.zeros(4, 9, 2), torch.zeros(4, 16, 3))
    with pytest.raises(ValueError, match="differ"):
        negative_cosine(torch.zeros(2, 3), torch.zeros(2, 4))


def test_collapse_indicator_by_brute_force() -> None:
    rows = np.random.default_rng(1).normal(size=(6, 9)) + 0.5
    pairs = [cosine_similarity(rows[[i]], rows[[j]])[0, 0] for i in range(6) for j in range(i)]
    got = mean_pairwise_cosine(torch.tensor(rows)).item()
    assert got == pytest.approx(np.mean(pairs), rel=1e-5)
    assert mean_pairwise_cosine(torch.ones(5, 3)).item() == pytest.approx(1.0)

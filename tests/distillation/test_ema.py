from __future__ import annotations

import pytest
import torch
from torch import nn

from xmag_hf.distillation.ema import ExponentialMovingAverage


def test_average_follows_the_recursion_for_parameters_and_buffers() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = ExponentialMovingAverage(student, decay=0.5)
    expected = {k: v.clone().double() for k, v in student.state_dict().items()}
    for t in range(1, 21):
        with torch.no_grad():
            student[0].weight.add_(torch.randn(2, 2))
        student(torch.randn(8, 2))  # moves running statistics and the integer counter
        ema.update(student)
        decay = min(0.5, (1 + t) / (10 + t))
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    for name, value in ema.model.state_dict().items():
        assert value.double().numpy() == pytest.approx(expected[name].numpy(), abs=1e-5), name
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_state_round_trip() -> None:
    ema = ExponentialMovingAverage(nn.Linear(2, 2), decay=0.9)
    ema.update(nn.Linear(2, 2))
    other = ExponentialMovingAverage(nn.Linear(2, 2), decay=0.9)
    other.load_state_dict(ema.state_dict())
    student = nn.Linear(2, 2)
    ema.update(student), other.update(student)
    assert torch.equal(ema.model.weight, other.model.weight)

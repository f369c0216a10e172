"""Exponential moving average of the student: the encoder that is released."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps avg <- d_t * avg + (1 - d_t) * student, d_t = min(decay, (1 + t) / (10 + t)).

    The ramp lets a short run forget its starting weights (at 0.999 alone, a run of 300 steps would
    still be three quarters of them). Floating-point buffers (BatchNorm's running statistics) are
    averaged like parameters, so that they belong to the averaged weights; integer buffers are
    copied. The average is float32 whatever the student trains in.

    Args:
        model: The student; copied.
        decay: Largest d_t, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take one step towards `student`, after its optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        current = student.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].to(average.dtype))
            else:
                average.copy_(current[name])
        # One fused call: a loop over 250 tensors costs more than the arithmetic.
        torch._foreach_lerp_(averages, values, 1.0 - decay)  # type: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the count of updates, for checkpoints."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])

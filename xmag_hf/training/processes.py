"""The processes of a training: how they are opened, and what they must agree on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


class TrainingError(ValueError):
    """Processes that cannot train as asked; the message names subject, value and remedy."""


def open_accelerator(
    mixed_precision: str,
    accumulation: int,
    *,
    cpu: bool,
    trackers: Sequence[str] = (),
    project_dir: str | None = None,
) -> Accelerator:
    """The processes of `accelerate launch`, or this one alone.

    Args:
        mixed_precision: no, bf16, fp16, or auto: what `accelerate launch` says, else bf16 on a GPU
            that has it, else no.
        accumulation: Backward passes an optimiser step, on each process.
        cpu: Whether the CPU is trained on. Said outright, because torchrun without a GPU otherwise
            makes N strangers, not a group.
        trackers: Of accelerate, by name.
        project_dir: Where trackers write.

    Returns:
        The accelerator; every process opens its own.

    Raises:
        TrainingError: accelerate's own settings say another accumulation.
    """
    precision: str | None = mixed_precision
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if on_gpu else "no"
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            precision = None  # `accelerate launch --mixed_precision ...` or its config has said
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        log_with=list(trackers) or None,
        project_dir=project_dir,
        # Processes wait for the slowest to fill its share of a cache, and while one scores: with
        # the default of ten minutes a large training would end there.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
    )
    if accelerator.gradient_accumulation_steps != accumulation:
        raise TrainingError(
            f"accelerate's own settings say {accelerator.gradient_accumulation_steps} gradient "
            f"accumulation steps, the options {accumulation}. Say it once: with the options, not "
            "with accelerate's."
        )
    return accelerator


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process was asked to stop; all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    asked = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(asked, reduction="sum") > 0)  # type: ignore[operator]

"""The processes of a training: how they are opened, and what they must agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, parse_flag_from_env

from xmag_hf.lock import only_writer


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
        mixed_precision: no, bf16, fp16, or auto: what `accelerate launch` was told, else bf16 on a
            GPU that has it, else no.
        accumulation: Backward passes an optimiser step, on each process.
        cpu: Whether the CPU is trained on. Said outright, because torchrun without a GPU otherwise
            makes N strangers, not a group.
        trackers: Of accelerate, by name.
        project_dir: Where trackers write.

    Returns:
        The accelerator; every process opens its own.

    Raises:
        TrainingError: accelerate's own settings say another accumulation, it does not know a
            tracker or lacks its package, or the device cannot do the precision.
    """
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_precision(mixed_precision, cpu),
            gradient_accumulation_steps=accumulation,
            log_with=list(trackers) or None,
            project_dir=project_dir,
            # Processes wait for the slowest to fill its share of a cache, and while one scores:
            # with the default of ten minutes a large training would end there.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
        )
    except ValueError as error:
        asked = f"--mixed-precision {mixed_precision}"
        if trackers:
            asked += f" --report-to {' '.join(trackers)}"
        raise TrainingError(f"{asked}: accelerate refuses: {error}") from error
    if accelerator.gradient_accumulation_steps != accumulation:
        raise TrainingError(
            f"accelerate's own settings say {accelerator.gradient_accumulation_steps} gradient "
            f"accumulation steps, the options {accumulation}. Say it once: with the options, not "
            "with accelerate's."
        )
    _refuse_lost(trackers, list(map(str, accelerator.log_with)))
    return accelerator


def _precision(asked: str, cpu: bool) -> str | None:
    """What accelerate is opened with; None where its launcher was told, for it to read."""
    if asked != "auto":
        return asked
    # `accelerate launch` always sets this, to `no` where nobody said anything.
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() != "no":
        return None
    on_gpu = torch.cuda.is_available() and not cpu and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _refuse_lost(asked: Sequence[str], opened: Sequence[str]) -> None:
    """Refuse trackers that accelerate leaves out without a word: their package is not there."""
    lost = [name for name in asked if name != "all" and name not in opened]
    if "all" in asked:  # the installed ones, whatever else is named
        lost = [] if opened else ["all"]
    if lost:
        package = "wandb" if lost == ["all"] else " ".join(lost)
        raise TrainingError(
            f"--report-to {' '.join(lost)}: not installed, so nothing would be recorded. "
            f"`pip install {package}`, or leave it out."
        )


@contextlib.contextmanager
def only_run(
    accelerator: Accelerator, out: Path, refusal: type[Exception], option: str = "--out"
) -> Iterator[None]:
    """`only_writer` for all processes of a run: the first has the lock, the others hear of it.

    Args:
        accelerator: The processes.
        out: Of the run, absolute.
        refusal: Raised by every process while another run has the lock, or where none can be had.
        option: That names `out`, for the message.
    """
    with contextlib.ExitStack() as held:
        refused = ""
        if accelerator.is_main_process:
            try:
                held.enter_context(only_writer(out, refusal, option))
            except refusal as error:  # told to all: they would wait for this one
                refused = str(error)
            except OSError as error:
                refused = (
                    f"{option} {out}: its lock cannot be made beside it: {error}. Choose a folder "
                    "whose parent can be written."
                )
        if accelerator.num_processes > 1:
            refused = gather_object([refused])[0]
        if refused:
            raise refusal(refused)
        yield


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process was asked to stop; all must leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    asked = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(asked, reduction="sum") > 0)  # type: ignore[operator]

"""Checkpoints and the metrics file: what a training needs to go on where it stopped.

`FOLDER/checkpoints/step-N` is complete or absent: every process writes into `step-N.tmp`, then
one renames it. `metrics.jsonl` is cut back to the checkpoint's step on resume, so its lines are
those of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from xmag_hf.atomic_write import sync, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

RUN_FILE = "run.json"


class Checkpoint(NamedTuple):
    """One that is complete.

    Attributes:
        step: Optimiser steps done.
        folder: For accelerate's `load_state`.
        record: What was saved beside it.
    """

    step: int
    folder: Path
    record: dict[str, Any]


def checkpoint_folder(output_dir: str | Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(output_dir) / "checkpoints"


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, record: dict[str, Any]
) -> Path:
    """Save what the accelerator holds, random states too, after optimiser step `step`.

    Called by every process.

    Args:
        accelerator: With model, optimiser and all else registered.
        output_dir: Of the run.
        step: Optimiser steps done.
        record: What a run that goes on must agree with.

    Returns:
        The checkpoint's folder. Older ones are removed once it has its name.
    """
    folder = checkpoint_folder(output_dir)
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if accelerator.is_main_process:
        for stale in folder.glob("*.tmp"):  # of a save that a kill or a full disk cut short
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / RUN_FILE).write_text(json.dumps(record | {"step": step}, indent=2))
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync(folder)
        for number, old in _steps(output_dir):
            if number < step:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def newest_checkpoint(output_dir: str | Path) -> Checkpoint | None:
    """The last complete checkpoint of a run; whether it is of this very run, its record tells."""
    found = _steps(output_dir)
    if not found:
        return None
    step, folder = found[-1]
    return Checkpoint(step, folder, json.loads((folder / RUN_FILE).read_text()))


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete all checkpoints of a run: at its start with --no-resume, and when it is saved."""
    shutil.rmtree(checkpoint_folder(output_dir), ignore_errors=True)


class Metrics:
    """`metrics.jsonl`: one JSON object a line, in step order.

    Args:
        path: Of the file.
        resume_step: Lines after this step are cut off; 0 starts the file anew.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        lines = path.read_text().splitlines() if path.exists() and resume_step else []
        kept = [line for line in lines if _step_of(line) <= resume_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(line + "\n" for line in kept))
        self.path = path

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; what is not finite (fp16's first gradients) becomes null."""
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


class StopRequest:
    """Set by SIGTERM, read between steps."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: remember, and let the step finish."""
        self.asked = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Catch SIGTERM for the length of the block (a cluster's warning before it kills)."""
    request = StopRequest()
    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, previous)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


def _steps(output_dir: str | Path) -> list[tuple[int, Path]]:
    folder = checkpoint_folder(output_dir)
    found = [
        (int(path.name.removeprefix("step-")), path)
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and (path / RUN_FILE).exists()
    ]
    return sorted(found)

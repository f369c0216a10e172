"""Checkpoints, the metrics file, and what a run needs to go on where it stopped.

`output_dir/checkpoints/step-N` is complete or absent: every process writes into `step-N.tmp`,
then one renames it. `metrics.jsonl` is cut back to the checkpoint's step on resume, so its lines
are those of an uninterrupted run.
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
from typing import TYPE_CHECKING, Any

from xmag_hf._version import __version__
from xmag_hf.distillation.options import (
    DistillationError,
    DistillOptions,
    differing_options,
    recorded_options,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

RUN_FILE = "run.json"
RESULT_FILE = "distillation.json"


def checkpoint_folder(output_dir: str | Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(output_dir) / "checkpoints"


def run_record(options: DistillOptions, fingerprint: str, teacher: str, world: int) -> dict:
    """What a checkpoint must agree with before it is continued (JSON-able)."""
    return {
        "options": recorded_options(options),
        "corpus_fingerprint": fingerprint,
        "teacher_revision": teacher,
        "world": world,
        "xmag_hf": __version__,
    }


def save_checkpoint(accelerator: Accelerator, output_dir: str, step: int, record: dict) -> Path:
    """Save model, optimiser, schedule, EMA and random states after optimiser step `step`.

    Called by every process.

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
                _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(folder)
        for number, old in _steps(output_dir):
            if number < step:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str, record: dict[str, Any]) -> tuple[int, Path, float] | None:
    """Find the last checkpoint of this very run.

    Args:
        output_dir: Of the run.
        record: From `run_record`, of the run that wants to go on.

    Returns:
        (step, folder, seconds of training so far), or None if there is none.

    Raises:
        DistillationError: It was made with other options, corpus, teacher or process count; each
            difference is listed.
    """
    found = _steps(output_dir)
    if not found:
        return None
    step, folder = found[-1]
    old = json.loads((folder / RUN_FILE).read_text())
    differences = differing_options(old["options"], record["options"])
    for name in ("corpus_fingerprint", "teacher_revision", "world"):
        if old[name] != record[name]:
            differences.append(f"{name}: {old[name]} then, {record[name]} now")
    if differences:
        raise DistillationError(
            f"{folder} is of another run:\n  " + "\n  ".join(differences) + "\n"
            "Use the same values to go on, another --output_dir, or --no-resume to start anew."
        )
    return step, folder, old["seconds"]


def remove_checkpoints(output_dir: str) -> None:
    """Delete all checkpoints of a run: at its start with --no-resume, and when it is saved."""
    shutil.rmtree(checkpoint_folder(output_dir), ignore_errors=True)


def refuse_foreign(output_dir: str) -> None:
    """Refuse, before any work, a folder whose model is none of ours.

    Raises:
        DistillationError: Saving would be refused at the end.
    """
    try:
        kind = json.loads((Path(output_dir) / "config.json").read_text()).get("model_type")
    except FileNotFoundError:
        return
    except (ValueError, AttributeError):
        kind = None
    if not str(kind).startswith("xmag"):
        raise DistillationError(
            f"{output_dir} holds another model (model_type {kind!r}), which is not replaced. "
            "Choose another --output-dir."
        )


def finished_with(output_dir: str, record: dict[str, Any]) -> bool:
    """Whether `output_dir` already holds the model that this run would make, scores and all.

    Raises:
        DistillationError: It holds a finished model of another run or tool.
    """
    folder = Path(output_dir)
    if not (folder / "config.json").exists():
        return False
    result = folder / RESULT_FILE
    if not result.exists():
        raise DistillationError(
            f"{folder} holds a model that no distillation run made. Choose another --output-dir, "
            "or --overwrite to replace it."
        )
    old = json.loads(result.read_text())
    differences = differing_options(old["run"]["options"], record["options"])
    for name in ("corpus_fingerprint", "teacher_revision"):
        if old["run"][name] != record[name]:
            differences.append(f"{name}: {old['run'][name]} then, {record[name]} now")
    if differences:
        raise DistillationError(
            f"{folder} holds a finished model of another run:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --output-dir, or --overwrite to replace it."
        )
    return bool(old["scored"])


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
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
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


def _steps(output_dir: str) -> list[tuple[int, Path]]:
    folder = checkpoint_folder(output_dir)
    found = [
        (int(path.name.removeprefix("step-")), path)
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and (path / RUN_FILE).exists()
    ]
    return sorted(found)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What a distillation may go on from or replace: its checkpoints, its results, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xmag_hf._version import __version__
from xmag_hf.distillation.options import (
    DistillationError,
    DistillOptions,
    differing_options,
    recorded_options,
)
from xmag_hf.training.checkpoints import newest_checkpoint

RESULT_FILE = "distillation.json"


def run_record(options: DistillOptions, fingerprint: str, teacher: str, world: int) -> dict:
    """What a checkpoint must agree with before it is continued (JSON-able)."""
    return {
        "options": recorded_options(options),
        "corpus_fingerprint": fingerprint,
        "teacher_revision": teacher,
        "world": world,
        "xmag_hf": __version__,
    }


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
    found = newest_checkpoint(output_dir)
    if found is None:
        return None
    step, folder, old = found
    differences = _differences(old, record, "world")
    if differences:
        raise DistillationError(
            f"{folder} is of another run:\n  " + "\n  ".join(differences) + "\n"
            "Use the same values to go on, another --output_dir, or --no-resume to start anew."
        )
    return step, folder, old["seconds"]


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
    differences = _differences(old["run"], record)
    if differences:
        raise DistillationError(
            f"{folder} holds a finished model of another run:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --output-dir, or --overwrite to replace it."
        )
    return bool(old["scored"])


def _differences(old: dict[str, Any], new: dict[str, Any], *others: str) -> list[str]:
    differences = differing_options(old["options"], new["options"])
    for name in ("corpus_fingerprint", "teacher_revision", *others):
        if old[name] != new[name]:
            differences.append(f"{name}: {old[name]} then, {new[name]} now")
    return differences

"""What a distillation may go on from or replace: its checkpoints, its results, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xmag_hf._version import __version__
from xmag_hf.distillation.options import (
    CARD_OPTIONS,
    RESUMABLE_DIFFERENCES,
    DistillationError,
    DistillOptions,
    differing_options,
    recorded_options,
)
from xmag_hf.training.checkpoints import Checkpoint, newest_checkpoint

RESULT_FILE = "distillation.json"
# What saving a student would replace, beside config.json.
MODEL_FILES = ("README.md", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
# What a model depends on beside the options, and what to call it where the key does not say it.
SOURCES = {
    "corpus_fingerprint": "corpus_fingerprint",
    "split": "split (pairs trained on and held out)",
    "start": "start (weights of --init)",
    "teacher_revision": "teacher_revision",
}


def run_record(
    options: DistillOptions,
    *,
    fingerprint: str,
    split: str,
    start: str | None,
    teacher: str,
    teacher_precision: str,
    world: int,
    precision: str,
) -> dict[str, Any]:
    """What a checkpoint must agree with before it is continued.

    Args:
        options: Of the run.
        fingerprint: Of the corpus.
        split: `split_digest` of the pairs trained on and held out, which the fingerprint is not
            of: patients are corrected, and slides fail in one build and not in another.
        start: Digest of the student's weights, where --init names somebody's; else None.
        teacher: Revision of it.
        teacher_precision: It runs in, or its cached features were made in.
        world: Number of processes.
        precision: That auto came to.

    Returns:
        The record, as JSON takes it.
    """
    return {
        "options": recorded_options(options),
        "corpus_fingerprint": fingerprint,
        "split": split,
        "start": start,
        "teacher_revision": teacher,
        "teacher_precision": teacher_precision,
        "world": world,
        "precision": precision,
        "xmag_hf": __version__,
    }


def find_checkpoint(output_dir: str, record: dict[str, Any]) -> Checkpoint | None:
    """Find the last checkpoint of this very run.

    Args:
        output_dir: Of the run.
        record: From `run_record`, of the run that wants to go on.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        DistillationError: It was made with other options, pairs, start, teacher, precision (of
            student or teacher) or process count; each difference is listed.
    """
    found = newest_checkpoint(output_dir)
    if found is None:
        return None
    free = set(RESUMABLE_DIFFERENCES)
    if "teacher_precision" in found.record:  # what auto came to is compared, not the word
        free.add("teacher_precision")
    differences = differing_options(found.record["options"], record["options"], free)
    differences += _differences(found.record, record, "teacher_precision", "world", "precision")
    if differences:
        raise DistillationError(
            f"{found.folder} is of another run:\n  " + "\n  ".join(differences) + "\n"
            "Use the same values to go on, another --output_dir, or --no-resume to start anew."
        )
    return found


def refuse_foreign(output_dir: str) -> None:
    """Refuse, before any work, a folder whose model or card is none of ours.

    Raises:
        DistillationError: Saving would be refused at the end.
    """
    folder = Path(output_dir).resolve()
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except FileNotFoundError:
        taken = [name for name in MODEL_FILES if (folder / name).exists()]
        interrupted = folder.parent / f".{folder.name}.partial" / "config.json"  # a save of ours
        if taken and not interrupted.exists():
            raise DistillationError(
                f"{output_dir} holds {', '.join(taken)} but no model of ours, and nothing of it "
                "is replaced. Choose another --output-dir, or move these files away."
            ) from None
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

    Its card may have to be corrected still (`CARD_OPTIONS`).

    Raises:
        DistillationError: It holds a finished model of another run or tool, scores of another
            --alignment-pairs, or a card to be corrected that an older version made.
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
    before, now = old["run"]["options"], record["options"]
    free = set(RESUMABLE_DIFFERENCES)
    if old["scored"] and now["holdout"]:
        free.remove("alignment_pairs")
    differences = differing_options(before, now, free) + _differences(old["run"], record)
    if differences:
        raise DistillationError(
            f"{folder} holds a finished model of another run:\n  "
            + "\n  ".join(differences)
            + "\nChoose another --output-dir, or --overwrite to replace it."
        )
    corrections = [f"{name}: {before.get(name)} then, {now[name]} now" for name in CARD_OPTIONS
                   if before.get(name) != now[name]]  # fmt: skip
    if old["scored"] and corrections and "card" not in old:
        raise DistillationError(
            f"{folder} holds this model, with a card that says otherwise:\n  "
            + "\n  ".join(corrections)
            + "\nIts record is of an older version, from which no card can be made. Correct "
            "README.md and `licence` in config.json there by hand and say the old values, or "
            "--overwrite."
        )
    return bool(old["scored"])


def _differences(old: dict[str, Any], new: dict[str, Any], *others: str) -> list[str]:
    """Lines on what differs beside the options; an older record does not hold all of it."""
    names = SOURCES | {name: name for name in others}
    return [
        f"{shown}: {old[name]} then, {new[name]} now"
        for name, shown in names.items()
        if name in old and old[name] != new[name]
    ]

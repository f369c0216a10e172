"""Rows of one table differ in their own options only: checked before anything is compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xmag_hf.distillation.checkpoints import RESULT_FILE, SOURCES
from xmag_hf.distillation.options import RESUMABLE_DIFFERENCES

# What a row's own option makes its own, too: the margin around held-out bands, and the start.
FOLLOWS = {"mpp_jitter": "split", "init": "start"}
# No weight depends on these, and no score: the trainer's own list but for the pairs that it scores.
FREE = RESUMABLE_DIFFERENCES - {"alignment_pairs"}


def refuse_mixed(students: Mapping[Path, Sequence[str]]) -> None:
    """Refuse students that differ in more than what their rows are about.

    Args:
        students: Folder of each finished one, and its row's own options of train_distill.py.

    Raises:
        SystemExit: Names the folders, the option and both values.
    """
    first: dict[str, tuple[Path, Any]] = {}
    for folder, options in students.items():
        run = json.loads((folder / RESULT_FILE).read_text())["run"]
        own = {name[2:].replace("-", "_") for name in options if name.startswith("--")}
        facts = {key: value for key, value in run["options"].items() if key not in own | FREE}
        # Older versions recorded less; what one side lacks is no difference.
        implied = {FOLLOWS.get(name) for name in own}
        facts |= {key: run[key] for key in SOURCES if key in run and key not in implied}
        for key, value in facts.items():
            other, seen = first.setdefault(key, (folder, value))
            if seen != value:
                raise SystemExit(
                    f"{folder}: {key} {value!r}, but {seen!r} in {other}. Rows of one table differ "
                    "in their own option only: choose another --out, or move it away."
                )

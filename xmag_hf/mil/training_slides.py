"""Which slides a head knows from its training, as its study's files beside it say."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from .labels import read_lines
from .options import RESULTS

logger = logging.getLogger(__name__)


def training_slides(head: str | Path) -> frozenset[str]:
    """Slides that a head has learned from or was stopped by, as far as its study beside it says.

    Args:
        head: Folder; `STUDY/head` or `STUDY/heads/fold-K`, elsewhere nothing is known.

    Returns:
        Their slide_ids; all of the study's but those of the head's own fold.
    """
    folder = Path(head).absolute()
    study = folder.parent.parent if folder.parent.name == "heads" else folder.parent
    try:
        if folder.parent.name == "heads":
            fold = folder.name.rpartition("-")[2]
        else:
            record = json.loads((study / RESULTS).read_text(encoding="utf-8"))
            fold = str(record["published_fold"])
        lines = read_lines(study / "folds.csv", ("slide_id", "fold"))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(line["slide_id"] for _, line in lines if line["fold"] != fold)


def warn_of_training_slides(head: str | Path, slide_ids: Sequence[str]) -> None:
    """Say which slides a head knows from its training, where that can be known."""
    known = training_slides(head)
    seen = [name for name in slide_ids if name in known]
    if seen:
        logger.warning(
            "%d of %d slides belong to the training of this head (%s): its answers there are too "
            "good to judge it by. Those of heads that had not seen a slide are in its study's "
            "predictions.csv.",
            len(seen), len(slide_ids), ", ".join(seen[:3]) + ", ..." * (len(seen) > 3),
        )  # fmt: skip

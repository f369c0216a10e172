"""Which slides a head knows from its training, as its study's files beside it say."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from .labels import read_lines
from .options import RESULTS
from .predictions import FILE as PREDICTIONS

logger = logging.getLogger(__name__)


def training_slides(head: str | Path) -> frozenset[str]:
    """Slides that a head has learned from or was stopped by, as far as its study's files say.

    Slides that the heads learned from which an end-to-end study went on from are not among them,
    unless they are in that study too.

    Args:
        head: Folder; `STUDY/head` or `STUDY/heads/fold-K`, elsewhere nothing is known.

    Returns:
        Their slide_ids; all of the study's but those of the head's own fold.
    """
    study, fold = _study(Path(head).resolve())
    try:
        if fold is None:
            record = json.loads((study / RESULTS).read_text(encoding="utf-8"))
            fold = str(record["published_fold"])
        lines = read_lines(study / "folds.csv", ("slide_id", "fold"))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(line["slide_id"] for _, line in lines if line["fold"] != fold)


def _study(head: Path) -> tuple[Path, str | None]:
    """Where a head's study would lie, and its fold if its name says it."""
    if head.parent.name == "heads":
        return head.parent.parent, head.name.removeprefix("fold-")
    return (head.parent if head.name == "head" else head), None


def warn_of_training_slides(head: str | Path, slide_ids: Sequence[str]) -> None:
    """Say which slides a head knows from its training, where that can be known."""
    known = training_slides(head)
    seen = [name for name in slide_ids if name in known]
    if seen:
        unseen = _study(Path(head).resolve())[0] / PREDICTIONS
        logger.warning(
            "%d of %d slides belong to the training of this head (%s): its answers there are too "
            "good to judge it by.%s",
            len(seen), len(slide_ids), ", ".join(seen[:3]) + ", ..." * (len(seen) > 3),
            f" Those of heads that had not seen a slide: {unseen}" if unseen.is_file() else "",
        )  # fmt: skip

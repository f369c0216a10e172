"""Which slides a head knows from its training, as its study's files beside it say."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import MILError
from .labels import Cohort, read_lines
from .options import RESULTS, VALIDATES
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
    fold, lines = _told(head)
    return frozenset(line["slide_id"] for line in lines if line["fold"] != fold)


def validation_slides(head: str | Path) -> frozenset[str]:
    """Slides that a head was stopped by and has not learned from, as far as its study's files say.

    Args:
        head: As in `training_slides`.

    Returns:
        Their slide_ids; none where folds.csv has no column `validates`.
    """
    fold, lines = _told(head)
    return frozenset(line["slide_id"] for line in lines if fold in line.get(VALIDATES, "").split())


def stopping_rows(cohort: Cohort, outside: np.ndarray, head: Path) -> np.ndarray | None:
    """The slides that stopped a head's training: the only ones of its study it has not learnt from.

    Args:
        cohort: The slides.
        outside: (n,) bool, slides outside the test fold.
        head: Its folder.

    Returns:
        (n,) bool, part of `outside`, whole patients; None if it is not known to have learnt from
        any slide here.

    Raises:
        MILError: It has learnt from slides here, and none that stopped it is here or known; or
            these are all slides of a class.
    """
    stopped = outside & np.isin(cohort.slide_ids, list(validation_slides(head)))
    rows = outside & np.isin(cohort.patient_ids, cohort.patient_ids[stopped])
    if not rows.any():
        learnt = int((outside & np.isin(cohort.slide_ids, list(training_slides(head)))).sum())
        if learnt:
            raise MILError(
                f"--head {head}: has learnt from {learnt} of the slides here, and folds.csv of its "
                "study names none of them as validating it, so it would be stopped by slides that "
                "it knows. Give those that validated it, too, make the study again if it is of an "
                "earlier `xmag mil`, or start from scratch (--head abmil)."
            )
        return None
    lost = sorted(set(cohort.labels[outside]) - set(cohort.labels[outside & ~rows]))
    if lost:
        raise MILError(
            f"--head {head}: class {cohort.classes[lost[0]]!r}: all its slides here outside the "
            "test fold validated this head, and none is left to train on. Give more of its study."
        )
    return rows


def _told(head: str | Path) -> tuple[str, list[dict[str, str]]]:
    """A head's fold, and the lines of its study's folds.csv; none where it is in no study."""
    study, fold = _study(Path(head).resolve())
    try:
        if fold is None:
            record = json.loads((study / RESULTS).read_text(encoding="utf-8"))
            fold = str(record["published_fold"])
        return fold, [line for _, line in read_lines(study / "folds.csv", ("slide_id", "fold"))]
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


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

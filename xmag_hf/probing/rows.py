"""The rows of a report: which encoders, each at which scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from xmag_hf.encoders import EncoderCard, check_encoder, load_encoder, student_size

from .errors import ProbeError
from .options import STUDENT_MPP, TEACHER_MPP, ProbeOptions

TEACHER, TEACHER_5X = "teacher", "teacher at 5x"


@dataclass(frozen=True)
class Row:
    """A row of the report: an encoder at a scale.

    Attributes:
        label: Unique; names files and lines.
        role: `model`, or which control it is.
        name: As `load_encoder` takes it.
        mpp: um/px at which it sees the tissue.
    """

    label: str
    role: str
    name: str
    mpp: float


def plan_rows(options: ProbeOptions) -> list[Row]:
    """The rows of the report, each encoder known to be had and its scale known.

    Order: --model as given, --teacher at 20x, --teacher at 5x, --undistilled.

    Args:
        options: Names and scales.

    Returns:
        At least one row; labels are unique.

    Raises:
        ProbeError: No row, an encoder without a scale of its own and no --mpp, or --undistilled
            without an XMAG to take the architecture from.
        EncoderError: An encoder that cannot be had.
    """
    wanted: list[tuple[str, str, float | None]] = []
    for name in options.model:
        bare, mpp = split_scale(name)
        wanted.append(("model", bare, mpp if mpp is not None else options.mpp))
    if options.teacher is not None:
        wanted.append((TEACHER, options.teacher, TEACHER_MPP))
        if options.teacher_at_5x:
            wanted.append((TEACHER_5X, options.teacher, STUDENT_MPP))
    if not wanted:
        raise ProbeError("nothing to probe: give --model or --teacher.")
    cards = {name: check_encoder(name) for _, name, _ in wanted}
    if options.undistilled is not None:
        size = _student_size([split_scale(name)[0] for name in options.model], cards)
        name = f"{options.undistilled}:{size}"
        if options.undistilled == "random" and options.seed:
            name += f":{options.seed}"
        cards[name] = check_encoder(name)
        wanted.append((f"undistilled ({options.undistilled})", name, STUDENT_MPP))
    rows = []
    for role, name, mpp in wanted:
        mpp = _own_scale(name, cards[name]) if mpp is None else mpp
        if options.dense and mpp not in (TEACHER_MPP, STUDENT_MPP):
            raise ProbeError(
                f"--dense: {name} at {mpp:g} um/px; cells are compared at {STUDENT_MPP} (spatial "
                f"features) and {TEACHER_MPP} (a patch each). Say {name}@{STUDENT_MPP:g}."
            )
        rows.append(Row(f"{_short(name)}@{mpp:g}", role, name, mpp))
    return _unique(rows)


def split_scale(name: str) -> tuple[str, float | None]:
    """NAME@MPP -> its parts; a name without a number after an @ is left whole."""
    bare, _, scale = name.rpartition("@")
    try:
        mpp = float(scale) if bare else None
    except ValueError:
        return name, None
    if mpp is not None and not mpp > 0:
        raise ProbeError(f"--model {name}: um/px must be above 0.")
    return (bare, mpp) if bare else (name, None)


def _own_scale(name: str, card: EncoderCard) -> float:
    if card.mpp is None:
        raise ProbeError(
            f"{name}: was made for natural images and has no um/px of its own. Say --mpp F (0.5 "
            f"for 20x, 2.0 for 5x), or {name}@0.5; as --teacher it runs at 0.5."
        )
    return float(card.mpp)


def _student_size(names: list[str], cards: dict[str, EncoderCard]) -> str:
    """Size of the first XMAG among `names`."""
    for name in names:
        # Only students are pooled by their own pooler, so nothing else is loaded to find out.
        size = student_size(load_encoder(name)) if cards[name].pooling == "pooler" else None
        if size is not None:
            return size
    raise ProbeError(
        "--undistilled takes the architecture of the first XMAG among --model, and there is none "
        "of size base, small, tiny or lite. Say --model random:SIZE or start:SIZE instead."
    )


def _short(name: str) -> str:
    """Last part of a path or repository."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _unique(rows: list[Row]) -> list[Row]:
    seen: dict[str, int] = {}
    unique = []
    for row in rows:
        seen[row.label] = count = seen.get(row.label, 0) + 1
        label = row.label if count == 1 else f"{row.label}#{count}"
        unique.append(dataclasses.replace(row, label=label))
    return unique


def pairs(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(row, reference) of the paired tests: all against the first, and the teacher's two scales.

    The second says what the coarser scale costs the teacher, whatever the first row is.
    """
    against_first = [(number, 0) for number in range(1, len(rows))]
    roles = [row.role for row in rows]
    if {TEACHER, TEACHER_5X} <= set(roles):
        scales = roles.index(TEACHER_5X), roles.index(TEACHER)
        if scales not in against_first:
            against_first.append(scales)
    return against_first

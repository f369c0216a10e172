"""Options and constants of the paired corpus: the one home of its defaults."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xmag_hf.slides.tissue import METHOD as TISSUE_METHOD

FORMAT_VERSION = 1
REGION_PX = 896  # side of a region at TEACHER_MPP: four 224 px patches
STUDENT_PX = 224  # side of the same region at 5x
TEACHER_MPP = 0.5  # um/px of the 20x view
REDUCTION = REGION_PX // STUDENT_PX
STUDENT_MPP = TEACHER_MPP * REDUCTION
REGION_UM = REGION_PX * TEACHER_MPP
CODECS = ("jpeg95", "png")
MOST_MARGIN = 0.5  # a view at 1.0 to 3.0 um/px; beyond, it is another magnification
# Options younger than format 1: at their defaults they change no row, hence no fingerprint.
YOUNGER = ("reading_paths", "margin")


class CorpusError(ValueError):
    """A corpus cannot be built or continued as asked."""


@dataclass(frozen=True)
class CorpusOptions:
    """What decides the rows of a corpus. A change makes another corpus.

    Raises:
        CorpusError: A value outside its range, named.
    """

    stride: int = field(
        default=REGION_PX,
        metadata={
            "help": "distance between regions, px at 0.5 um/px; 896 tiles the tissue once, a "
            "multiple of 224 lets neighbours share teacher features",
            "metavar": "PX",
        },
    )
    tissue: float = field(
        default=0.25,
        metadata={"help": "least share of a region that is tissue, 0 to 1", "metavar": "F"},
    )
    mpp: float | None = field(
        default=None,
        metadata={
            "help": "um/px of the slides' level 0; overrules the files, not the slide CSV",
            "metavar": "F",
        },
    )
    codec: str = field(
        default="jpeg95",
        metadata={"help": "of the 20x images: JPEG quality 95 4:4:4, or PNG", "choices": CODECS},
    )
    allow_coarse: bool = field(
        default=False,
        metadata={"help": "take slides coarser than 0.55 um/px (the teacher sees invented detail)"},
    )
    reading_paths: bool = field(
        default=False,
        metadata={
            "help": "store the 5x view as other readers bring it there, too: image_5x_scanner "
            "(from the scanner's own coarser level) and image_5x_fast (reduced decoding), for "
            "--reading-paths of training"
        },
    )
    margin: float = field(
        default=0.0,
        metadata={
            "help": "above 0: store image_5x_wide, the region and this share more around it, for "
            "--mpp-jitter of training up to this share; 0.2 is 1.6 to 2.4 um/px",
            "metavar": "F",
        },
    )
    max_shard_mb: int = field(
        default=500, metadata={"help": "largest Parquet file, 10^6 bytes", "metavar": "MB"}
    )

    def __post_init__(self) -> None:
        checks = (
            ("stride", self.stride >= 1, "at least 1 px"),
            ("tissue", 0 <= self.tissue <= 1, "from 0 to 1"),
            ("mpp", self.mpp is None or self.mpp > 0, "above 0 um/px"),
            ("codec", self.codec in CODECS, f"one of {', '.join(CODECS)}"),
            ("margin", 0 <= self.margin <= MOST_MARGIN, f"from 0 to {MOST_MARGIN:g}"),
            ("max_shard_mb", self.max_shard_mb >= 1, "at least 1"),
        )
        for name, good, rule in checks:
            if not good:
                raise CorpusError(f"{name}={getattr(self, name)!r}: it must be {rule}.")


def corpus_fingerprint(
    options: CorpusOptions, slides: Sequence[tuple[str, float | None, str | None]]
) -> str:
    """Identity of a corpus, for caches built from it.

    Args:
        options: Of the corpus.
        slides: (slide_id, um/px given by the CSV, slide_sha256_head) in the corpus's order.

    Returns:
        sha256, hex, over options, format version, tissue rule and slides. Neither paths nor the
        number of processes enter.
    """
    values = dataclasses.asdict(options)
    for option in dataclasses.fields(options):
        if option.name in YOUNGER and values[option.name] == option.default:
            del values[option.name]
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "options": values,
        "tissue_method": TISSUE_METHOD,
        "slides": [list(slide) for slide in slides],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

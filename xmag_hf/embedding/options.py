"""Options and errors of embedding: the one home of its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

POOLINGS = ("auto", "cls", "mean", "cls+mean")
FEATURE_TYPES = ("float16", "float32")
READERS = ("auto", "openslide", "tiles")


class EmbedError(ValueError):
    """Slides cannot be embedded as asked; the message names the subject, value and remedy."""


@dataclass(frozen=True)
class EmbedOptions:
    """How slides become bags.

    Devices, batches, threads and the reader do not change a bag; the rest does.

    Raises:
        EmbedError: A value outside its range, named.
    """

    mpp: float | None = field(
        default=None,
        metadata={"help": "um/px of the patches; none is the encoder's own", "metavar": "F"},
    )
    patch_px: int | None = field(
        default=None,
        metadata={
            "help": "side of a patch, px at --mpp; none is what the field cuts for the encoder; "
            "another size than the encoder's input is resampled to it",
            "metavar": "PX",
        },
    )
    overlap: int = field(
        default=0, metadata={"help": "px at --mpp that neighbours share", "metavar": "PX"}
    )
    tissue: float = field(
        default=0.25, metadata={"help": "least share of a patch that is tissue", "metavar": "F"}
    )
    pad_edges: bool = field(
        default=False, metadata={"help": "keep patches that reach past the edge, white there"}
    )
    allow_coarse: bool = field(
        default=False, metadata={"help": "enlarge slides coarser than asked for by more than 10%"}
    )
    slide_mpp: float | None = field(
        default=None,
        metadata={
            "help": "um/px of the slides' level 0; overrules the files, not the slide CSV. Plain "
            "PNG and JPEG need it",
            "metavar": "F",
        },
    )
    pooling: str = field(
        default="auto",
        metadata={
            "help": "class token, mean of the patch tokens, or both; auto is the encoder's own",
            "choices": POOLINGS,
        },
    )
    tokens: bool = field(
        default=False, metadata={"help": "store the 4 x 4 local features of each patch too"}
    )
    precision: str = field(
        default="fp32",
        metadata={"help": "the encoder runs in", "choices": ("fp32", "bf16", "fp16")},
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "run the encoder through torch.compile: a minute or more at the start, for "
            "long runs on a GPU (not timed on one yet); needs a C++ compiler"
        },
    )
    features: str = field(
        default="float16", metadata={"help": "stored type", "choices": FEATURE_TYPES}
    )
    device: str = field(
        default="auto",
        metadata={
            "help": "cpu, cuda, cuda:1, ...; auto takes a GPU if there is. `xmag embed` also takes "
            "several with commas (cuda:0,cuda:1 or cpu,cpu), a process each, to which slides are "
            "shared out, and on auto every GPU"
        },
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "patches encoded at once; none is 256 on a GPU, 32 on a CPU; halved when "
            "memory runs out"
        },
    )
    threads: int = field(default=4, metadata={"help": "that read and decode patches"})
    reader: str = field(
        default="auto",
        metadata={
            "help": "OpenSlide, or the JPEG tiles of TIFF and SVS files, each decoded once; auto "
            "takes the tiles where there are some and they show the same pixels",
            "choices": READERS,
        },
    )
    preview: bool = field(
        default=True, metadata={"help": "a picture of each slide: tissue outline and grid"}
    )

    def __post_init__(self) -> None:
        checks = (
            ("mpp", _scale(self.mpp), "above 0 um/px"),
            ("patch_px", self.patch_px is None or self.patch_px >= 1, "at least 1 px"),
            ("overlap", self.overlap >= 0, "at least 0 px"),
            ("tissue", 0 <= self.tissue <= 1, "from 0 to 1"),
            ("slide_mpp", _scale(self.slide_mpp), "above 0 um/px"),
            ("pooling", self.pooling in POOLINGS, f"one of {', '.join(POOLINGS)}"),
            ("features", self.features in FEATURE_TYPES, f"one of {', '.join(FEATURE_TYPES)}"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1"),
            ("threads", self.threads >= 1, "at least 1"),
            ("reader", self.reader in READERS, f"one of {', '.join(READERS)}"),
        )
        for name, good, rule in checks:
            if not good:
                raise EmbedError(f"{name}={getattr(self, name)!r}: it must be {rule}.")


def _scale(mpp: float | None) -> bool:
    return mpp is None or (math.isfinite(mpp) and mpp > 0)

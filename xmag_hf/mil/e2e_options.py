"""Options of end-to-end training: the one home of their defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MILError
from .options import HEADS_HELP, HeadOptions

PRECISIONS = ("auto", "no", "bf16", "fp16")
# Options of reading slides that change which pixels there are, and all that e2e takes.
PIXEL_OPTIONS = ("overlap", "tissue", "pad_edges", "allow_coarse")
READING_OPTIONS = (*PIXEL_OPTIONS, "slide_mpp", "reader", "threads")
KEPT_TYPES = ("float16", "float32")


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class E2EOptions:
    """How an encoder and a head are trained together on whole slides.

    The paper (arXiv 2509.23097) freezes ten of twelve blocks and states neither rates nor epochs;
    those are ours. The encoder's rate is a tenth of the head's, since it starts trained.

    Raises:
        MILError: A value outside its range, named.
    """

    encoder: str = dataclasses.field(
        metadata={"help": "XMAG or XMAG-lite to start from: a folder, or hf:ORG/NAME"}
    )
    labels: str = dataclasses.field(
        metadata={"help": "CSV with slide_id, patient_id and label", "metavar": "CSV"}
    )
    out: str = dataclasses.field(metadata={"help": "folder of the study", "metavar": "DIR"})
    label_column: str = _option("label", "of the CSV", metavar="NAME")
    against_rest: str | None = _option(
        None, "this class against all others as one", metavar="CLASS"
    )
    head: str = _option(
        "abmil",
        f"from scratch ({HEADS_HELP}), or trained heads to go on from: a study of `xmag mil` "
        "on bags of this encoder (head k for fold k; its folds and validation slides kept), or "
        "one head's folder with --folds 1",
    )
    dropout: float = _option(HeadOptions.dropout, "in training, of a head from scratch")
    frozen_stages: int | None = _option(
        None,
        "blocks (ViT) or stages (lite, of 7) that are not trained, from the input on; none: all "
        "but the last two",
    )
    chunk_size: int = _option(32, "patches in the encoder at once; bounds memory, changes no value")
    augment: bool = _option(
        False,
        "flips and quarter turns, drawn for each patch and epoch; the frozen part then runs every "
        "epoch, else once a slide",
    )
    kept_type: str = _option(
        "float16",
        "type in which the frozen part's output is kept on disk: half the space, or exact",
        choices=KEPT_TYPES,
    )
    cache_dir: str | None = _option(
        None, "where that lies, or with --augment the pixels; none: OUT/cache", metavar="DIR"
    )
    folds: int = _option(
        5, "of the cross-validation, by patient; 1: one training, nothing but its validation part "
        "held out",
    )  # fmt: skip
    folds_csv: str | None = _option(
        None, "folds of an earlier study (its folds.csv), to be used again", metavar="CSV"
    )
    only: tuple[int, ...] = _option((), "train these folds only, 0 and up", metavar="K")
    validation_share: float = _option(
        0.2,
        "of the training patients, kept apart for early stopping; one of round(1 / share) parts, "
        "so 0.4 is a half; with a trained head the slides that stopped it",
    )
    epochs: int = _option(10, "passes over the training slides at most; the cosine's length")
    patience: int = _option(3, "epochs without a lower validation loss before training ends")
    accumulation: int = _option(8, "slides an optimiser step, on each process")
    learning_rate: float = _option(1e-4, "of the head, peak of the cosine")
    encoder_learning_rate: float = _option(1e-5, "of the encoder's trained stages")
    warmup_ratio: float = _option(0.05, "share of the steps in linear warm-up, below 1")
    weight_decay: float = _option(0.05, "AdamW's; not on biases, norms and layer scales")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    class_weights: bool = _option(
        True, "weigh classes by the inverse of their share of the training slides"
    )
    mixed_precision: str = _option(
        "auto", "auto: bf16 on a GPU that has it, else no", choices=PRECISIONS
    )
    seed: int = _option(0, "of folds, heads, order, dropout and augmentation")
    samples: int = _option(1000, "bootstrap samples of the intervals")
    level: float = _option(0.95, "of the intervals")
    checkpoint_steps: int = _option(50, "a checkpoint every N steps, after every epoch, on SIGTERM")

    def __post_init__(self) -> None:
        """Refuse impossible values where they are said."""
        positive = "chunk_size folds epochs patience accumulation learning_rate max_grad_norm"
        checks = [
            *((name, getattr(self, name) > 0, "above 0") for name in positive.split()),
            ("checkpoint_steps", self.checkpoint_steps > 0, "above 0"),
            ("encoder_learning_rate", self.encoder_learning_rate >= 0, "at least 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "from 0 to below 1"),
            ("validation_share", 0 < self.validation_share <= 0.5, "above 0, at most 0.5"),
            ("mixed_precision", self.mixed_precision in PRECISIONS, f"one of {PRECISIONS}"),
            ("kept_type", self.kept_type in KEPT_TYPES, f"one of {KEPT_TYPES}"),
            ("only", all(0 <= k < self.folds for k in self.only), f"from 0 to {self.folds - 1}"),
        ]
        for name, good, rule in checks:
            if not good:
                option = name.replace("_", "-")
                raise MILError(f"--{option}={getattr(self, name)!r}: it must be {rule}.")


# What may change between a run and its resumption without changing a loss: places, memory, and
# what is told of the results.
FREE = frozenset(
    ["labels", "out", "folds_csv", "cache_dir", "chunk_size", "only", "samples", "level"]
)
FREE |= {"checkpoint_steps"}


def recorded(options: E2EOptions) -> dict[str, Any]:
    """Options as JSON for checkpoints and results; one's own folders are not told."""
    values: dict[str, Any] = dataclasses.asdict(options) | {"only": list(options.only)}
    for name in ("encoder", "head", "labels", "folds_csv"):
        if values[name] and Path(values[name]).exists():
            values[name] = Path(values[name]).name
    return {name: value for name, value in values.items() if name not in ("out", "cache_dir")}

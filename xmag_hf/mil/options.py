"""Options of heads and studies: the one home of their defaults."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .errors import MILError
from .presets import PRESETS

HEADS = ("abmil", "mean-pool")
HEADS_HELP = (
    "abmil: gated attention, which learns how much each patch counts, as `xmag heatmap` shows; "
    "mean-pool: every patch counts the same, the baseline"
)
RESULTS = "results.json"  # of a study
VALIDATES = "validates"  # column of a study's folds.csv: folds whose head a slide has stopped
INTERNAL = "internal"  # the cohort that is cross-validated
DEFAULT_FOLDS = 5
EXTERNAL = "external"  # the other, where it is called nothing else


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class HeadOptions:
    """How one head is built and trained. AdamW, cosine to 0, bf16 autocast on a GPU.

    Raises:
        MILError: A value outside its range, named.
    """

    hidden_dim: int = _option(512, "width of the slide embedding")
    attention_dim: int = _option(256, "width of the gated attention; the mean pool has none")
    dropout: float = _option(0.25, "in training")
    epochs: int = _option(20, "passes over the training slides at most; the cosine's length")
    patience: int = _option(
        5, "epochs without a lower validation loss before training ends; 0: never early"
    )
    batch_size: int = _option(4, "slides a step; slides of like length are batched together")
    learning_rate: float = _option(3e-4, "of AdamW, at the start")
    weight_decay: float = _option(1e-4, "of AdamW")
    class_weights: bool = _option(
        True, "weigh classes by the inverse of their share of the training slides"
    )
    seed: int = _option(0, "of folds, validation splits, weights, order, dropout and intervals")

    def __post_init__(self) -> None:
        """Refuse impossible values where they are said."""
        for name in ("hidden_dim", "attention_dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise MILError(f"--{_hyphens(name)}={getattr(self, name)}: at least 1.")
        for name in ("patience", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MILError(f"--{_hyphens(name)}={getattr(self, name)}: at least 0.")
        if not 0 < self.learning_rate < math.inf:
            raise MILError(f"--learning-rate={self.learning_rate}: above 0.")
        if not 0 <= self.dropout < 1:
            raise MILError(f"--dropout={self.dropout}: from 0 to below 1.")


@dataclass(frozen=True)
class StudyOptions:
    """What a study compares, on which slides, and where it goes.

    Raises:
        MILError: A value outside its range, or options that contradict each other.
    """

    out: str = dataclasses.field(metadata={"help": "folder of the study", "metavar": "DIR"})
    labels: str | None = _option(
        None, "CSV with slide_id, patient_id and label; needed unless --preset", metavar="CSV"
    )
    preset: str | None = _option(
        None,
        "one of the paper's tasks: label CSVs are made from --preset-files, and the paper's values "
        "stand beside ours",
        choices=tuple(PRESETS),
    )
    preset_files: tuple[str, ...] = _option(
        (),
        "what the sources hand out: GDC sample sheet, TCIA's slide tables, PANDA's train.csv, ... "
        "(docs/reproduction.md)",
        metavar="FILE",
    )
    label_column: str = _option("label", "of the CSVs", metavar="NAME")
    against_rest: str | None = _option(
        None, "this class against all others as one", metavar="CLASS"
    )
    head: tuple[str, ...] = _option(
        ("abmil",),
        f"{HEADS_HELP}; several are compared on the same folds",
        metavar="NAME",
    )
    folds: int | None = _option(
        None,
        "of the cross-validation, by patient; none: "
        f"{DEFAULT_FOLDS}, or as many as --folds-csv has",
    )
    folds_csv: str | None = _option(
        None, "folds of an earlier study (its folds.csv), to be used again", metavar="CSV"
    )
    validation_share: float = _option(
        0.2,
        "of the training patients, kept apart for early stopping; one of round(1 / share) parts, "
        "so 0.4 is a half",
    )
    external_labels: str | None = _option(
        None, "labels of another cohort, on which every fold's head is tested", metavar="CSV"
    )
    external_bags: tuple[str, ...] = _option(
        (), "its bags: a folder for each of BAGS, in their order", metavar="DIR"
    )
    external_name: str = _option(
        EXTERNAL, "what tables call it; a preset has a name for its own", metavar="NAME"
    )
    samples: int = _option(1000, "bootstrap samples of the intervals")
    level: float = _option(0.95, "of the intervals")
    device: str = _option("auto", "cpu, cuda, cuda:1, ...; auto takes all GPUs there are")
    jobs: int | None = _option(
        None, "folds trained at once; none: one for each core, or for each GPU"
    )

    def __post_init__(self) -> None:
        """Refuse contradictions before any work."""
        unknown = [name for name in self.head if name not in HEADS]
        if unknown or not self.head or len(set(self.head)) < len(self.head):
            raise MILError(
                f"--head {' '.join(self.head)}: each of {', '.join(HEADS)} at most once."
            )
        if self.folds is not None and self.folds < 2:
            raise MILError(f"--folds={self.folds}: cross-validation needs at least 2.")
        if not 0 < self.validation_share <= 0.5:
            raise MILError(f"--validation-share={self.validation_share}: above 0, at most 0.5.")
        if self.samples < 2:
            raise MILError(f"--samples={self.samples}: at least 2.")
        if not 0 < self.level < 1:
            raise MILError(f"--level={self.level}: between 0 and 1.")
        if self.jobs is not None and self.jobs < 1:
            raise MILError(f"--jobs={self.jobs}: at least 1.")
        if not (self.preset or self.labels) or bool(self.preset) != bool(self.preset_files):
            raise MILError("give --labels, or --preset with --preset-files.")
        if self.preset and self.against_rest is not None:
            raise MILError(
                f"--against-rest {self.against_rest}: --preset {self.preset} keeps its classes, as "
                "the paper does. Give --labels instead of --preset."
            )
        if not self.preset and bool(self.external_labels) != bool(self.external_bags):
            raise MILError("--external-labels and --external-bags: give both, or neither.")
        name = self.external_name
        if not name or name == INTERNAL:
            raise MILError(f"--external-name {name!r}: choose another.")
        if name[0] == "." or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
            raise MILError(
                f"--external-name {name!r}: files are named after it. Letters, digits, - and _."
            )


def _hyphens(name: str) -> str:
    return name.replace("_", "-")

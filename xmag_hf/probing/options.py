"""Every option of a probe, its default and its meaning: the one home of both."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .errors import ProbeError

METHODS = ("linear", "knn", "few-shot")
TEACHER_MPP = 0.5
STUDENT_MPP = 2.0


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class ProbeOptions:
    """Options of one run of `xmag probe`, and of the same data in `xmag project`.

    Defaults of the cross-validation (5 folds, 5 repeats, C 1e-3, alphas in `counts.py`) are those
    of the numbers that this yardstick was checked against.
    """

    data: str = dataclasses.field(
        metadata={
            "help": "labelled images: a Hub data set (ORG/NAME), a folder that `datasets` reads "
            "(Parquet, one folder per class), or a folder of images with --labels-csv or "
            "--nuclei-csv"
        }
    )
    model: tuple[str, ...] = _option(
        (),
        "encoders, a row of the report each: an XMAG folder, a name of xmag_hf.encoders, "
        "timm:NAME, hf:ID, random:SIZE or start:SIZE; NAME@MPP sets that row's um/px",
        metavar="MODEL",
    )
    mpp: float | None = _option(
        None, "um/px at which every --model sees the tissue; none: each encoder's own"
    )
    teacher: str | None = _option(None, "control: a row of this encoder at 0.5 um/px (20x)")
    teacher_at_5x: bool = _option(False, "control: a row of --teacher at 2.0 um/px (5x)")
    undistilled: str | None = _option(
        None,
        "control: a row of the first XMAG's architecture at 2.0 um/px with random weights, or "
        "with those that its training starts from",
        choices=("random", "start"),
    )
    paper_table: str | None = _option(
        None,
        "print the paper's published values of this data set beside ours",
        choices=("spider-breast", "spider-crc"),
    )

    data_config: str | None = _option(None, "configuration of a Hub data set")
    data_revision: str | None = _option(None, "branch, tag or commit of a Hub data set")
    labels_csv: str | None = _option(
        None,
        "images of the folder --data, one a line: file (or file_name, image), label, split (train, "
        "validation, test; none: all are one), and any columns that the options below name",
    )
    data_mpp: float | None = _option(None, "um/px of the images; none: their column mpp")
    max_enlarge: float = _option(
        1.25,
        "refuse images whose um/px is coarser than what a row wants by more than this factor; "
        "cameras on 20x microscopes give up to 0.62 um/px, which counts as 20x (0.5)",
    )
    image_column: str | None = _option(
        None,
        "none: the only image column; of image_20x and image_5x the one that fits a row's um/px",
    )
    label_column: str | None = _option(None, "none: label")
    group_column: str | None = _option(
        None,
        "images of one group (patient, slide) are never on both sides of a split, and are "
        "resampled together; none: patient_id, else slide_id, where there is one; '-': no groups",
    )
    id_column: str | None = _option(
        None,
        "none: the file's stem, else split and row; where pooled splits share an id, all are "
        "SPLIT/ID",
    )
    allow_shared_groups: bool = _option(
        False,
        "accept an official split with one group (slide, patient) on both sides; its scores are "
        "too good, which the report says. Intervals still draw whole groups",
    )

    cross_validate: bool = _option(
        False, "pool all splits and cross-validate, though there is a test split"
    )
    methods: tuple[str, ...] = _option(METHODS, "classifiers on frozen embeddings", metavar="NAME")
    folds: int = _option(5, "of the cross-validation")
    repeats: int = _option(5, "of the cross-validation, with seeds 0, 1, ...")
    c: float = _option(1e-3, "cross-validation: inverse regularisation of the linear probe")
    c_grid: tuple[float, ...] = _option(
        (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        "official split: C is chosen among these on the validation split",
        metavar="F",
    )
    validation_share: float = _option(
        0.2, "official split without validation: this share of the training groups"
    )
    neighbours: int = _option(20, "of kNN, by cosine")
    shots: tuple[int, ...] = _option((1, 2, 4, 8, 16), "few-shot: images per class", metavar="N")
    shot_repeats: int = _option(20, "few-shot: draws for each number of images")

    nuclei_csv: str | None = _option(
        None,
        "predict counts of nuclei instead of a label: image (or field), x, y in px of the image, "
        "type",
    )
    nuclei_types: tuple[str, ...] = _option(
        (), "types to count, in this order; none: all of the file", metavar="TYPE"
    )
    dense: bool = _option(
        False,
        "also predict the counts under each cell of the 4 x 4 grid of a 5x patch; of image_20x and "
        "image_5x, --image-column says which one's px the file of nuclei has",
    )

    out: str = _option("probe", "folder of results.json, predictions and the confusion picture")
    cache_dir: str | None = _option(None, "where embeddings are kept; none: the Hugging Face home")
    device: str = _option("auto", "auto: a GPU if there is one", metavar="DEVICE")
    precision: str = _option(
        "auto", "auto: bf16 on a GPU, else fp32", choices=("auto", "fp32", "bf16", "fp16")
    )
    batch_size: int = _option(64, "squares per call of an encoder")
    num_threads: int = _option(2, "threads that decode and resample ahead of the encoder")
    samples: int = _option(1000, "bootstrap samples of intervals and paired tests")
    level: float = _option(0.95, "of intervals")
    seed: int = _option(0, "of validation split, few-shot draws, bootstrap and random weights")

    def __post_init__(self) -> None:
        """Refuse contradictions where they are said, before any work."""
        for name in ("mpp", "data_mpp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ProbeError(f"--{name.replace('_', '-')}={value}: um/px must be above 0.")
        positive = "folds repeats c neighbours shot_repeats batch_size num_threads samples"
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ProbeError(f"--{name.replace('_', '-')}={getattr(self, name)}: must be > 0.")
        if self.folds < 2:
            raise ProbeError(f"--folds={self.folds}: cross-validation needs at least 2.")
        if not self.max_enlarge >= 1:
            raise ProbeError(f"--max-enlarge={self.max_enlarge}: a factor of at least 1.")
        for name in ("validation_share", "level"):
            if not 0 < getattr(self, name) < 1:
                raise ProbeError(f"--{name.replace('_', '-')}={getattr(self, name)}: in (0, 1).")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ProbeError(f"--methods {unknown or ''}: choose from {', '.join(METHODS)}.")
        for name in ("shots", "c_grid"):
            values = getattr(self, name)
            if not values or not all(math.isfinite(value) and value > 0 for value in values):
                given = " ".join(f"{value:g}" for value in values) or "(nothing)"
                raise ProbeError(f"--{name.replace('_', '-')} {given}: give values above 0.")
        if self.teacher_at_5x and self.teacher is None:
            raise ProbeError("--teacher-at-5x needs --teacher NAME.")
        if self.dense and self.nuclei_csv is None:
            raise ProbeError("--dense predicts counts of nuclei: it needs --nuclei-csv.")
        if self.nuclei_types and self.nuclei_csv is None:
            raise ProbeError("--nuclei-types needs --nuclei-csv.")
        if self.paper_table and self.nuclei_csv:
            raise ProbeError("--paper-table is about labels; leave out --nuclei-csv.")

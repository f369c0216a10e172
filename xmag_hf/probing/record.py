"""What a finished probe is, and what of it goes into results.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from xmag_hf.reporting.records import bare, versions

from .images import LabelledImages
from .options import ProbeOptions
from .rows import Row
from .scoring import Comparison, Question, Score

PACKAGES = ["torch", "timm", "transformers", "datasets", "numpy", "scipy", "scikit-learn", "pillow"]


@dataclass(frozen=True)
class RowResult:
    """What came of a row.

    Attributes:
        row: The row.
        encoder: Facts of the encoder: revision, precision, normalisation, licence, width.
        questions: What is scored.
        scores: With intervals.
        details: Method -> what the protocol says of it (chosen C, folds ...).
    """

    row: Row
    encoder: dict[str, Any]
    questions: list[Question]
    scores: list[Score]
    details: dict[str, Any]


@dataclass(frozen=True)
class ProbeResult:
    """A finished probe, as it was written to `options.out`.

    Attributes:
        options: As given.
        data: Name, fingerprint, splits, classes, groups, share of the largest class.
        rows: In order.
        comparisons: Paired tests, against the first row and between the teacher's two scales.
        remarks: What a reader must know of the data and the protocol.
        seconds: Of the whole run.
    """

    options: ProbeOptions
    data: dict[str, Any]
    rows: list[RowResult]
    comparisons: list[Comparison]
    remarks: list[str]
    seconds: float


def describe(images: LabelledImages, protocol: str) -> dict[str, Any]:
    """Facts of the data: splits with their images, groups, labels and um/px; the protocol."""
    splits = {}
    for name, split in images.splits.items():
        splits[name] = {"images": len(split), "mpp": [split.mpp.min(), split.mpp.max()]}
        if split.groups is not None:
            splits[name]["groups"] = len(set(split.groups))
        if split.labels is not None:
            counts = np.bincount(split.labels, minlength=len(images.classes))
            splits[name]["labels"] = dict(zip(images.classes, counts.tolist(), strict=True))
            # What always answering with the commonest class would score.
            splits[name]["majority"] = counts.max() / counts.sum()
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "classes": images.classes,
        "splits": splits,
        "protocol": protocol,
    }


def record(result: ProbeResult) -> dict[str, Any]:
    """The result as results.json has it."""
    rows = [
        {
            "row": vars(row.row) | {"name": bare(row.row.name)},
            "encoder": row.encoder | {"name": bare(str(row.encoder["name"]))},
            "scores": row.scores,
            "details": row.details,
        }
        for row in result.rows
    ]
    return {
        "options": shown_options(result.options),
        "versions": versions(PACKAGES),
        "data": result.data,
        "rows": rows,
        "comparisons": [
            {field.name: getattr(c, field.name) for field in dataclasses.fields(c)}
            | {"half_width": c.half_width}
            for c in result.comparisons
        ],
        "remarks": result.remarks,
        "seconds": result.seconds,
    }


def shown_options(options: ProbeOptions) -> dict[str, Any]:
    """Options without the folders of a disk: what is shown around should not tell where it is."""
    given = dataclasses.asdict(options)
    given = {key: value for key, value in given.items() if key not in ("out", "cache_dir")}
    for key in ("data", "labels_csv", "nuclei_csv", "teacher"):
        given[key] = None if given[key] is None else bare(given[key])
    return given | {"model": [bare(name) for name in options.model]}

"""What others published for the data sets of the paper, as data.

Patch level, linear probe, official test sets: XMAG's paper (arXiv 2509.23097). It does not say how
F1 is averaged, gives no intervals, and for SPIDER-Breast reports F1 0.816 beside accuracy 0.878.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2509.23097, linear probe, official test set; F1 averaging not stated"


@dataclass(frozen=True)
class PublishedRow:
    """One model's published scores.

    Attributes:
        model: Its name in the paper.
        mpp: um/px that it saw.
        accuracy: Share of test images.
        f1: Averaging not stated.
        auc: Averaging not stated.
    """

    model: str
    mpp: float
    accuracy: float
    f1: float
    auc: float


@dataclass(frozen=True)
class PublishedSet:
    """A data set with its number of classes, by which it is recognised, and its rows."""

    classes: int
    rows: tuple[PublishedRow, ...]


PUBLISHED: dict[str, PublishedSet] = {
    "spider-breast": PublishedSet(
        18,
        (
            PublishedRow("Phikon", 0.5, 0.861, 0.863, 0.992),
            PublishedRow("UNI2", 0.5, 0.878, 0.863, 0.994),
            PublishedRow("XMAG", 2.0, 0.878, 0.816, 0.988),
        ),
    ),
    "spider-crc": PublishedSet(
        13,
        (
            PublishedRow("Phikon", 0.5, 0.892, 0.891, 0.994),
            PublishedRow("UNI2", 0.5, 0.895, 0.894, 0.994),
            PublishedRow("XMAG", 2.0, 0.828, 0.827, 0.990),
        ),
    ),
}

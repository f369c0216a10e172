"""Predictions of a probe as CSV: written, and read back."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import ReportError
from .records import EXACT_DIGITS


def write_class_predictions(
    path: Path,
    ids: np.ndarray,
    groups: np.ndarray | None,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    digits: int = EXACT_DIGITS,
) -> None:
    """Write id, group, label and every repeat's probabilities, `r0:p:<class>` and so on.

    Args:
        path: CSV; its folder exists.
        ids: (n,) str.
        groups: (n,) str, or None: the column stays empty.
        labels: (n,) ints, written as class names.
        probabilities: (n, C) or (R, n, C).
        classes: C names.
        digits: Significant digits of a probability.
    """
    repeats = probabilities if probabilities.ndim == 3 else probabilities[None]
    header = [f"r{r}:p:{name}" for r in range(len(repeats)) for name in classes]
    values = repeats.transpose(1, 0, 2).reshape(len(ids), -1)
    names: list[str] = [str(classes[label]) for label in labels]
    _write_csv(path, ["id", "group", "label", *header], ids, groups, [names], values, digits)


def write_count_predictions(
    path: Path,
    ids: np.ndarray,
    groups: np.ndarray | None,
    log_counts: np.ndarray,
    predictions: np.ndarray,
    types: Sequence[str],
) -> None:
    """Write id, group, measured `y:<type>` and every seed's `r0:<type>`, all log(1 + count).

    Args:
        path: CSV; its folder exists.
        ids: (n,) str.
        groups: (n,) str, or None.
        log_counts: (n, K).
        predictions: (seeds, n, K).
        types: K names.
    """
    header = [f"y:{name}" for name in types]
    header += [f"r{r}:{name}" for r in range(len(predictions)) for name in types]
    flat = predictions.transpose(1, 0, 2).reshape(len(ids), -1)
    values = np.concatenate([log_counts, flat], axis=1)
    _write_csv(path, ["id", "group", *header], ids, groups, [], values)


def read_class_predictions(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read what `xmag probe` wrote: a CSV of id, group, label, r0:p:<class>, ...

    Args:
        path: The CSV.

    Returns:
        (n,) labels, (R, n, C) probabilities, and C class names.

    Raises:
        ReportError: Unreadable, not such a file, a label that no column names, or no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{path}: cannot be read as CSV: {error}.") from error
    header = rows[0] if rows else []
    columns = [name.split(":p:", 1) for name in header[3:] if ":p:" in name]
    classes = tuple(name for repeat, name in columns if repeat == "r0")
    repeats = len({repeat for repeat, _ in columns})
    expected = [[f"r{r}", name] for r in range(repeats) for name in classes]
    if header[:3] != ["id", "group", "label"] or not classes or columns != expected:
        raise ReportError(
            f"{path}: no class predictions of `xmag probe` (columns id, group, label, "
            "r0:p:CLASS, ...); it has " + ", ".join(header[:4]) + "."
        )
    if len(rows) < 2:
        raise ReportError(f"{path}: a header without rows; run the probe again.")
    try:
        labels = np.array([classes.index(row[2]) for row in rows[1:]])
        values = np.array([[float(value) for value in row[3:]] for row in rows[1:]])
        values = values.reshape(len(labels), repeats, len(classes))
    except (ValueError, IndexError) as error:
        raise ReportError(f"{path}: a damaged row ({error}); run the probe again.") from error
    return labels, values.transpose(1, 0, 2), classes


def _write_csv(
    path: Path,
    header: list[str],
    ids: np.ndarray,
    groups: np.ndarray | None,
    names: Sequence[Sequence[str]],
    values: np.ndarray,
    digits: int = EXACT_DIGITS,
) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for i, name in enumerate(ids):
            group = "" if groups is None else groups[i]
            numbers = [f"{value:.{digits}g}" for value in values[i]]
            writer.writerow([name, group, *(column[i] for column in names), *numbers])

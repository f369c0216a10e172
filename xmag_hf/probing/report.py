"""What is written of a probe: predictions, results.json, and the folder that holds them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ProbeError

RESULTS, TABLE = "results.json", "table.md"
FORMAT, FORMAT_VERSION = "xmag-probe", 1
# Nine give a float32 back exactly: ranks and ties survive. Few-shot's twenty draws of up to sixteen
# shots would fill gigabytes with digits that no draw repeats.
EXACT_DIGITS, FEW_SHOT_DIGITS = 9, 3
# In a folder that is being filled, so that only such a one is ever taken away.
_MARKER = ".xmag-probe-partial"
_OWN_FILES = re.compile(
    rf"{re.escape(RESULTS)}|{re.escape(TABLE)}|predictions/[^/]+\.csv|[^/]+\.png"
)


def predictions_name(row: str, method: str) -> str:
    """File name for a row and method; letters that file systems refuse become '_'."""
    return re.sub(r"[^A-Za-z0-9.@+_-]", "_", f"{row}-{method}") + ".csv"


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


def check_out(out: Path) -> Path:
    """Refuse an `out` that holds something that is no report, before any work.

    Args:
        out: Folder of the report; it need not be there.

    Returns:
        It, absolute and without symbolic links.

    Raises:
        ProbeError: It is a file, a folder of other things, or the half-filled folder beside it is
            not ours.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and _files_of(out) is None)):
        raise ProbeError(
            f"--out {out}: exists and is no report (no {RESULTS} of a probe); name another."
        )
    partial_folder = _partial(out)
    if partial_folder.exists() and not (partial_folder / _MARKER).is_file():
        raise ProbeError(
            f"{partial_folder}: is needed while the report is made, and holds something else. "
            "Move it, or name another --out."
        )
    return out


def open_report(out: Path) -> Path:
    """An empty folder beside `out` to fill; `close_report` moves its files there.

    Raises:
        ProbeError: See `check_out`.
    """
    partial_folder = _partial(check_out(out))
    if partial_folder.exists():
        shutil.rmtree(partial_folder)
    (partial_folder / "predictions").mkdir(parents=True)
    (partial_folder / _MARKER).touch()
    return partial_folder


def close_report(partial_folder: Path, out: Path, results: dict[str, Any]) -> None:
    """Write results.json and move all files to `out`, over those of an older report.

    Only files that the older report lists as its own are removed; whatever else lies in the folder
    stays. results.json is moved last, so a folder with a new one is complete.

    Args:
        partial_folder: From `open_report`, filled.
        out: As given there.
        results: For results.json; `format`, `format_version` and `files` are added.
    """
    out = out.expanduser().resolve()
    made = [path.relative_to(partial_folder) for path in sorted(partial_folder.rglob("*"))]
    files = [name.as_posix() for name in made if (partial_folder / name).is_file()]
    files = [name for name in files if name != _MARKER] + [RESULTS]
    named = {"format": FORMAT, "format_version": FORMAT_VERSION} | results | {"files": files}
    with (partial_folder / RESULTS).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(plain(named), indent=2, allow_nan=False))
        stream.flush()
        os.fsync(stream.fileno())
    older = (_files_of(out) if out.exists() else None) or []
    (out / "predictions").mkdir(parents=True, exist_ok=True)
    for name in files:
        os.replace(partial_folder / name, out / name)
    for name in set(older) - set(files):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(partial_folder)


def _partial(out: Path) -> Path:
    if not out.name:
        raise ProbeError(f"--out {out}: name a folder of its own.")
    return out.with_name(f"{out.name}.partial")


def _files_of(out: Path) -> list[str] | None:
    """Files that a report says it wrote, none that could not be its own; None without a report."""
    try:
        held = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        return None
    files = held.get("files")
    names = files if isinstance(files, list) else []
    return [name for name in names if isinstance(name, str) and _OWN_FILES.fullmatch(name)]


def plain(value: Any) -> Any:
    """Dataclasses, arrays and NaN as what JSON has; NaN becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

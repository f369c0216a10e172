"""What is written of a probe: results.json, and the folder that holds it and all else."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from xmag_hf.reporting.records import plain

from .errors import ProbeError

RESULTS, TABLE = "results.json", "table.md"
FORMAT, FORMAT_VERSION = "xmag-probe", 1
# Few-shot's twenty draws of up to sixteen shots would fill gigabytes with digits that no draw
# repeats.
FEW_SHOT_DIGITS = 3
# In a folder that is being filled, so that only such a one is ever taken away.
_MARKER = ".xmag-probe-partial"
_OWN_FILES = re.compile(
    rf"{re.escape(RESULTS)}|{re.escape(TABLE)}|predictions/[^/]+\.csv|[^/]+\.png"
)


def predictions_name(row: str, method: str) -> str:
    """File name for a row and method; letters that file systems refuse become '_'."""
    return re.sub(r"[^A-Za-z0-9.@+_-]", "_", f"{row}-{method}") + ".csv"


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

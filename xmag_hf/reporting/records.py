"""Values as a record in JSON has them."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from xmag_hf._version import __version__

# Significant digits that give a float32 back exactly: ranks and ties survive.
EXACT_DIGITS = 9


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


def bare(name: str) -> str:
    """The last part of a local path; a Hub id or table name as it is."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of xmag_hf, Python and `packages`: what results depend on."""
    found = {"xmag_hf": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not a package"  # openslide from the system's own library
    return found

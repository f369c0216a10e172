"""What goes into JSON: every value as JSON has it, no folder of a disk, versions of packages."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xmag_hf.reporting.records import EXACT_DIGITS, bare, plain, versions


@dataclass
class _Record:
    where: Path
    values: tuple[np.float32, ...]
    table: dict[int, np.ndarray]


def test_plain_values_survive_strict_json() -> None:
    half, none = np.float32(0.5), np.float32("nan")
    record = _Record(Path("a/b"), (half, none), {3: np.array([[1.0, np.inf]])})
    text = json.dumps(plain(record), allow_nan=False)
    assert json.loads(text) == {"where": "a/b", "values": [0.5, None], "table": {"3": [[1, None]]}}


def test_digits_give_every_float32_back() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F7FFFFF, 20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    read = np.array([float(f"{value:.{EXACT_DIGITS}g}") for value in values], dtype=np.float32)
    np.testing.assert_array_equal(read, values)


def test_local_paths_lose_their_folders(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert bare("here/model") == bare(str(tmp_path / "elsewhere" / "model")) == "model"
    assert bare("owkin/phikon-v2") == "owkin/phikon-v2"


def test_versions_name_what_is_no_package() -> None:
    found = versions(["numpy", "no-such-package"])
    assert found["numpy"] == np.__version__ and found["python"] == platform.python_version()
    assert found["no-such-package"] == "not a package"

"""Files appear whole or not at all, whatever stops the writing."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from xmag_hf.atomic_write import atomic_file, remove_drafts, write_atomically


def _bytes(path: Path) -> None:
    write_atomically(path, b"x" * 2_000_000)


def _lines(path: Path) -> None:
    with atomic_file(path, "w", encoding="utf-8") as file:
        for number in range(400_000):
            file.write(f"{number}\n")


def _hdf5(path: Path) -> None:
    with atomic_file(path) as draft, h5py.File(draft.name, "w") as file:
        file["rows"] = np.ones((1000, 1000))


@pytest.mark.parametrize("write", [_bytes, _lines, _hdf5])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    """The kernel's limit on a file's size stops a write in the middle, as a full disk does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_names_the_file_and_keeps_its_words(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left.*file"), atomic_file(path):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="^only words$"), atomic_file(path):
        raise OSError("only words")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "file", b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_seen_before_the_end(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise error
    assert not list(tmp_path.iterdir())


def test_content_arrives(tmp_path: Path) -> None:
    path = tmp_path / "Gr\u00f6\u00dfe [1].csv"
    write_atomically(path, "\u00b5m\r\n")
    assert path.read_bytes() == b"\xc2\xb5m\r\n"
    _hdf5(path)
    with h5py.File(path) as file:
        assert np.asarray(file["rows"]).sum() == 1_000_000


def test_drafts_of_killed_writers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[1].h5"
    others = [tmp_path / ".a1.h5.1-ab.tmp", tmp_path / ".b.h5.1-ab.tmp", path]
    with atomic_file(path) as file:
        left = Path(file.name)
        copy = left.read_bytes()
    left.write_bytes(copy)  # as a killed writer's
    for other in others:
        other.touch()
    remove_drafts(path)
    assert sorted(tmp_path.iterdir()) == sorted(others)

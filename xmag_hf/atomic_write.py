"""Files that are whole or not there: a temporary name beside them, fsync, rename.

Below all folders of the package; imports nothing of it.
"""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file as a whole; text becomes UTF-8, its line ends stay as they are.

    Args:
        path: In a folder that exists; an older file is replaced.
        content: All of it.

    Raises:
        OSError: As the file system says; the older file is untouched and nothing is left behind.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path, mode: str = "wb", **open_kwargs: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, which takes its place once the block has ended well.

    What opens files itself (h5py) may write to the yielded file's `name` instead.

    Args:
        path: In a folder that exists; an older file is replaced.
        mode: As of `open`.
        **open_kwargs: As of `open`: encoding, newline.

    Yields:
        The open temporary file.

    Raises:
        OSError: As the file system says, with a file name. After this or any other error the
            temporary file is removed, and an older file is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with draft.open(mode, **open_kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        # A full disk does not say what did not fit. Without errno the name would hide the message.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_drafts(path: Path) -> None:
    """Remove temporary files of `path` that killed writers left; nobody may be writing it."""
    for draft in path.parent.glob(glob.escape(f".{path.name}.") + "*.tmp"):
        draft.unlink(missing_ok=True)

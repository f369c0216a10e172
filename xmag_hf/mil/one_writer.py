"""One process at a time in a study's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xmag_hf.embedding.lock import acquire, describe_holder

from .errors import MILError


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold `OUT.lock` while a study is made.

    It lies beside the folder, since a study's folder is renamed into place when it is complete. The
    lock of a process that is gone is taken over.

    Args:
        out: Of the study, absolute.

    Raises:
        MILError: Another process has it; it is named.
        OSError: The folder above cannot be written.
    """
    path = out.with_name(f"{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = acquire(path)
    if lock is None:
        raise MILError(
            f"--out {out}: {describe_holder(path)} is working on it ({path.name}). Wait for it "
            "(two minutes, if it was killed on another machine) and run the same command again, or "
            "choose another --out."
        )
    try:
        yield
    finally:
        lock.release()

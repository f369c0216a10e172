"""Lock files: several processes share one output folder slide by slide, or one has it alone.

Created exclusively; holds host, process and a token. A thread touches it while the work goes on.
A lock is stale when its process is gone (same host and process namespace) or nobody touched it
for `STALE_SECONDS`. Should a lock fail in spite of that, a slide is done twice and nothing breaks:
bags are written under their own temporary names and renamed. Imports nothing of xmag_hf.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


class SlideLock:
    """Hold a slide. Make it with `acquire`.

    Attributes:
        path: The lock file.
    """

    def __init__(self, path: Path, token: str):
        self.path = path
        self._token = token
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, unless somebody took it over. Releasing twice is harmless."""
        if self._done.is_set():
            return
        self._done.set()
        self._thread.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except FileNotFoundError:  # taken over
                return
            except OSError:  # a server that does not answer just now
                continue


def acquire(path: Path) -> SlideLock | None:
    """Take the lock at `path` if it is free or stale.

    Args:
        path: The lock file; its folder exists.

    Returns:
        The lock, or None while somebody else holds it.

    Raises:
        OSError: The folder cannot be written.
    """
    token = uuid.uuid4().hex
    for _ in range(2):  # the second time after a stale one is gone
        if _create(path, token):
            return SlideLock(path, token)
        if not _remove_if(path, is_stale):
            return None
    return None


@contextmanager
def only_writer(out: Path, refusal: type[Exception], option: str = "--out") -> Iterator[None]:
    """Hold `OUT.lock` while a report is made; it lies beside the folder, which need not be there.

    Args:
        out: Of the report, absolute.
        refusal: Raised while another process has the lock; its message names that process.
        option: That names `out`, for the message.

    Raises:
        OSError: The folder above cannot be written.
    """
    path = out.with_name(f"{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = acquire(path)
    if lock is None:
        raise refusal(
            f"{option} {out}: {describe_holder(path)} is working on it ({path.name}). Wait for it "
            "(two minutes, if it was killed on another machine) and run the same command again, or "
            f"choose another {option}."
        )
    try:
        yield
    finally:
        lock.release()


def is_stale(path: Path) -> bool:
    """Whether the holder of a lock is gone; False if there is no lock."""
    try:
        age = _file_system_now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if age > STALE_SECONDS:
        return True
    holder = _read(path)
    return holder.get("host") == host() and not _alive(int(holder.get("pid", 0)))


def describe_holder(path: Path) -> str:
    """Who holds a lock, in words."""
    holder = _read(path)
    return f"process {holder.get('pid', '?')} on {str(holder.get('host', '?')).split()[0]}"


def host() -> str:
    """This machine and process namespace: process ids mean something within it only."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()} {namespace}"


def _create(path: Path, token: str) -> bool:
    # Written under another name and linked, so that nobody ever reads an empty lock.
    draft = path.with_name(f"{path.name}.{token}")
    content = {"host": host(), "pid": os.getpid(), "token": token, "since": time.time()}
    draft.write_text(json.dumps(content), encoding="utf-8")
    try:
        return _link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _link(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(draft.read_bytes())
    return True


def _remove_if(path: Path, stale: Callable[[Path], bool]) -> bool:
    """Remove a stale lock. One process at a time judges, so none removes a fresh one."""
    if not stale(path):
        return not path.exists()
    judge = path.with_name(path.name + ".judge")
    token = uuid.uuid4().hex
    if not _create(judge, token):
        if stale(judge):  # died while judging; the next round, or the next process, goes on
            judge.unlink(missing_ok=True)
        return False
    try:
        if stale(path):
            path.unlink(missing_ok=True)
        return not path.exists()
    finally:
        judge.unlink(missing_ok=True)


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _alive(pid: int) -> bool:
    if pid <= 0:
        return True  # unreadable: only its age can tell
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _file_system_now(folder: Path) -> float:
    """The time by the clock that stamps the files: a server's may differ from ours."""
    probe = folder / f".now.{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)

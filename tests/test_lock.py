"""Locks: exclusive, taken over when stale, by one process only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from xmag_hf import lock as module
from xmag_hf.lock import acquire, host, is_stale


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slide.lock"


def leave(path: Path, *, pid: int, where: str | None = None, age: float = 0.0) -> None:
    path.write_text(json.dumps({"host": where or host(), "pid": pid, "token": "theirs"}))
    then = time.time() - age
    os.utime(path, (then, then))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_one_holder(path):
    first = acquire(path)
    assert first is not None
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert acquire(path) is None
    first.release()
    first.release()
    second = acquire(path)
    assert second is not None
    second.release()
    assert not any(path.parent.iterdir())


@pytest.mark.parametrize(
    ("holder", "stale"),
    [
        ({"pid": "dead"}, True),
        ({"pid": "mine"}, False),
        ({"pid": "mine", "age": 1e4}, True),  # its process id was given to somebody else
        ({"pid": "dead", "where": "elsewhere pid:[1]"}, False),
        ({"pid": "dead", "where": "elsewhere pid:[1]", "age": 1e4}, True),
    ],
)
def test_stale_or_not(path, holder, stale):
    leave(path, **(holder | {"pid": dead_pid() if holder["pid"] == "dead" else os.getpid()}))
    assert is_stale(path) == stale
    taken = acquire(path)
    assert (taken is not None) == stale
    if taken is not None:
        taken.release()


def test_a_lock_cut_short_is_kept_until_it_is_old(path):
    path.write_text("{")
    assert acquire(path) is None
    os.utime(path, (0, 0))
    taken = acquire(path)
    assert taken is not None
    taken.release()


def test_of_many_one_takes_a_stale_lock_over(path):
    leave(path, pid=dead_pid())
    start, held = threading.Barrier(8), []

    def contend() -> None:
        start.wait()
        taken = acquire(path)
        if taken is not None:
            held.append(taken)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) <= 1
    winner = held[0] if held else acquire(path)  # all may have yielded to one another
    assert winner is not None
    winner.release()
    assert not any(path.parent.iterdir())


def test_the_heartbeat_keeps_a_lock_fresh(path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    held = acquire(path)
    assert held is not None
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime < time.time() - 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_stale(path)
    held.release()


def test_who_lost_the_lock_does_not_remove_the_new_one(path):
    held = acquire(path)
    assert held is not None
    leave(path, pid=os.getpid())
    held.release()
    assert json.loads(path.read_text())["token"] == "theirs"

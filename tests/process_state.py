"""Whether another process is at work, and whether it ends with its parent."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path


def process_runs(pid: int) -> bool:
    """Of a process that may be another's child."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose new parent does not collect it is dead, too.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]


def worker_ends_with_killed_parent(command: list[str], told: Path) -> bool:
    """Start a command, kill it once a process of its own has told its pid, wait for that one.

    Args:
        command: Of the parent.
        told: Where the process writes its pid and a space.
    """
    parent = subprocess.Popen(command)
    deadline = time.monotonic() + 120  # both processes import the package first
    try:
        while not (told.exists() and told.read_text().endswith(" ")):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    worker, deadline = int(told.read_text()), time.monotonic() + 30
    while process_runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not process_runs(worker)

"""Whether another process is at work."""

from __future__ import annotations

import os
from pathlib import Path


def process_runs(pid: int) -> bool:
    """Of a process that may be another's child."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose new parent does not collect it is dead, too.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]

"""Runs that are killed or compete, in forks of one process: torch is imported once.

`python forked.py kill OUT N SLIDE...`: an undisturbed run, then N runs killed at random moments,
each into its own folder; then the last is taken up again. `python forked.py share OUT N SLIDE...`:
N processes on one folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from mean_colour import mean_colour

from xmag_hf.embedding import EmbedOptions, SlideSource, embed_slides

OPTIONS = EmbedOptions(threads=2, batch_size=2, tissue=0.1)


def fork(out: Path, slides: list[str], *, pause: float = 0.0) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        encoder = mean_colour()
        if pause:
            plain = encoder.forward
            encoder.forward = lambda images: (time.sleep(pause), plain(images))[1]
        summary = embed_slides([SlideSource(Path(p)) for p in slides], out, encoder, OPTIONS)
        said = {record.slide_id: record.status for record in summary.records}
        (out / f"status.{os.getpid()}.json").write_text(json.dumps(said))
    finally:
        os._exit(0)


def kill(out: Path, n: int, slides: list[str]) -> None:
    started = time.monotonic()
    os.waitpid(fork(out / "whole", slides), 0)
    length = time.monotonic() - started
    draw = random.Random(0)
    for number in range(n):
        child = fork(out / f"killed{number}", slides)
        time.sleep(draw.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.waitpid(fork(out / f"killed{n - 1}", slides), 0)


def share(out: Path, n: int, slides: list[str]) -> None:
    for child in [fork(out, slides, pause=0.05) for _ in range(n)]:
        os.waitpid(child, 0)


if __name__ == "__main__":
    {"kill": kill, "share": share}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])

"""A network on a CPU with freed memory kept by the process, and handed back to the kernel.

    python benchmarks/freed_memory.py [--student examples/xmag-lite] [--rounds 3]

Each measurement is a process of its own, since malloc's settings cannot be taken back cleanly; the
two kinds take turns. Shown: the median rate, its ratio, the share of processor time spent in the
kernel, and the peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from xmag_hf.host_memory import keep_freed_memory

ROOT = Path(__file__).parents[1]
WORK = {
    "encode, batch 32": (32, False),
    "encode, batch 64": (64, False),
    "forward and backward": (32, True),
}


def main() -> None:
    """Let the two kinds take turns, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default=str(ROOT / "examples" / "xmag-lite"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patches", type=int, default=192, help="per measurement")
    parser.add_argument("--measure", nargs=2, metavar=("WORK", "KEEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args, *args.measure)))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for work in WORK:
            for keep in ("handed back", "kept"):
                found.setdefault((work, keep), []).append(in_a_process(args, work, keep))
    report(args, found)


def in_a_process(args: argparse.Namespace, work: str, keep: str) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--student", args.student, "--measure", work, keep]
    command += ["--patches", str(args.patches)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, work: str, keep: str) -> dict[str, float]:
    """Patches a second, share of processor time in the kernel, peak resident GB."""
    if keep == "kept" and not keep_freed_memory():
        raise SystemExit("malloc cannot be told here (not glibc, or the environment decides)")
    import torch  # after malloc was told

    from xmag_hf.encoders import load_encoder

    batch, train = WORK[work]
    model: Any = load_encoder(args.student).model.train(train)
    model.requires_grad_(train)
    pixels = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = model(pixels)
            if train:
                out.pooler_output.square().mean().backward()

    step()
    steps = max(1, args.patches // batch)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {
        "rate": steps * batch / seconds,
        "kernel": system / (system + user),
        "peak_gb": peak_gb(),
    }


def peak_gb() -> float:
    """Peak resident GB of this process alone; getrusage's is inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise SystemExit("/proc/self/status names no VmHWM")


def report(args: argparse.Namespace, found: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """One line a kind of work and setting."""
    table = Table(title=f"{args.student}: freed memory")
    for heading in ("", "freed memory", "patches/s", "ratio", "in the kernel", "peak GB"):
        table.add_column(heading, justify="left" if heading in ("", "freed memory") else "right")
    for (work, keep), runs in found.items():
        rate, kernel, peak = (
            statistics.median(run[key] for run in runs) for key in ("rate", "kernel", "peak_gb")
        )
        base = statistics.median(run["rate"] for run in found[work, "handed back"])
        table.add_row(
            work, keep, f"{rate:.1f}", f"{rate / base:.2f}", f"{kernel:.0%}", f"{peak:.2f}"
        )
    console = Console()
    console.print(table)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {' '.join(platform.libc_ver())}, torch "
        f"{version('torch')}, {args.rounds} processes a line, load {load} at the end"
    )


if __name__ == "__main__":
    main()

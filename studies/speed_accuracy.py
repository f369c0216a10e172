"""Speed against accuracy: the paper's Figure 1d with our rows.

Accuracy is read from the results.json of studies/magnification.py. Speed is measured here, on this
machine, encoders taking turns: patches encoded per second, and the slides per minute that follow
from the paper's mean counts, 554 patches a slide at 5x and 6,260 at 20x (encoding alone, as there).
Writes results.json, table.md and speed_accuracy.png into --out.

    python studies/speed_accuracy.py --results study/results.json --student lite --out speed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xmag_hf.distillation.teacher import best_device
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.host_memory import keep_freed_memory

# arXiv 2509.23097, Fig. 3: mean patches a slide; and the speed it states, hardware not said.
PATCHES_5X, PATCHES_20X = 554, 6_260
PAPER = {"XMAG (paper)": 8.80, "Phikon (paper)": 1.11, "UNI2 (paper)": 0.30}
# Row of the study -> who encodes, how many patches a slide. Students are the rest.
TEACHER_ROWS = {"teacher at 20x": PATCHES_20X, "teacher on enlarged 5x": 16 * PATCHES_5X}
PANELS = {
    "GlaS, AUC": ["GlaS AUC"],
    "nuclei per field, rank correlation": ["fields: "],
    "nuclei per grid cell, rank correlation": ["cells: "],
}
# In the table alone: random weights score so low that nothing else could be told apart.
NOT_DRAWN = ("random at 5x",)
COLOURS = {"teacher at 20x": "#D55E00", "teacher on enlarged 5x": "#E69F00", "distilled": "#0072B2"}
LABELS = {"start at 5x": "undistilled start at 5x"}


def main() -> None:
    """Measure, join, draw."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", required=True, type=Path, help="of studies/magnification.py")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--student", default="lite", help="size: lite, tiny, small or base")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    device = best_device()
    # Weights do not change the speed of a student.
    encoders = {
        "teacher": load_encoder(args.teacher, device=device),
        "student": load_encoder(f"random:{args.student}", device=device),
    }
    rates = measured_rates(encoders, args.batch_size, args.turns)
    scores = json.loads(args.results.read_text())["scores"]
    results = {
        "machine": machine(device),
        "patches per second": rates,
        "rows": {name: as_row(name, row, rates) for name, row in scores.items()},
        "paper, slides per minute": PAPER,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "table.md").write_text(as_table(results))
    draw(results, args.out / "speed_accuracy.png")
    print(as_table(results))


def measured_rates(encoders: dict[str, Encoder], batch_size: int, turns: int) -> dict[str, float]:
    """Patches per second of each encoder: median of turns, after one that does not count."""
    shape = (batch_size, 3, 224, 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for turn in range(turns + 1):
        for name, encoder in encoders.items():
            batch = images.to(encoder.device)
            began = time.perf_counter()
            encoder(batch).cpu()  # waits for a GPU, too
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: batch_size / statistics.median(times) for name, times in seconds.items()}


def as_row(name: str, row: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """Speed and accuracy of one row of the study."""
    rate = rates["teacher" if name in TEACHER_ROWS else "student"]
    patches = TEACHER_ROWS.get(name, PATCHES_5X)
    found: dict[str, Any] = {"patches": patches, "rate": rate}
    found["slides per minute"] = 60 * rate / patches
    for panel, starts in PANELS.items():
        mine = [row[measure] for measure in row if measure.startswith(tuple(starts))]
        seeds = np.mean([part["per_seed"] for part in mine], axis=0)
        found[panel] = {
            "estimate": float(np.mean([part["estimate"] for part in mine])),
            "seeds": seeds.tolist(),
            # The mean of several measures has no interval in the study's results.
            "interval": [mine[0]["low"], mine[0]["high"]] if len(mine) == 1 else None,
        }
    return found


def machine(device: torch.device) -> str:
    """Where the speed was measured."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    return (
        f"{name}, {os.cpu_count()} cores, {threads} thread(s) used, load {load:.1f}, "
        f"torch {version('torch')}"
    )


def as_table(results: dict[str, Any]) -> str:
    """Rows, fastest first, then the paper's."""
    lines = [f"{results['machine']}; the paper's rows on hardware that it does not state.", ""]
    lines.append("| row | patches/s | patches a slide | slides/min | " + " | ".join(PANELS) + " |")
    lines.append("|---|--:|--:|--:|" + "--:|" * len(PANELS))
    order = sorted(results["rows"].items(), key=lambda item: -item[1]["slides per minute"])
    for name, row in order:
        scores = " | ".join(f"{row[panel]['estimate']:.3f}" for panel in PANELS)
        lines.append(
            f"| {name} | {row['rate']:.1f} | {row['patches']:,} | "
            f"{row['slides per minute']:.2f} | {scores} |"
        )
    for name, rate in results["paper, slides per minute"].items():
        lines.append(f"| {name} | | | {rate:.2f} |" + " |" * len(PANELS))
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel a yardstick: right is faster, up is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(PANELS), 4.6), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(PANELS), sharex=True)))
    drawn = {name: row for name, row in results["rows"].items() if name not in NOT_DRAWN}
    students = [name for name in drawn if name not in TEACHER_ROWS]
    greys = iter(["#555555", "#888888", "#AAAAAA", "#009E73", "#CC79A7", "#56B4E9"])
    colours = {name: COLOURS.get(name) or next(greys) for name in drawn}
    for axis, panel in zip(axes, PANELS, strict=True):
        for name, row in drawn.items():
            # Students are equally fast: side by side, or they would hide each other.
            shift = (
                1.12 ** (students.index(name) - (len(students) - 1) / 2) if name in students else 1
            )
            x, y, colour = row["slides per minute"] * shift, row[panel], colours[name]
            if y["interval"]:
                axis.plot([x, x], y["interval"], color=colour, lw=1.5, alpha=0.6)
            axis.plot([x] * len(y["seeds"]), y["seeds"], ".", color=colour, ms=4, alpha=0.7)
            label = f"{LABELS.get(name, name)} ({row['rate']:.2g} patches/s)"
            axis.plot(x, y["estimate"], "o", color=colour, ms=9, label=label)
        axis.set_xscale("log")
        axis.set_title(panel, fontsize=11)
        axis.set_xlabel("slides per minute, encoding alone")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title = "Right is faster, up is better; students, equally fast, stand side by side"
    figure.suptitle(f"{title}\n{results['machine']}", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

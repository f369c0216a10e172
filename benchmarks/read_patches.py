"""How fast patches can be read, by each way there is, on one core, and what pixels come out.

All ways read the same patches (224 px at 2 um/px, the kept ones of `xmag embed`) of files that lie
in memory, in turns within one run. Times are processor time of the whole process: other programs on
the machine disturb it less than the clock. Each way is timed twice: `raw` ends with the pixels of
the level, as bytes; `resampled` with 224 px patches, resampled on the CPU. Pixel differences, in
grey levels, are to the contract's pixels (`Slide.read_region`, which reads through OpenSlide).

    taskset -c 0 python benchmarks/read_patches.py colon_40x.tif colon_adenoma_20x.tif

cuCIM's rows need `pip install cucim-cu12` (Linux; it brings CUDA's libraries), in this environment
or in one of its own, named by `--cucim-python`. With `--student FOLDER` the table has a column
more: how far the features of each way's pixels lie from those of the contract's, as the mean cosine
after the mean feature over the patches is subtracted.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import reading_ways
import torch
from reading_ways import CUCIM_WAYS, N_PX, Job, Way, timed
from rich.console import Console
from rich.table import Table

import xmag_hf.embedding.read as read_module
from xmag_hf.embedding.encode import PatchEncoder
from xmag_hf.embedding.options import EmbedOptions
from xmag_hf.embedding.plan import PatchGeometry, SlidePlan, plan_slide
from xmag_hf.embedding.read import read_patches
from xmag_hf.embedding.resampling import Resampler
from xmag_hf.embedding.sources import SlideSource
from xmag_hf.encoders import load_encoder
from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.slides import open_slide
from xmag_hf.slides.windows import axis_window, window_shape

MPP = 2.0
GEOMETRY = PatchGeometry(N_PX, MPP, 0, N_PX, MPP, 0.0)
FEATURE_PATCHES = 48
USUAL, DECODE_ONLY = "usual: OpenSlide region, PIL", "tiles decoded, nothing else"
CONTRACT = "package, OpenSlide (the contract)"


def plans(path: Path) -> tuple[SlidePlan, SlidePlan]:
    """The slide read tile by tile (else it is refused), and by OpenSlide."""
    fast, slow = (
        plan_slide(SlideSource(path), GEOMETRY, EmbedOptions(reader=reader))
        for reader in ("tiles", "openslide")
    )
    return fast, slow


def job_of(path: Path, plan: SlidePlan) -> Job:
    """What the ways of reading need to know."""
    assert plan.tiles is not None  # noqa: S101 - --reader tiles refuses other slides
    with open_slide(path) as slide:
        scale = slide.level_scales[plan.level][0]
        step = MPP / plan.mpp0 / scale
        side, margin = window_shape(step, N_PX)
        reads = [slide.plan_read((x, y), N_PX, MPP)[1:] for x, y in plan.coords.tolist()]
    places = [
        (axis_window(across, side, margin), axis_window(down, side, margin))
        for across, down in reads
    ]
    used = np.unique(np.concatenate([plan.tiles.tiles_of(*place) for place in places]))
    used = used[np.argsort(plan.tiles.offsets[used])]
    return Job(path, plan.coords, plan.tiles, scale, round(step * N_PX), places, used)


def ways_of(plan: SlidePlan, slow: SlidePlan, cucim: subprocess.Popen) -> dict[str, Way | None]:
    """All ways for a slide; None stands for one of the other process."""
    names = reading_ways.WAYS | {
        CONTRACT: lambda job, resampled: _product(slow, resampled),
        "package, JPEG tiles": lambda job, resampled: _product(plan, resampled),
    }
    there = pickle.load(cucim.stdout)  # type: ignore[arg-type]  # noqa: S301
    return names | (dict.fromkeys(CUCIM_WAYS) if there else {})


class _NoResampling(Resampler):
    def __call__(self, windows: np.ndarray, places: Sequence) -> np.ndarray:
        return np.empty((len(windows), 1, 1, 3), np.uint8)


@contextmanager
def _resampler(kind: type[Resampler]) -> Iterator[None]:
    kept, read_module.Resampler = read_module.Resampler, kind  # type: ignore[misc]
    try:
        yield
    finally:
        read_module.Resampler = kept  # type: ignore[misc]


def _product(plan: SlidePlan, resampled: bool) -> np.ndarray | None:
    with _resampler(Resampler if resampled else _NoResampling):
        batches = [np.asarray(batch.pixels) for batch in read_patches(plan, batch_size=32)]
    return np.concatenate(batches) if resampled else None


# --- the table ------------------------------------------------------------------------------------


def run_way(
    name: str, way: Way | None, job: Job, resampled: bool, cucim: subprocess.Popen
) -> tuple[float, np.ndarray | None]:
    """Processor seconds of a way, and its patches."""
    if way is not None:
        return timed(way, job, resampled)
    pickle.dump((name, job, resampled), cucim.stdin)  # type: ignore[arg-type]
    cucim.stdin.flush()  # type: ignore[union-attr]
    return pickle.load(cucim.stdout)  # type: ignore[arg-type]  # noqa: S301


def centred_cosine(features: np.ndarray, others: np.ndarray) -> float:
    """Mean cosine of rows after the mean of `features` is subtracted from both."""
    centre = features.mean(axis=0)
    a, b = features - centre, others - centre
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


def show(path: Path, repeats: int, student: PatchEncoder | None, cucim_python: str) -> Table:
    """Measure a slide and lay out what came out."""
    plan, slow = plans(path)
    job = job_of(path, plan)
    command = [cucim_python, str(Path(reading_ways.__file__))]
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    patches: dict[str, np.ndarray | None] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cucim:
        ways = ways_of(plan, slow, cucim)
        for _ in range(repeats):
            for name, way in ways.items():
                for kind in (0, 1):
                    spent, patches[name] = run_way(name, way, job, bool(kind), cucim)
                    seconds.setdefault(name, ([], []))[kind].append(spent)
        cucim.stdin.close()  # type: ignore[union-attr]
    step = job.side / N_PX
    table = Table(
        title=f"{path.name}: {len(job.coords)} patches of {step * N_PX:.0f} px at level "
        f"{plan.level}, {len(job.used)} tiles of {job.tiles.tile_px[0]} px"
    )
    titles = ("way", "raw /s", "of decoding", "x usual", "resampled /s", "x usual", "mean", "max")
    for title in (*titles, "cosine"):
        table.add_column(title, justify="left" if title == "way" else "right")
    rates = {
        name: [len(job.coords) / statistics.median(kind) for kind in both]
        for name, both in seconds.items()
    }
    for name, (raw, whole) in rates.items():
        cells = [f"{raw:.0f}", f"{raw / rates[DECODE_ONLY][0]:.2f}", f"{raw / rates[USUAL][1]:.1f}"]
        if patches[name] is not None:
            cells += [f"{whole:.0f}", f"{whole / rates[USUAL][1]:.1f}"]
            cells += differences(patches[name], patches[CONTRACT], student)  # type: ignore[arg-type]
        table.add_row(name, *cells)
    return table


def differences(
    pixels: np.ndarray, expected: np.ndarray, student: PatchEncoder | None
) -> list[str]:
    """Mean and largest difference in grey levels, and the features' cosine."""
    off = np.abs(pixels.astype(np.int16) - expected)
    cells = [f"{off.mean():.3f}", f"{off.max()}"]
    if student is None:
        return cells
    some = np.unique(np.linspace(0, len(expected) - 1, FEATURE_PATCHES).round().astype(int))
    if not off.any():
        return [*cells, "1"]
    pair = [student(patches[some]).features for patches in (expected, pixels)]
    return [*cells, f"{centred_cosine(*pair):.5f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--student", help="an encoder at 2 um/px, for the cosine")
    parser.add_argument(
        "--cucim-python", default=sys.executable, help="a Python that has cuCIM and this package"
    )
    args = parser.parse_args()
    keep_freed_memory()  # as every command does
    torch.set_num_threads(1)
    student = None
    if args.student:
        encoder = load_encoder(args.student, device=torch.device("cpu"), precision="fp32")
        student = PatchEncoder(encoder)
    for path in args.slides:
        Console(width=130).print(show(path, args.repeats, student, args.cucim_python))


if __name__ == "__main__":
    main()

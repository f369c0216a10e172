"""How fast this machine embeds: slides by stage, the encoder against matrix products, the paper.

Figures of one run on one machine, which other work on it disturbs: compare within a run.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from xmag_hf.encoders import ENCODERS, PRECISIONS, Encoder, build_architecture, load_encoder
from xmag_hf.reporting.records import versions

from .embed import embed_slides
from .encode import PatchEncoder
from .options import EmbedError, EmbedOptions
from .plan import patch_geometry
from .records import PACKAGES, STAGES, RunSummary
from .run import Progress, loaded_encoder
from .sources import SlideSource

SAMPLE = {"cuda": 1024, "cpu": 8}
MATRIX_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048)}
# The paper's speed comparison, one slide: its Figure 3 and section 3.4, seconds on its machine.
PAPER = (
    ("XMAG base, 5x", "random:base", 554, 6.82),
    ("Phikon, 20x", "phikon", 6260, 54.21),
    ("UNI2-h, 20x", "uni2-h", 6260, 201.25),
)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured beside the slides.

    Raises:
        EmbedError: A value outside its range, named.
    """

    sample: int | None = field(
        default=None,
        metadata={
            "help": "patches that each encoder is timed on, and extrapolated from; none is 1024 on "
            "a GPU, 8 on a CPU"
        },
    )
    rounds: int = field(
        default=3, metadata={"help": "times each is measured, in turn; the median counts"}
    )
    paper: bool = field(
        default=True,
        metadata={
            "help": "the paper's comparison: 554 patches through XMAG base, 6,260 through Phikon "
            "and UNI2-h, with random weights"
        },
    )

    def __post_init__(self) -> None:
        for name in ("sample", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EmbedError(f"{name}={value}: it must be at least 1.")


@dataclass(frozen=True)
class PassTiming:
    """One pass over the slides.

    Attributes:
        name: `cold` (the kernel was asked to forget the files) or `warm`.
        slides: Embedded.
        patches: In all.
        wall_seconds: From the first slide's opening to the last bag; stages overlap in it.
        stages: Seconds per slide, mean, by stage; reading is summed over threads.
        records: (slide_id, status, patches, seconds by stage) of each slide.
    """

    name: str
    slides: int
    patches: int
    wall_seconds: float
    stages: dict[str, float]
    records: tuple[tuple[str, str, int, dict[str, float]], ...]

    @property
    def slides_per_minute(self) -> float:
        """Of this pass."""
        return 60 * self.slides / self.wall_seconds

    @property
    def patches_per_second(self) -> float:
        """End to end."""
        return self.patches / self.wall_seconds


@dataclass(frozen=True)
class EncoderTiming:
    """An encoder alone: bytes of patches in, embeddings out.

    Attributes:
        name: Of the row.
        params_m: Million parameters.
        gflops: Of one patch, two for a multiplication with its addition.
        sample: Patches that were timed.
        seconds: For the sample, the median of the rounds.
        patches: Of one slide, by the paper's count; None where its patches are not the paper's, or
            outside the comparison.
        paper_seconds: For them, as the paper has it.
        share: Of the machine's matrix-product rate.
    """

    name: str
    params_m: float
    gflops: float
    sample: int
    seconds: float
    patches: int | None
    paper_seconds: float | None
    share: float

    @property
    def patches_per_second(self) -> float:
        """Encoding only."""
        return self.sample / self.seconds

    @property
    def slide_seconds(self) -> float | None:
        """For one slide's patches, extrapolated from the sample."""
        return None if self.patches is None else self.patches / self.patches_per_second


@dataclass(frozen=True)
class BenchReport:
    """All that was measured in one run.

    Attributes:
        machine: See `machine`.
        model: Name of the encoder that embedded the slides.
        precision: It ran in, and the paper's encoders too.
        options: Of the embedding.
        passes: Cold and warm.
        encoders: The model, with 554 patches if it takes the paper's, and the paper's three.
        matrix_product_rate: FLOP/s.
    """

    machine: dict[str, Any]
    model: str
    precision: str
    options: dict[str, Any]
    passes: tuple[PassTiming, ...]
    encoders: tuple[EncoderTiming, ...]
    matrix_product_rate: float


def bench(
    sources: Sequence[SlideSource],
    model: str,
    options: EmbedOptions,
    what: BenchOptions,
    *,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure slides, the encoder and, if asked, the paper's encoders.

    Args:
        sources: The slides.
        model: For `load_encoder`.
        options: Of the embedding.
        what: Sample, rounds, comparison.
        progress: As for `embed_slides`.

    Returns:
        The report.

    Raises:
        EmbedError: No slide could be embedded, or see `embed_slides`.
        EncoderError: The encoder cannot be had.
    """
    encoder = loaded_encoder(model, options)
    sample = what.sample or SAMPLE.get(encoder.device.type, SAMPLE["cpu"])
    size = PatchEncoder(encoder, batch_size=options.batch_size).batch_size
    side = encoder.input_px
    # What is allocated and compiled at the first batch belongs to no slide.
    PatchEncoder(encoder)(np.zeros((size, side, side, 3), np.uint8))
    passes = time_slides(sources, encoder, options, progress=progress)
    geometry = patch_geometry(encoder.card, options)
    # The paper's count is of its own patches: others cut a slide into more or fewer.
    as_paper = (geometry.patch_px, geometry.mpp, geometry.overlap) == (224, 2.0, 0)
    rows: list[tuple[str, Encoder, int | None, float | None]] = [
        (encoder.name, encoder, PAPER[0][2] if what.paper and as_paper else None, None)
    ]
    if what.paper:
        rows += paper_rows(encoder.device, encoder.precision)
    timings, rate = time_encoders(
        rows, sample=sample, rounds=what.rounds, batch_size=options.batch_size
    )
    return BenchReport(
        machine=machine(),
        model=encoder.name,
        precision=encoder.precision,
        options=asdict(options),
        passes=passes,
        encoders=tuple(timings),
        matrix_product_rate=rate,
    )


def time_slides(
    sources: Sequence[SlideSource],
    encoder: Encoder,
    options: EmbedOptions,
    *,
    progress: Progress | None = None,
) -> tuple[PassTiming, PassTiming]:
    """Embed the slides twice, into folders that are thrown away.

    Dropping the whole page cache needs root; `posix_fadvise(DONTNEED)` on the slides' own files
    does not, and the kernel may decline.

    Args:
        sources: The slides.
        encoder: Loaded; it has encoded a batch when this is called.
        options: As for `embed_slides`.
        progress: As for `embed_slides`.

    Returns:
        The cold pass and the warm one.

    Raises:
        EmbedError: No slide could be embedded.
    """
    timings = []
    for name in ("cold", "warm"):
        if name == "cold":
            for source in sources:
                _forget(source.path)
        with tempfile.TemporaryDirectory(prefix="xmag-bench-") as folder:
            started = time.perf_counter()
            summary = embed_slides(sources, folder, encoder, options, progress=progress)
            timings.append(_timing(name, summary, time.perf_counter() - started))
    return timings[0], timings[1]


def time_encoders(
    rows: Sequence[tuple[str, Encoder, int | None, float | None]],
    *,
    sample: int,
    rounds: int,
    batch_size: int | None,
) -> tuple[list[EncoderTiming], float]:
    """Time encoders in turn, so that other load on the machine meets all of them.

    Args:
        rows: (name, encoder, patches of a slide, the paper's seconds for them).
        sample: Patches for each.
        rounds: Measurements of each.
        batch_size: Largest; None is the device's usual.

    Returns:
        A timing for each, and the matrix-product rate, FLOP/s.
    """
    pixels: dict[int, np.ndarray] = {}
    for side in {encoder.input_px for _, encoder, _, _ in rows}:
        generator = np.random.default_rng(0)
        pixels[side] = generator.integers(0, 256, (sample, side, side, 3), np.uint8)
    encoders = [PatchEncoder(encoder, batch_size=batch_size) for _, encoder, _, _ in rows]
    gflops = [flops_per_patch(encoder) / 1e9 for _, encoder, _, _ in rows]
    work = [
        partial(encode, pixels[encoder.input_px])
        for encode, (_, encoder, _, _) in zip(encoders, rows, strict=True)
    ]
    for encode in work:
        encode()  # compiled, cached, allocated
    seconds: list[list[float]] = [[] for _ in rows]
    rates = []
    for _ in range(rounds):
        rates.append(matrix_product_rate(rows[0][1].device, rows[0][1].precision))
        for taken, encode in zip(seconds, work, strict=True):
            taken.append(_clock(encode, rows[0][1].device))
    rate = statistics.median(rates)
    timings = []
    for (name, encoder, patches, paper), cost, taken in zip(rows, gflops, seconds, strict=True):
        median = statistics.median(taken)
        share = cost * 1e9 * sample / median / rate
        size = sum(parameter.numel() for parameter in encoder.model.parameters()) / 1e6
        timings.append(EncoderTiming(name, size, cost, sample, median, patches, paper, share))
    return timings, rate


def paper_rows(device: torch.device, precision: str) -> list[tuple[str, Encoder, int, float]]:
    """The paper's three encoders with random weights, which cost what trained ones do."""
    rows = []
    for name, key, patches, seconds in PAPER:
        if key in ENCODERS:
            encoder = build_architecture(ENCODERS[key], device)
            encoder.precision = precision
        else:
            encoder = load_encoder(key, device=device, precision=precision)
        rows.append((name, encoder, patches, seconds))
    return rows


def flops_per_patch(encoder: Encoder) -> int:
    """Floating-point operations of one patch, two for a multiplication with its addition.

    Matrix products, convolutions and attention as torch's counter sees them.
    """
    images = torch.zeros(
        1, 3, encoder.input_px, encoder.input_px, dtype=torch.uint8, device=encoder.device
    )
    with FlopCounterMode(display=False) as counter:
        encoder(images)
    return counter.get_total_flops()


def matrix_product_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of some square matrix products, at the precision of an encoder."""
    kind = device.type if device.type in MATRIX_SIDES else "cpu"
    best = 0.0
    for side in MATRIX_SIDES[kind]:
        a, b = (
            torch.randn(side, side, device=device, dtype=PRECISIONS[precision]) for _ in range(2)
        )
        seconds = min(_clock(lambda a=a, b=b: a @ b, device) for _ in range(3))
        best = max(best, 2 * side**3 / seconds)
    return best


def machine() -> dict[str, Any]:
    """What the figures belong to: processor, cores, threads, GPU, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "versions": versions(PACKAGES),
    }


def _timing(name: str, summary: RunSummary, wall: float) -> PassTiming:
    done = [record for record in summary.records if record.status == "ok"]
    if not done:
        reasons = "; ".join(record.reason for record in summary.records[:3])
        raise EmbedError(f"No slide could be embedded: {reasons}")
    return PassTiming(
        name=name,
        slides=len(done),
        patches=sum(record.patches for record in done),
        wall_seconds=wall,
        stages={
            stage: sum(record.seconds[stage] for record in done) / len(done) for stage in STAGES
        },
        records=tuple(
            (record.slide_id, record.status, record.patches, dict(record.seconds))
            for record in summary.records
        ),
    )


def _forget(path: Path) -> None:
    """Ask the kernel to drop a file from its cache."""
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())  # only clean pages can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _clock(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

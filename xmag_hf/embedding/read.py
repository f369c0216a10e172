"""Second stage: the pixels of a plan's patches, in batches, decoded ahead in threads.

`read_patches` is the reader for everything that OpenSlide opens. Another reader is another function
of the same arguments and results.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from xmag_hf.slides import Slide, SlideReadError, resample
from xmag_hf.slides.tissue import MASK_MPP

from .plan import SlidePlan
from .sources import IMAGE_VENDOR, open_source

READER = "openslide-region-lanczos"  # recorded with every bag
RUN = 8  # neighbours in a row that one thread reads: they share tiles in its cache


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """Some patches of a plan, in its order.

    Attributes:
        rows: (B,) int64, which of the plan's coords.
        pixels: (B, input_px, input_px, 3) uint8 RGB.
        unreadable: (row, reason) of patches that could not be decoded.
        seconds: Spent reading, summed over threads.
    """

    rows: np.ndarray
    pixels: np.ndarray
    unreadable: tuple[tuple[int, str], ...]
    seconds: float


def read_patches(plan: SlidePlan, *, batch_size: int, threads: int = 1) -> Iterator[PatchBatch]:
    """Patches of a slide, in the order of the plan.

    A patch that cannot be decoded is left out and named; one where the overview had a gap and that
    turns out to hold too little tissue is left out. Never more than two runs a thread and two
    batches are in memory.

    Args:
        plan: Of the slide.
        batch_size: Patches a batch; the last may be smaller.
        threads: That decode; each opens the slide for itself.

    Yields:
        Batches of at least one patch or one unreadable patch.

    Raises:
        SlideError: The slide cannot be opened any more.
    """
    # A plain image lies decoded in memory: a second thread would hold it twice.
    threads = 1 if plan.vendor == IMAGE_VENDOR else min(threads, max(1, len(plan.coords)))
    slides = _Slides(plan)
    runs = iter(range(0, len(plan.coords), RUN))
    waiting: deque[Future[PatchBatch]] = deque()
    held: list[PatchBatch] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        while True:
            while len(waiting) < 2 * threads and (start := next(runs, None)) is not None:
                rows = np.arange(start, min(start + RUN, len(plan.coords)))
                waiting.append(pool.submit(_read_run, plan, slides, rows))
            if not waiting:
                break
            held.append(waiting.popleft().result())
            while sum(len(part.rows) for part in held) >= batch_size:
                batch, rest = _split(_join(held), batch_size)
                held = [rest]
                yield batch
        if held and (len((last := _join(held)).rows) or last.unreadable):
            yield last
    finally:
        pool.shutdown(cancel_futures=True)
        slides.close()


class _Slides:
    """One open slide a thread."""

    def __init__(self, plan: SlidePlan):
        self._plan = plan
        self._local = threading.local()
        self._all: list[Slide] = []
        self._lock = threading.Lock()

    def get(self) -> Slide:
        slide = getattr(self._local, "slide", None)
        if slide is None:
            source = self._plan.source
            slide = open_source(source.path, self._plan.mpp0, slide_id=source.slide_id)
            self._local.slide = slide
            with self._lock:
                self._all.append(slide)
        return slide

    def close(self) -> None:
        for slide in self._all:
            slide.close()


def _read_run(plan: SlidePlan, slides: _Slides, rows: np.ndarray) -> PatchBatch:
    started = time.perf_counter()
    geometry, slide = plan.geometry, slides.get()
    inset = geometry.inset_px * geometry.mpp / plan.mpp0
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    unreadable: list[tuple[int, str]] = []
    for row in rows:
        x, y = plan.coords[row]
        try:
            patch = slide.read_region(
                (x + inset, y + inset),
                geometry.input_px,
                geometry.input_mpp,
                allow_coarse=plan.allow_coarse,
            )
        except SlideReadError as error:
            unreadable.append((int(row), str(error)))
            continue
        if plan.uncertain[row]:
            share = _coloured_share(patch, geometry.input_mpp, plan.saturation)
            if share < plan.least_tissue or share == 0:
                continue
        pixels.append(patch)
        kept.append(int(row))
    return PatchBatch(
        np.asarray(kept, dtype=np.int64),
        np.stack(pixels) if pixels else _no_pixels(geometry.input_px),
        tuple(unreadable),
        time.perf_counter() - started,
    )


def _coloured_share(patch: np.ndarray, mpp: float, saturation: float) -> float:
    """Share of a patch that is as coloured as the slide's tissue, at the overview's scale.

    The rule of the overview without its sizes of objects and holes, which a patch cannot show.
    """
    side = max(1, round(patch.shape[0] * mpp / MASK_MPP))
    small = resample(patch, (side, side), (0, 0, patch.shape[1], patch.shape[0])).astype(np.float32)
    value = small.max(axis=2)
    coloured = value - small.min(axis=2) > saturation * np.maximum(value, 1.0)
    return float(coloured.mean())


def _no_pixels(input_px: int) -> np.ndarray:
    return np.empty((0, input_px, input_px, 3), np.uint8)


def _join(parts: list[PatchBatch]) -> PatchBatch:
    if len(parts) == 1:
        return parts[0]
    return PatchBatch(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.pixels for part in parts]),
        tuple(entry for part in parts for entry in part.unreadable),
        sum(part.seconds for part in parts),
    )


def _split(batch: PatchBatch, at: int) -> tuple[PatchBatch, PatchBatch]:
    first = PatchBatch(batch.rows[:at], batch.pixels[:at], batch.unreadable, batch.seconds)
    return first, PatchBatch(batch.rows[at:], batch.pixels[at:], (), 0.0)

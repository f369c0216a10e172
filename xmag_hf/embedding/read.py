"""Second stage: the pixels of a plan's patches, in batches, decoded ahead in threads.

Whatever decodes them, patches pass through windows of one size (`xmag_hf.slides.windows`), which
are resampled on the encoder's device: by Pillow on a CPU, by matrix products on a GPU. Windows are
filled from JPEG tiles, each decoded once, where the plan has them, and else by OpenSlide; so is a
window one of whose tiles is absent or does not decode, and if OpenSlide cannot either, the patch is
unreadable.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmag_hf.slides import Slide, SlideReadError, resample
from xmag_hf.slides.jpeg_tiles import TileStore
from xmag_hf.slides.tissue import MASK_MPP
from xmag_hf.slides.windows import fill_from_slide

from .plan import SlidePlan
from .resampling import Resampler, concatenated, selected
from .sources import IMAGE_VENDOR, open_source

RUN = 8  # neighbours in a row that one thread reads: they share tiles


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """Some patches of a plan, in its order.

    Attributes:
        rows: (B,) int64, which of the plan's coords.
        pixels: (B, input_px, input_px, 3) uint8 RGB; a tensor if they lie on a GPU.
        unreadable: (row, reason) of patches that could not be decoded.
        seconds: Spent reading and resampling, summed over threads.
        resample_seconds: Of these, in resampling, with the way to the device.
    """

    rows: np.ndarray
    pixels: np.ndarray | Tensor
    unreadable: tuple[tuple[int, str], ...]
    seconds: float
    resample_seconds: float


def read_patches(
    plan: SlidePlan,
    *,
    batch_size: int,
    threads: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[PatchBatch]:
    """Patches of a slide, in the order of the plan.

    A patch that cannot be decoded is left out and named; one where the overview had a gap and that
    turns out to hold too little tissue is left out. Never more than two runs a thread, two batches,
    and the tiles between the first and the last run that share one are in memory.

    Args:
        plan: Of the slide.
        batch_size: Patches a batch; the last may be smaller.
        threads: That decode; each opens the slide for itself.
        device: Where patches are resampled, and stay if it is a GPU.

    Yields:
        Batches of at least one patch or one unreadable patch.

    Raises:
        SlideError: The slide cannot be opened any more.
    """
    # A plain image lies decoded in memory: a second thread would hold it twice.
    threads = 1 if plan.vendor == IMAGE_VENDOR else min(threads, max(1, len(plan.coords)))
    waiting: deque[Future[PatchBatch]] = deque()
    held: list[PatchBatch] = []
    if not len(plan.coords):
        return
    reading = _Reading(plan, torch.device(device))
    runs = iter(range(len(reading.runs)))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        while True:
            while len(waiting) < 2 * threads and (run := next(runs, None)) is not None:
                waiting.append(pool.submit(reading.read, run))
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
        reading.close()


class _Reading:
    """What the threads that read a slide share: geometry, tiles, and each its own open files."""

    def __init__(self, plan: SlidePlan, device: torch.device):
        self._plan = plan
        self._local = threading.local()
        self._slides: list[Slide] = []
        n = len(plan.coords)
        self.runs = [np.arange(start, min(start + RUN, n)) for start in range(0, n, RUN)]
        self._resampler = Resampler(device, plan.geometry.input_px)
        self._tiles = None
        if (jpeg := plan.tiles) is not None:
            needs = [
                np.unique(
                    np.concatenate([jpeg.tiles_of(*plan.window(row)) for row in run.tolist()])
                )
                for run in self.runs
            ]
            self._tiles = TileStore(jpeg, needs)

    def read(self, run: int) -> PatchBatch:
        """Patches of a run; no two threads read the same."""
        started = time.perf_counter()
        if self._tiles is not None:
            self._tiles.prepare(run)  # first: other threads wait for it, whatever fails later
        windows = self._mine("windows", self._buffer)
        kept: list[int] = []
        unreadable: list[tuple[int, str]] = []
        patches: list[np.ndarray | Tensor] = []
        resampling = 0.0
        rows = self.runs[run].tolist()
        for group in [rows[k : k + len(windows)] for k in range(0, len(rows), len(windows))]:
            good = self._fill_group(windows, group, unreadable)
            filled = time.perf_counter()
            places = [self._plan.window(row) for row in good]
            patches.append(self._resampler(windows[: len(good)], places))
            resampling += time.perf_counter() - filled
            kept += good
        if self._tiles is not None:
            self._tiles.release(run)
        pixels = concatenated(patches)
        kept_rows, pixels = self._coloured(np.asarray(kept, dtype=np.int64), pixels)
        seconds = time.perf_counter() - started
        return PatchBatch(kept_rows, pixels, tuple(unreadable), seconds, resampling)

    def close(self) -> None:
        """Close all files; no thread reads any more."""
        for slide in self._slides:
            slide.close()
        if self._tiles is not None:
            self._tiles.close()

    def _fill_group(
        self, windows: np.ndarray, rows: list[int], unreadable: list[tuple[int, str]]
    ) -> list[int]:
        """Fill one window after the other; returns the rows that they hold."""
        plan, good = self._plan, []
        for row in rows:
            window, (across, down) = windows[len(good)], plan.window(row)
            try:
                if self._tiles is None or not self._tiles.fill(window, across, down):
                    slide = self._mine("slide", self._slide)
                    fill_from_slide(window, slide, plan.level, across, down)
            except SlideReadError as error:
                unreadable.append((row, str(error)))
                continue
            good.append(row)
        return good

    def _coloured(
        self, rows: np.ndarray, pixels: np.ndarray | Tensor
    ) -> tuple[np.ndarray, np.ndarray | Tensor]:
        """Without the uncertain patches that hold too little tissue."""
        plan = self._plan
        good = np.ones(len(rows), dtype=bool)
        for i in np.flatnonzero(plan.uncertain[rows]):
            patch = pixels[i].cpu().numpy() if isinstance(pixels, Tensor) else pixels[i]
            share = _coloured_share(patch, plan.geometry.input_mpp, plan.saturation)
            good[i] = share >= plan.least_tissue and share > 0
        return (rows, pixels) if good.all() else (rows[good], selected(pixels, good))

    def _mine(self, name: str, make: Callable[[], Any]) -> Any:
        """This thread's own."""
        if not hasattr(self._local, name):
            setattr(self._local, name, make())
        return getattr(self._local, name)

    def _slide(self) -> Slide:
        source = self._plan.source
        slide = open_source(source.path, self._plan.mpp0, slide_id=source.slide_id)
        self._slides.append(slide)
        return slide

    def _buffer(self) -> np.ndarray:
        across, down = self._plan.window(0)
        return self._resampler.buffer(RUN, (down.side, across.side, 3))


def _coloured_share(patch: np.ndarray, mpp: float, saturation: float) -> float:
    """Share of a patch that is as coloured as the slide's tissue, at the overview's scale.

    The rule of the overview without its sizes of objects and holes, which a patch cannot show.
    """
    side = max(1, round(patch.shape[0] * mpp / MASK_MPP))
    small = resample(patch, (side, side), (0, 0, patch.shape[1], patch.shape[0])).astype(np.float32)
    value = small.max(axis=2)
    coloured = value - small.min(axis=2) > saturation * np.maximum(value, 1.0)
    return float(coloured.mean())


def _join(parts: list[PatchBatch]) -> PatchBatch:
    if len(parts) == 1:
        return parts[0]
    return PatchBatch(
        np.concatenate([part.rows for part in parts]),
        concatenated([part.pixels for part in parts]),
        tuple(entry for part in parts for entry in part.unreadable),
        sum(part.seconds for part in parts),
        sum(part.resample_seconds for part in parts),
    )


def _split(batch: PatchBatch, at: int) -> tuple[PatchBatch, PatchBatch]:
    first = PatchBatch(
        batch.rows[:at],
        batch.pixels[:at],
        batch.unreadable,
        batch.seconds,
        batch.resample_seconds,
    )
    return first, PatchBatch(batch.rows[at:], batch.pixels[at:], (), 0.0, 0.0)

"""Several devices of one machine: a process on each, which take the next slide as they get free."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xmag_hf.child_process import begin_child

from .options import EmbedError, EmbedOptions
from .records import SlideRecord
from .run import EmbedState, Progress, start_run
from .sources import SlideSource

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _News:
    """What a process tells: where it stands, and slides that it is done with."""

    process: int
    state: EmbedState
    records: tuple[SlideRecord, ...] = ()
    facts: dict[str, Any] | None = None


def run_on_devices(
    sources: Sequence[SlideSource],
    out_dir: Path,
    encoder: str,
    options: EmbedOptions,
    devices: Sequence[str],
    records: dict[str, SlideRecord],
    facts: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> None:
    """Embed slides by one process a device.

    Args:
        sources: The slides.
        out_dir: Gets the bags and previews, no summary.
        encoder: A name for `load_encoder`; each process loads it.
        options: Of the run.
        devices: torch's names; one may stand there several times (processes on a CPU).
        records: Gets one a slide, also when this raises.
        facts: Gets what the summary says about the run.
        progress: Called a few times a second.

    Raises:
        EmbedError: As `embed_slides`; or a process died: names the slides that are not done.
        EncoderError, OSError: As `embed_slides`; the other processes end after their slide.
    """
    context = multiprocessing.get_context("spawn")  # a forked process has no usable GPU
    taken = context.Value("q", 0)  # slides that somebody took
    news: multiprocessing.Queue[_News] = context.Queue()
    states: dict[int, EmbedState] = {}

    def listen() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                _hear(news.get_nowait(), states, records, facts)

    def show() -> None:
        if progress is not None and states:
            progress(_summed(len(sources), states))

    level = logging.getLogger("xmag_hf").getEffectiveLevel()
    pool = concurrent.futures.ProcessPoolExecutor(
        len(devices), context, _start_process, (taken, news, _threads_each(devices), level)
    )
    works: list[concurrent.futures.Future[_News]] = []
    try:
        for number, device in enumerate(devices):
            own = replace(options, device=device)
            works.append(pool.submit(_work, number, list(sources), out_dir, encoder, own))
        pending = set(works)
        while pending:
            done, pending = concurrent.futures.wait(pending, POLL_SECONDS)
            listen()
            for work in done:
                _hear(work.result(), states, records, facts)
            show()
    except BrokenProcessPool as error:
        listen()
        raise EmbedError(_died(sources, out_dir, devices, records)) from error
    except BaseException:
        taken.value = len(sources)  # the others end after the slides they have
        raise
    finally:
        _join(pool, listen)
        for work in works:  # once more, as the queue may have held older news
            if work.exception() is None:
                _hear(work.result(), states, records, facts)
        if facts:
            facts["device"] = ",".join(devices)
            facts["options"]["device"] = options.device
    show()


def _join(pool: concurrent.futures.ProcessPoolExecutor, listen: Callable[[], None]) -> None:
    """Wait for the processes to end; each ends only when all that it told has been heard."""
    closing = threading.Thread(target=pool.shutdown)
    closing.start()
    while closing.is_alive():
        listen()
        closing.join(POLL_SECONDS)
    listen()


def _died(
    sources: Sequence[SlideSource],
    out_dir: Path,
    devices: Sequence[str],
    records: dict[str, SlideRecord],
) -> str:
    """What to tell when a process is gone without a word."""
    left = [
        source.slide_id
        for source in sources
        if source.slide_id not in records and not (out_dir / f"{source.slide_id}.h5").exists()
    ]
    return (
        f"A process on one of {', '.join(devices)} died (killed, out of host memory, or started "
        'from a program without `if __name__ == "__main__":`); '
        f"{len(left)} of {len(sources)} slides are not done: {', '.join(left[:5])}"
        f"{', ...' if len(left) > 5 else ''}. Finished bags stay; run the command again."
    )


def _hear(
    told: _News,
    states: dict[int, EmbedState],
    records: dict[str, SlideRecord],
    facts: dict[str, Any],
) -> None:
    states[told.process] = told.state
    records.update({record.slide_id: record for record in told.records})
    facts.update(told.facts or {})


def _summed(slides: int, states: dict[int, EmbedState]) -> EmbedState:
    return EmbedState(
        slides,
        sum(state.slides_done for state in states.values()),
        sum(state.patches for state in states.values()),
        sum(state.share for state in states.values()),
    )


def _threads_each(devices: Sequence[str]) -> int:
    """Threads for the network of each process: processes on the CPU share its cores."""
    on_cpu = sum(device.startswith("cpu") for device in devices)
    return max(1, torch.get_num_threads() // max(1, on_cpu))


# --- in the processes ---------------------------------------------------------------------------

_shared: tuple[Any, Any] = (None, None)  # the counter of taken slides, and the queue of news


def _start_process(taken: Any, news: Any, threads: int, log_level: int) -> None:
    global _shared  # noqa: PLW0603 - what a pool's initializer is for
    _shared = taken, news
    begin_child(threads, log_level)


def _work(
    number: int, sources: list[SlideSource], out_dir: Path, encoder: str, options: EmbedOptions
) -> _News:
    """Take slides until there is none; returns all that became of them."""
    taken, news = _shared
    told, when = 0, 0.0

    def tell(state: EmbedState) -> None:
        nonlocal told, when
        if time.monotonic() < when + POLL_SECONDS:
            return
        fresh = tuple(run.records.values())[told:]
        told, when = state.slides_done, time.monotonic()
        news.put(_News(number, replace(state), fresh))

    run = start_run(out_dir, encoder, options, tell)  # how many slides there are, the parent knows
    news.put(_News(number, run.state, (), run.facts()))
    try:
        run.finish(_taken_in_turn(sources, taken))
    except BaseException:  # which carries no records
        news.put(_News(number, run.state, tuple(run.records.values())))
        raise
    return _News(number, run.state, tuple(run.records.values()), run.facts())


def _taken_in_turn(sources: list[SlideSource], taken: Any) -> Iterator[SlideSource]:
    """The next slide that no other process took, until there is none."""
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value = number + 1
        if number >= len(sources):
            return
        yield sources[number]

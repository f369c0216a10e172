"""Several devices share out the slides; two processes on the CPU stand for two GPUs."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from process_state import process_runs
from tiled_tiff import write_tiff

from xmag_hf.embedding import (
    EmbedError,
    EmbedOptions,
    SlideSource,
    devices,
    embed_slides,
    read_bag,
)

ENCODER = "random:lite"
OPTIONS = EmbedOptions(threads=1, batch_size=4, preview=False, device="cpu", features="float32")
TWO = EmbedOptions(threads=1, batch_size=4, preview=False, device="cpu,cpu", features="float32")


# begin_child is called by a pool's initializer; then the parent kills itself.
ORPHAN = """
import concurrent.futures, multiprocessing, os, signal, time
from xmag_hf.child_process import begin_child
context = multiprocessing.get_context("spawn")
pool = concurrent.futures.ProcessPoolExecutor(1, context, begin_child, (1,))
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 600)
os.kill(os.getpid(), signal.SIGKILL)
"""


# Two processes that end while most of what they told is unheard: more than a pipe holds.
TALKERS = """
from pathlib import Path
from xmag_hf.embedding import EmbedOptions, SlideSource, devices
from xmag_hf.embedding.records import SlideRecord
from xmag_hf.embedding.run import EmbedState

def work(number, sources, *others):
    records = [SlideRecord(source.slide_id, "", "x" * 500) for source in sources[number::2]]
    for done, record in enumerate(records):
        devices._shared[1].put(devices._News(number, EmbedState(0, done), (record,)))
    return devices._News(number, EmbedState(0, len(records)), tuple(records), {"options": {}})

if __name__ == "__main__":
    devices._work = work
    sources, records, states = [SlideSource(Path(f"{n}.svs")) for n in range(6000)], {}, []
    devices.run_on_devices(
        sources, Path("."), "", EmbedOptions(), ["cpu", "cpu"], records, {}, progress=states.append
    )
    print(len(records), states[-1].slides_done)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tissue) -> list[SlideSource]:
    folder = tmp_path_factory.mktemp("slides")
    paths = [
        write_tiff(folder / f"s{number}.tif", [tissue[top : top + 900, :900]], mpp=1.0)
        for number, top in enumerate(range(0, 100, 25))
    ]
    broken = folder / "broken.tif"
    broken.write_bytes(paths[0].read_bytes()[:5000])
    return [SlideSource(path) for path in [paths[0], broken, *paths[1:]]]


def test_slides_are_shared_out_and_each_is_done_once(tmp_path, sources):
    states = []
    together = embed_slides(sources, tmp_path / "two", ENCODER, TWO, progress=states.append)
    alone = embed_slides(sources, tmp_path / "one", ENCODER, OPTIONS)
    assert [r.slide_id for r in together.records] == [source.slide_id for source in sources]
    assert [r.status for r in together.records] == ["ok", "failed", "ok", "ok", "ok"]
    assert "broken" in together.records[1].reason
    for record, expected in zip(together.records, alone.records, strict=True):
        assert (record.patches, record.reason) == (expected.patches, expected.reason)
        if record.bag:
            a, b = read_bag(tmp_path / "two" / record.bag), read_bag(tmp_path / "one" / record.bag)
            assert (a.coords == b.coords).all()
            assert np.allclose(a.features, b.features, atol=1e-4)
    assert (states[-1].slides, states[-1].slides_done) == (5, 5)
    assert states[-1].patches == sum(record.patches for record in together.records)
    said = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (said["device"], said["slides"]) == ("cpu,cpu", {"ok": 4, "failed": 1})
    assert not list((tmp_path / "two" / ".locks").iterdir())


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_run_goes_on_later(tmp_path, sources):
    killed = []

    def kill_one(state):
        if not killed and state.slides_done:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(EmbedError, match=r"died .* of 5 slides are not done") as error:
        embed_slides(sources, tmp_path, ENCODER, TWO, progress=kill_one)
    bags = {path.stem for path in tmp_path.glob("*.h5")}
    assert not any(f" {name}" in str(error.value) for name in bags)
    again = embed_slides(sources, tmp_path, ENCODER, OPTIONS)
    assert again.counts.get("present", 0) == len(bags)
    assert again.counts["failed"] == 1
    assert sum(again.counts.values()) == 5


def test_what_one_process_raises_ends_the_others_after_their_slide(tmp_path, sources):
    """torch knows the name; that there is no such device is found out in the process."""
    options = dataclasses.replace(TWO, device="cpu,cuda:99")
    with pytest.raises(EmbedError, match="--device cuda:99"):
        embed_slides(sources, tmp_path, ENCODER, options)
    assert not multiprocessing.active_children()
    assert not list((tmp_path / ".locks").glob("*"))


def test_a_process_ends_with_its_parent():
    """The parent is killed while its child sleeps."""
    parent = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=120
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    child = int(parent.stdout)
    deadline = time.monotonic() + 30
    while process_runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not process_runs(child)


def test_it_ends_when_processes_have_told_more_than_a_pipe_holds(tmp_path):
    script = tmp_path / "talkers.py"
    script.write_text(TALKERS)
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=180
    )
    assert ended.stdout.split() == ["6000", "6000"], ended.stderr


def test_a_process_tells_a_few_times_a_second(tmp_path, encoder, monkeypatch):
    """However fast slides are settled: the records come whole at its end."""
    taken, news = multiprocessing.get_context("spawn").Value("q", 0), queue.Queue()
    monkeypatch.setattr(devices, "_shared", (taken, news))
    absent = [SlideSource(tmp_path / f"absent{number}.svs") for number in range(200)]
    began = time.monotonic()
    last = devices._work(0, absent, tmp_path, encoder, OPTIONS)
    passed = time.monotonic() - began
    assert [record.slide_id for record in last.records] == [source.slide_id for source in absent]
    told = [news.get_nowait() for _ in range(news.qsize())]
    assert len(told) <= passed / devices.POLL_SECONDS + 2
    names = [record.slide_id for one in told for record in one.records]
    assert names == [source.slide_id for source in absent][: len(names)]  # each once, in order


def test_one_slide_takes_the_first_device(tmp_path, sources):
    summary = embed_slides(sources[:1], tmp_path, ENCODER, TWO)
    assert (summary.facts["device"], summary.counts) == ("cpu", {"ok": 1})

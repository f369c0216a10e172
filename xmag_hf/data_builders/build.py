"""Build a paired corpus: plan, slides one by one (in processes), shards, manifest, card.

Work lies in `DIR.partial/` until everything is there; a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from xmag_hf.atomic_write import remove_drafts, write_atomically
from xmag_hf.child_process import end_with_parent
from xmag_hf.lock import only_writer
from xmag_hf.reporting.records import versions
from xmag_hf.slides import sha256_head

from .card import write_card
from .corpus_options import (
    FORMAT_VERSION,
    REGION_PX,
    TEACHER_MPP,
    CorpusError,
    CorpusOptions,
    corpus_fingerprint,
)
from .pairs import SlideRecord, write_slide
from .slide_list import SlideRow, absolute, check_unique

logger = logging.getLogger(__name__)

PACKAGES = ("numpy", "pillow", "openslide-python", "openslide-bin", "pyarrow", "datasets", "scipy")
DONE_STATUSES = ("ok", "no_tissue")  # not tried again when a run goes on
POLL_SECONDS = 0.2

Progress = Callable[["BuildState"], None]


@dataclass
class BuildState:
    """Where a build stands, for progress bars.

    Attributes:
        slides: Slides in all.
        slides_done: Finished, whatever their status.
        share: Slides done, with the started ones counted in part.
        regions: Regions read in this run.
    """

    slides: int
    slides_done: int = 0
    share: float = 0.0
    regions: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds.

    Attributes:
        path: Its folder.
        fingerprint: See `corpus_fingerprint`.
        records: One a slide, in the order given.
        already_done: True if nothing had to be built.
    """

    path: Path
    fingerprint: str
    records: tuple[SlideRecord, ...]
    already_done: bool = False

    @property
    def pairs(self) -> int:
        """Number of rows."""
        return sum(record.pairs for record in self.records)

    @property
    def problems(self) -> list[SlideRecord]:
        """Slides that could not be used, or not wholly: failed, refused, or with bad regions."""
        return [r for r in self.records if r.status in ("failed", "refused") or r.unreadable]


def build_corpus(
    slides: Sequence[SlideRow],
    out_dir: str | Path,
    options: CorpusOptions | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> CorpusSummary:
    """Build a paired corpus from slides, or go on with one.

    Rows, shards and fingerprint depend on slides and options only, not on `workers` or on how
    often the run was killed.

    Args:
        slides: In the order of the corpus.
        out_dir: Appears when everything is done; `out_dir.partial` holds the work until then.
        options: Default `CorpusOptions()`.
        workers: Processes. 1 works in this process, and then a crash of a decoder ends the run;
            from 2 on it costs only its slide. From 2 on a script needs `if __name__ ==
            "__main__"`.
        progress: Called often with the state.

    Returns:
        The summary; slides that failed are in it, not raised.

    Raises:
        CorpusError: No slides, slide_ids given twice, or `out_dir` (or its partial) is of other
            slides or options; what differs is named. Or another process builds it.
        OSError: The output cannot be written.
    """
    options = options or CorpusOptions()
    check_unique(slides)
    if workers < 1:
        raise CorpusError(f"workers={workers}: it must be at least 1.")
    rows = [absolute(row) for row in slides]
    heads = [_head(row) for row in rows]
    fingerprint = corpus_fingerprint(
        options,
        [(row.slide_id, row.mpp, head) for row, head in zip(rows, heads, strict=True)],
    )
    out_dir = Path(out_dir)
    if out_dir.exists():
        return _finished_corpus(out_dir, options, fingerprint, rows)
    with only_writer(out_dir.resolve(), CorpusError):
        if out_dir.exists():  # by whoever had the lock until now
            return _finished_corpus(out_dir, options, fingerprint, rows)
        records = _built(out_dir, rows, heads, options, fingerprint, workers, progress)
    return CorpusSummary(out_dir, fingerprint, tuple(records))


def _built(
    out_dir: Path,
    rows: Sequence[SlideRow],
    heads: Sequence[str | None],
    options: CorpusOptions,
    fingerprint: str,
    workers: int,
    progress: Progress | None,
) -> list[SlideRecord]:
    """Records of the corpus, which is complete in its folder afterwards."""
    from .features import corpus_features  # `datasets` takes a second to import

    partial = out_dir.with_name(out_dir.name + ".partial")
    parts = _prepare_partial(partial, options)
    schema = corpus_features(options).arrow_schema
    tasks = [
        _Task(i, row, head, options, schema, parts, _part_key(row.slide_id))
        for i, (row, head) in enumerate(zip(rows, heads, strict=True))
    ]
    records = _run(tasks, workers, progress)
    _finish(partial, options, fingerprint, records)
    for name in ("options.json", "shards.json", "manifest.jsonl", "corpus.json", "README.md"):
        remove_drafts(partial / name)  # what killed runs left
    partial.replace(out_dir)
    for name in ("options.json", "shards.json"):  # after the rename: a kill here loses nothing
        (out_dir / name).unlink()
    shutil.rmtree(out_dir / "parts")
    return records


# --- resume -----------------------------------------------------------------------------------


def _finished_corpus(
    out_dir: Path, options: CorpusOptions, fingerprint: str, rows: Sequence[SlideRow]
) -> CorpusSummary:
    """The summary of a complete corpus, if it is the one asked for."""
    described = out_dir / "corpus.json"
    if not described.is_file():
        raise CorpusError(f"{out_dir} exists and is no corpus. Choose another --out.")
    found = json.loads(described.read_text(encoding="utf-8"))
    if found.get("fingerprint") == fingerprint:
        lines = (out_dir / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        records = tuple(_record_from(json.loads(line)) for line in lines)
        _refuse_other_metadata(out_dir, records, rows)
        return CorpusSummary(out_dir, fingerprint, records, already_done=True)
    differing = _differences(found.get("options", {}), asdict(options)) or "other slides"
    raise CorpusError(
        f"{out_dir} is complete, but not this corpus: {differing}. Choose another --out, or "
        "remove it."
    )


def _refuse_other_metadata(
    out_dir: Path, records: Sequence[SlideRecord], rows: Sequence[SlideRow]
) -> None:
    """A corrected patient or cancer type must not be taken for done: splits go by it."""
    for record, row in zip(records, rows, strict=True):
        for name in ("patient_id", "cancer_type", "source"):
            there, asked = getattr(record, name), getattr(row, name)
            if there != asked:
                raise CorpusError(
                    f"{out_dir} is complete, but {row.slide_id} has {name} {there!r} there, "
                    f"{asked!r} asked for. Choose another --out, or remove it."
                )


def _prepare_partial(partial: Path, options: CorpusOptions) -> Path:
    """The folder of parts, after checking that an earlier run had the same options."""
    parts = partial / "parts"
    state = partial / "options.json"
    mine = {"format_version": FORMAT_VERSION, **asdict(options)}
    if state.is_file():
        differing = _differences(json.loads(state.read_text(encoding="utf-8")), mine)
        if differing:
            raise CorpusError(
                f"{partial} was begun with other options: {differing}. Go on with those, choose "
                "another --out, or remove it."
            )
    elif partial.exists() and any(partial.iterdir()):
        raise CorpusError(f"{partial} exists and is no begun corpus. Choose another --out.")
    parts.mkdir(parents=True, exist_ok=True)
    write_atomically(state, json.dumps(mine, indent=1))
    _take_back_shards(partial)
    return parts


def _take_back_shards(partial: Path) -> None:
    """Undo the naming of shards that a kill cut short: the slides may be others this time."""
    plan = partial / "shards.json"
    if plan.is_file():
        for shard, part in json.loads(plan.read_text(encoding="utf-8")).items():
            if (partial / shard).exists():
                (partial / shard).replace(partial / "parts" / part)
        plan.unlink()


def _finished_slide(task: _Task) -> SlideRecord | None:
    """The record of an earlier run, if slide and metadata are still the same."""
    try:
        text = (task.folder / f"{task.key}.json").read_text(encoding="utf-8")
        record = _record_from(json.loads(text))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    fresh = SlideRecord.of(task.row, task.head)
    same = all(
        getattr(record, name) == getattr(fresh, name)
        for name in ("slide_id", "patient_id", "cancer_type", "source", "slide_sha256_head")
    )
    complete = all((task.folder / name).is_file() for name, _ in record.parts)
    if not (same and complete and record.status in DONE_STATUSES):
        return None
    if record.mpp_given != task.row.mpp:
        return None
    record.path, record.extra = fresh.path, fresh.extra
    return record


def _record_from(line: dict[str, Any]) -> SlideRecord:
    names = set(SlideRecord.__dataclass_fields__)
    record = SlideRecord(**{key: value for key, value in line.items() if key in names})
    for name in ("size_level0", "grid_xy", "extent_xy"):
        value = getattr(record, name)
        setattr(record, name, tuple(value) if value is not None else None)
    record.parts = [(name, rows) for name, rows in record.parts]
    return record


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    theirs = asdict(CorpusOptions()) | theirs  # an option that did not exist then had its default
    return ", ".join(
        f"{key} {theirs.get(key)!r} there, {value!r} asked for"
        for key, value in mine.items()
        if theirs.get(key, value) != value
    )


def _head(row: SlideRow) -> str | None:
    try:
        return sha256_head(row.path)
    except OSError:
        return None  # the worker says what is wrong with the file


def _part_key(slide_id: str) -> str:
    """A file name that any slide_id can have (slashes, 'test', 300 characters)."""
    return hashlib.sha256(slide_id.encode()).hexdigest()[:24]


# --- work -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    index: int
    row: SlideRow
    head: str | None
    options: CorpusOptions
    schema: pa.Schema
    folder: Path
    key: str


# (regions done, regions to do) of each slide, shared without a lock: a killed worker cannot keep
# it locked, and a torn count only makes a progress bar wrong for a moment.
_counts: Any = None


def _start_worker(counts: Any) -> None:
    global _counts  # noqa: PLW0603 - the one way to hand shared memory to a pool's workers
    _counts = counts
    end_with_parent()


def _work(task: _Task) -> SlideRecord:
    def report(done: int, to_do: int) -> None:
        if _counts is not None:
            _counts[2 * task.index], _counts[2 * task.index + 1] = done, to_do

    return write_slide(
        task.row, task.head, task.options, task.schema, task.folder, task.key, report
    )


def _run(tasks: list[_Task], workers: int, progress: Progress | None) -> list[SlideRecord]:
    """Records of all tasks, in their order."""
    records: dict[int, SlideRecord] = {}
    for task in tasks:
        record = _finished_slide(task)
        if record is not None:
            records[task.index] = record
    if records:
        logger.info("%d of %d slides were finished earlier", len(records), len(tasks))
    todo = [task for task in tasks if task.index not in records]
    watch = _Watch(tasks, records, progress)
    if workers == 1 or not todo:
        for task in todo:
            records[task.index] = write_slide(
                task.row,
                task.head,
                task.options,
                task.schema,
                task.folder,
                task.key,
                watch.report(task),
            )
            watch.show()
    else:
        _run_pools(todo, min(workers, len(todo)), records, watch)
    watch.show()
    return [records[task.index] for task in tasks]


def _run_pools(
    todo: list[_Task], workers: int, records: dict[int, SlideRecord], watch: _Watch
) -> None:
    """Work through `todo`; a worker that dies costs only the slide that kills it.

    A dead worker breaks the whole pool and does not say which slide it had. So those in flight are
    tried again one at a time, each in a pool of its own: the one that breaks that is to blame.
    """
    while todo:
        suspects = _run_pool(todo, workers, records, watch)
        for task in suspects:
            if _run_pool([task], 1, records, watch):
                records[task.index] = _crashed(task)
        todo = [task for task in todo if task.index not in records]


def _run_pool(
    todo: list[_Task], workers: int, records: dict[int, SlideRecord], watch: _Watch
) -> list[_Task]:
    """Run until all is done or a worker dies; returns the tasks in flight at that moment."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
    waiting = list(reversed(todo))
    flying: dict[Future[SlideRecord], _Task] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker, (watch.counts,))
    try:
        while waiting or flying:
            while waiting and len(flying) < workers:
                task = waiting.pop()
                flying[pool.submit(_work, task)] = task
            done, _ = wait(flying, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                records[flying[future].index] = future.result()
                del flying[future]
            watch.show()
    except BrokenProcessPool:
        finished = [f for f in flying if f.done() and f.exception() is None]
        for future in finished:
            records[flying.pop(future).index] = future.result()
        return list(flying.values())
    finally:
        pool.shutdown(cancel_futures=True)
    return []


def _crashed(task: _Task) -> SlideRecord:
    for stale in task.folder.glob(f"{task.key}*"):
        stale.unlink()
    record = SlideRecord.of(task.row, task.head)
    record.reason = (
        f"{task.row.slide_id}: the process that read it died (a crash in the decoder, or out of "
        "memory). Check the file; remove the corpus and build it again with fewer --workers."
    )
    return record


class _Watch:
    """Counts of regions, and the progress callback."""

    def __init__(
        self, tasks: list[_Task], records: dict[int, SlideRecord], progress: Progress | None
    ):
        self.tasks, self.records, self.progress = tasks, records, progress
        self.counts = multiprocessing.get_context("spawn").RawArray("q", 2 * len(tasks))

    def report(self, task: _Task) -> Callable[[int, int], None]:
        def report(done: int, to_do: int) -> None:
            self.counts[2 * task.index], self.counts[2 * task.index + 1] = done, to_do
            self.show()

        return report

    def show(self) -> None:
        if self.progress is None:
            return
        done, to_do = self.counts[0::2], self.counts[1::2]
        started = [i for i in range(len(self.tasks)) if i not in self.records]
        share = sum(done[i] / to_do[i] for i in started if to_do[i])
        finished = len(self.records)
        self.progress(BuildState(len(self.tasks), finished, finished + share, sum(done)))


# --- finish -----------------------------------------------------------------------------------


def _finish(
    partial: Path, options: CorpusOptions, fingerprint: str, records: list[SlideRecord]
) -> None:
    """Name the shards in slide order and write manifest, corpus.json and card."""
    parts = [(record, name, rows) for record in records for name, rows in record.parts]
    plan = {
        f"data/train-{i:05d}-of-{len(parts):05d}.parquet": name
        for i, (_, name, _) in enumerate(parts)
    }
    write_atomically(partial / "shards.json", json.dumps(plan, indent=1))
    (partial / "data").mkdir(exist_ok=True)
    for shard, name in plan.items():
        (partial / "parts" / name).replace(partial / shard)
    shard_of = {name: shard for shard, name in plan.items()}
    for record in records:
        record.parts = [(shard_of[name], rows) for name, rows in record.parts]
    lines = [asdict(record) for record in records]
    manifest = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(partial / "manifest.jsonl", manifest)
    corpus = _corpus_json(options, fingerprint, lines, plan, parts)
    write_atomically(partial / "corpus.json", json.dumps(corpus, indent=1) + "\n")
    write_card(partial, corpus, records)


def _corpus_json(
    options: CorpusOptions,
    fingerprint: str,
    lines: list[dict[str, Any]],
    plan: dict[str, str],
    parts: list[tuple[SlideRecord, str, int]],
) -> dict[str, Any]:
    grids = [
        {
            "slide_id": line["slide_id"],
            "slide_sha256_head": line["slide_sha256_head"],
            "mpp0": line["mpp0"],
            "x0": line["grid_xy"][0],
            "y0": line["grid_xy"][1],
            "stride_px": options.stride,
            "extent_xy": line["extent_xy"],
            "pairs": line["pairs"],
            "shards": line["parts"],
        }
        for line in lines
        if line["pairs"]
    ]
    return {
        "format": "xmag-corpus",
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "options": asdict(options),
        "mpp": TEACHER_MPP,
        "region_px": REGION_PX,
        "stride_px": options.stride,
        "pairs": sum(line["pairs"] for line in lines),
        "shards": [
            {"file": shard, "rows": rows} for shard, (_, _, rows) in zip(plan, parts, strict=True)
        ],
        "slides": grids,
        "versions": versions(PACKAGES),
    }

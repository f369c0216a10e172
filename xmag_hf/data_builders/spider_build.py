"""Write SPIDER as Parquet: shards, `spider.json` and card, resumable shard by shard.

Work lies in `DIR.partial/` until everything is there; a killed run goes on after its last shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xmag_hf.atomic_write import remove_drafts, write_atomically
from xmag_hf.child_process import end_with_parent
from xmag_hf.lock import only_writer
from xmag_hf.reporting.records import versions

from .pairs import ROWS_PER_GROUP
from .spider_card import card_text
from .spider_records import (
    CHUNK,
    SPLITS,
    SpiderOptions,
    SpiderRecord,
    SpiderRow,
    locate,
    make_rows,
    read_records,
)
from .spider_source import LICENCE, OpenSource, Progress, SpiderError, SpiderSource

FORMAT_VERSION = 1
DESCRIBED = "spider.json"
STATE = "state.json"


@dataclass
class Shard:
    """A Parquet file and the records it came from.

    Attributes:
        file: Name, in the folder of parts.
        split: Of its rows.
        records: Worked through for it, kept or not.
        rows: Written.
        dropped: Left out because context is missing (`missing="drop"`).
        labels: Label (as text, for JSON) -> rows.
        missing: Number of missing neighbours (as text) -> rows.
        problems: Files that are absent or do not decode.
    """

    file: str
    split: str
    records: int = 0
    rows: int = 0
    dropped: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SpiderSummary:
    """What a built data set holds: the content of `spider.json`.

    Attributes:
        path: Its folder.
        organ: Which.
        rows: Split -> rows.
        classes: Class -> split -> rows.
        missing: Number of missing neighbours -> rows.
        dropped: Records left out by `missing="drop"`.
        problems: Files that are absent or do not decode, and records lost by them.
        warnings: See `SpiderRecords`.
        already_done: True if nothing had to be built.
    """

    path: Path
    organ: str
    rows: dict[str, int]
    classes: dict[str, dict[str, int]]
    missing: dict[str, int]
    dropped: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    already_done: bool = False


def build_spider(
    source: SpiderSource,
    out_dir: str | Path,
    options: SpiderOptions | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> SpiderSummary:
    """Write an organ as Parquet, or go on with it.

    The rows depend on source and options only, not on `workers` or on how often it was killed.

    Args:
        source: From `find_source`.
        out_dir: Appears when everything is done; `out_dir.partial` holds the work until then.
        options: Default `SpiderOptions()`.
        workers: Processes. From 2 on a script needs `if __name__ == "__main__"`.
        progress: Called with (stage, done, in all); stages `index` (bytes) and `records`.

    Returns:
        The summary; files that do not decode are in it, not raised.

    Raises:
        SpiderError: The source is not SPIDER's or is damaged, or `out_dir` (or its partial) is of
            another source or other options. Or another process builds it.
        OSError: The output cannot be written.
    """
    options = options or SpiderOptions()
    if workers < 1:
        raise SpiderError(f"workers={workers}: it must be at least 1.")
    out_dir = Path(out_dir)
    identity = {
        "format": "xmag-spider",
        "format_version": FORMAT_VERSION,
        "organ": source.organ,
        "source_sha256": source.identity,
        "options": asdict(options),
    }
    if out_dir.exists():
        return _finished(out_dir, identity)
    with only_writer(out_dir.resolve(), SpiderError):
        if out_dir.exists():  # by whoever had the lock until now
            return _finished(out_dir, identity)
        _build(source, out_dir, identity, options, workers, progress)
    return _summary(out_dir)


def _build(
    source: SpiderSource,
    out_dir: Path,
    identity: dict[str, Any],
    options: SpiderOptions,
    workers: int,
    progress: Progress | None,
) -> None:
    """Make the data set, which is complete in its folder afterwards."""
    from .spider import spider_features  # `datasets` takes a second to import

    partial = out_dir.with_name(out_dir.name + ".partial")
    shards = _prepare(partial, identity)
    opened = source.open(progress)
    data = read_records(source.organ, opened.metadata, options)
    report = _counter(progress, sum(shard.records for shard in shards), len(data.records))

    def done(shard: Shard) -> None:
        shards.append(shard)
        write_atomically(partial / STATE, _state(identity, shards))

    schema = spider_features(data.classes).arrow_schema
    earlier = {split: [s for s in shards if s.split == split] for split in SPLITS}
    to_do = {
        split: data.of(split)[sum(shard.records for shard in earlier[split]) :] for split in SPLITS
    }
    everything = [record for split in SPLITS for record in to_do[split]]
    with contextlib.closing(_rows(opened, everything, options.missing, workers)) as rows:
        for split in SPLITS:
            if to_do[split]:
                first = len(earlier[split])
                writer = _ShardWriter(partial / "parts", split, first, schema, done)
                mine = itertools.islice(rows, len(to_do[split]))
                writer.write(mine, options.max_shard_mb * 1_000_000, report)
    if not any(shard.rows for shard in shards):
        raise SpiderError(f"{source.name}: no record is left. {_first_problem(shards, options)}")
    described = identity | {
        "source": source.name if source.folder is None and source.revision else "local files",
        "revision": source.revision,
        "licence": LICENCE,
        "warnings": data.warnings,
        "validation_slides": sorted({record.slide_id for record in data.of("validation")}),
    }
    _finish(partial, described, data.classes, shards)
    for name in (STATE, DESCRIBED, "README.md"):
        remove_drafts(partial / name)  # what killed runs left
    partial.replace(out_dir)
    (out_dir / STATE).unlink()  # after the rename: a kill here loses nothing
    shutil.rmtree(out_dir / "parts")


# --- resume -----------------------------------------------------------------------------------


def _finished(out_dir: Path, identity: dict[str, Any]) -> SpiderSummary:
    """The summary of a complete data set, if it is the one asked for."""
    if not (out_dir / DESCRIBED).is_file():
        raise SpiderError(f"{out_dir} exists and is no SPIDER data set. Choose another --out.")
    found = json.loads((out_dir / DESCRIBED).read_text(encoding="utf-8"))
    differing = _differences(found, identity)
    if differing:
        raise SpiderError(
            f"{out_dir} is complete, but not this data set: {differing}. Choose another --out, or "
            "remove it."
        )
    return _summary(out_dir, already_done=True)


def _prepare(partial: Path, identity: dict[str, Any]) -> list[Shard]:
    """Make the folder of parts; returns the shards of an earlier run with the same options."""
    state = partial / STATE
    shards = []
    if state.is_file():
        found = json.loads(state.read_text(encoding="utf-8"))
        differing = _differences(found, identity)
        if differing:
            raise SpiderError(
                f"{partial} was begun otherwise: {differing}. Go on with that, choose another "
                "--out, or remove it."
            )
        shards = [Shard(**shard) for shard in found["shards"]]
    elif partial.exists() and any(partial.iterdir()):
        raise SpiderError(f"{partial} exists and is no begun data set. Choose another --out.")
    (partial / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(state, _state(identity, shards))
    return shards


def _state(identity: dict[str, Any], shards: Sequence[Shard]) -> str:
    return json.dumps(identity | {"shards": [asdict(shard) for shard in shards]}, indent=1)


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    flat = [
        ({k: v for k, v in side.items() if k in mine and k != "options"} | side.get("options", {}))
        for side in (theirs, mine)
    ]
    return ", ".join(
        f"{key} {flat[0].get(key)!r} there, {value!r} asked for"
        for key, value in flat[1].items()
        if flat[0].get(key) != value
    )


# --- work -------------------------------------------------------------------------------------


def _counter(progress: Progress | None, done: int, total: int) -> Callable[[], None]:
    """A function to call after each record."""

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("records", done, total)

    return report


def _rows(
    source: OpenSource, records: Sequence[SpiderRecord], missing: str, workers: int
) -> Generator[SpiderRow]:
    """What became of each record, in order."""
    chunks = (
        [locate(source, record) for record in records[i : i + CHUNK]]
        for i in range(0, len(records), CHUNK)
    )
    if workers == 1 or len(records) <= CHUNK:
        for chunk in chunks:
            yield from make_rows(source.reader, chunk, missing)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
    pool = ProcessPoolExecutor(workers, context, end_with_parent)
    flying: deque[Future[list[SpiderRow]]] = deque()
    try:
        for chunk in chunks:
            flying.append(pool.submit(make_rows, source.reader, chunk, missing))
            if len(flying) >= 2 * workers:  # bounds what waits in memory
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
    except BrokenProcessPool as error:
        raise SpiderError(
            f"A process died with one of the records {records[0].index} to {records[-1].index} "
            "(out of memory?). Run it again with fewer --workers: it goes on after its last shard."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _ShardWriter:
    """Parquet files of one split, each written under a temporary name, fsynced and renamed."""

    def __init__(
        self,
        folder: Path,
        split: str,
        first: int,
        schema: pa.Schema,
        done: Callable[[Shard], None],
    ):
        self.folder, self.split, self.number, self.schema = folder, split, first, schema
        self.done = done
        self._begin()

    def write(self, rows: Iterator[SpiderRow], max_bytes: int, report: Callable[[], None]) -> None:
        """Write all rows; the last file may end up without any."""
        for made in rows:
            size = _row_bytes(made)
            if self.shard.rows and self._sink.tell() + self._waiting_bytes + size > max_bytes:
                self._end()
                self.number += 1
                self._begin()
            self._add(made, size)
            report()
        self._end()

    def _begin(self) -> None:
        self.shard = Shard(f"{self.split}-{self.number:05d}.parquet", self.split)
        self._labels: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        self._waiting: list[dict[str, Any]] = []
        self._waiting_bytes = 0
        self._sink = (self.folder / (self.shard.file + ".tmp")).open("wb")
        plain = [name for name in self.schema.names if not name.startswith("image_")]
        self._writer = pq.ParquetWriter(
            self._sink,
            self.schema,
            compression="none",  # images are compressed already
            use_dictionary=["slide_id"],  # pyright: ignore[reportArgumentType]
            # Minimum and maximum of an image's bytes mean nothing and can be large.
            write_statistics=plain,  # pyright: ignore[reportArgumentType]
        )

    def _add(self, made: SpiderRow, size: int) -> None:
        self.shard.records += 1
        self.shard.problems += made.problems
        if made.row is None:
            self.shard.dropped += not made.lost
            return
        self.shard.rows += 1
        self._labels[str(made.row["label"])] += 1
        self._missing[str(made.row["num_missing_context"])] += 1
        self._waiting.append(made.row)
        self._waiting_bytes += size
        if len(self._waiting) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self.schema))
        self._waiting, self._waiting_bytes = [], 0

    def _end(self) -> None:
        if self._waiting:
            self._flush()
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        path = self.folder / self.shard.file
        path.with_name(path.name + ".tmp").replace(path)
        self.shard.labels, self.shard.missing = dict(self._labels), dict(self._missing)
        self.done(self.shard)


def _row_bytes(made: SpiderRow) -> int:
    if made.row is None:
        return 0
    return len(made.row["image_20x"]["bytes"]) + len(made.row["image_5x"]["bytes"]) + 1024


def _first_problem(shards: Sequence[Shard], options: SpiderOptions) -> str:
    problems = [problem for shard in shards for problem in shard.problems]
    dropped = sum(shard.dropped for shard in shards)
    if dropped:
        return f"{dropped} lack context and missing={options.missing!r} drops those; fill it."
    return f"First problem: {problems[0]}" if problems else ""


# --- finish -----------------------------------------------------------------------------------


def _finish(
    partial: Path, described: dict[str, Any], classes: Sequence[str], shards: Sequence[Shard]
) -> None:
    """Name the shards, and write spider.json and the card. Can be repeated after a kill."""
    (partial / "data").mkdir(exist_ok=True)
    files = []
    for split in SPLITS:
        # `datasets` cannot read a split without rows.
        mine = [shard for shard in shards if shard.split == split and shard.rows]
        for number, shard in enumerate(mine):
            name = f"data/{split}-{number:05d}-of-{len(mine):05d}.parquet"
            if (partial / "parts" / shard.file).exists():
                (partial / "parts" / shard.file).replace(partial / name)
            files.append({"file": name, "rows": shard.rows})
    labels = {split: Counter() for split in SPLITS}
    missing: Counter[str] = Counter()
    for shard in shards:
        labels[shard.split].update(shard.labels)
        missing.update(shard.missing)
    rows = {split: labels[split].total() for split in SPLITS}
    empty = [f"split {split} is empty, so it is left out" for split in SPLITS if not rows[split]]
    described = described | {
        "shards": files,
        "rows": rows,
        "warnings": [*described["warnings"], *empty],
        "classes": {
            name: {split: labels[split][str(label)] for split in SPLITS}
            for label, name in enumerate(classes)
        },
        "missing": {number: missing[number] for number in sorted(missing, key=int)},
        "dropped": sum(shard.dropped for shard in shards),
        "problems": [problem for shard in shards for problem in shard.problems],
        "versions": versions(("datasets", "huggingface_hub", "pillow", "pyarrow")),
    }
    content = json.dumps({k: v for k, v in described.items() if k != "versions"}, sort_keys=True)
    described["fingerprint"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    write_atomically(partial / DESCRIBED, json.dumps(described, indent=1) + "\n")
    size = sum(path.stat().st_size for path in (partial / "data").glob("*.parquet"))
    write_atomically(partial / "README.md", card_text(described, size))


def _summary(out_dir: Path, *, already_done: bool = False) -> SpiderSummary:
    found = json.loads((out_dir / DESCRIBED).read_text(encoding="utf-8"))
    return SpiderSummary(
        path=out_dir,
        organ=found["organ"],
        rows=found["rows"],
        classes=found["classes"],
        missing=found["missing"],
        dropped=found["dropped"],
        problems=tuple(found["problems"]),
        warnings=tuple(found["warnings"]),
        already_done=already_done,
    )

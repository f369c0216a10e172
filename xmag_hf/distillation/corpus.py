"""Open a paired corpus for training: its shards, an index of its pairs, held-out parts.

A pair is named by its row: shards in order, rows in order within a shard. Everything that joins
to the corpus (teacher features, splits) does so by that row, before any shuffle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xmag_hf.distillation.options import DistillationError

INDEX_COLUMNS = ("slide_id", "patient_id", "x", "y", "width0")
REGION_PX = 896
INDEX_THREADS = 16


@dataclass(frozen=True)
class PairIndex:
    """Where every pair lies; arrays of one length, in row order.

    Attributes:
        slide_names: (n_slides,) str.
        slide: (n,) int32, index into `slide_names`.
        patient: (n,) int32, equal where the patient is the same.
        x: (n,) int64, level-0 px, left edge.
        y: (n,) int64, level-0 px, top edge.
        width0: (n,) float64, exact width of the region in level-0 px.
    """

    slide_names: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    x: np.ndarray
    y: np.ndarray
    width0: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Corpus:
    """A paired corpus on disk or on the Hub.

    Attributes:
        location: As the user named it.
        shards: Paths, or hf:// addresses when streaming from the Hub.
        shard_rows: (n_shards,) rows of each shard.
        index: Where each pair lies.
        fingerprint: Of the options and slides that made it.
        info: Content of corpus.json, {} if there is none.
        folder: Local folder, None when streaming from the Hub.
        columns: That every shard has.
    """

    location: str
    shards: tuple[str, ...]
    shard_rows: np.ndarray
    index: PairIndex
    fingerprint: str
    info: dict[str, Any]
    folder: Path | None
    columns: frozenset[str]

    @property
    def shard_starts(self) -> np.ndarray:
        """(n_shards + 1,) first row of each shard, then the total."""
        return np.concatenate([[0], np.cumsum(self.shard_rows)])


def open_corpus(data: str, *, streaming: bool = False) -> Corpus:
    """Find the shards of a paired corpus and read the index of its pairs.

    Args:
        data: Folder written by `xmag corpus`, or a Hub data set repository (ORG/NAME), which is
            downloaded (resumably) unless `streaming`.
        streaming: Leave a repository where it is and read its shards from there.

    Returns:
        The corpus.

    Raises:
        DistillationError: No shards, no rows, or columns missing.
    """
    folder, shards = _find_shards(data, streaming)
    if not shards:
        raise DistillationError(
            f"{data}: no data/*.parquet there. Make a corpus with `xmag corpus SLIDES --out {data}`"
            + (" (its .partial folder is not finished)." if data.endswith(".partial") else ".")
        )
    with ThreadPoolExecutor(INDEX_THREADS) as pool:  # thousands of shards, perhaps far away
        tables, names = zip(*pool.map(_read_index_columns, shards), strict=True)
    rows = np.array([table.num_rows for table in tables])
    if rows.sum() == 0:
        raise DistillationError(f"{data}: the corpus holds no pair.")
    index = _index(pa.concat_tables(tables))
    info = _read_info(folder, data)
    fingerprint = info.get("fingerprint") or _index_fingerprint(index)
    columns = frozenset.intersection(*names)
    return Corpus(data, tuple(shards), rows, index, fingerprint, info, folder, columns)


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows kept out.

    Attributes:
        train: (n,) int64 rows.
        held_out: Rows of each held-out part, by its name.
        dropped: Pairs in neither: they straddle the edge of a held-out band, or are of another
            slide of a held-out patient.
    """

    train: np.ndarray
    held_out: dict[str, np.ndarray]
    dropped: int


def split_pairs(index: PairIndex, parts: Sequence[str], *, margin: float = 0.0) -> Split:
    """Keep slides, or bands of slides, out of training.

    A pair is held out if its whole region lies in the band, trained on if nothing that training
    may show of it does, and otherwise dropped: no training view shares a pixel with a held-out
    region. With a whole slide, the other slides of its patient are dropped, too.

    Args:
        index: Of the corpus.
        parts: `SLIDE_ID`, or `SLIDE_ID:y>0.75`, `SLIDE_ID:x<0.2`: share of the extent of the
            slide's pairs.
        margin: How much wider than its region training may show a pair, as a share: --mpp-jitter.

    Returns:
        The split.

    Raises:
        DistillationError: A part that names no slide, cannot be read or holds no pair, or nothing
            left to train on.
    """
    role = np.zeros(len(index), dtype=np.int8)  # 0 train, 1 held out, 2 dropped
    held_out = {}
    for part in parts:
        inside, touched = _band(index, part, margin)
        if not inside.any():
            raise DistillationError(f"--holdout {part}: holds no whole region; make it wider.")
        held_out[part] = np.flatnonzero(inside)
        role[touched & ~inside & (role == 0)] = 2
        role[inside] = 1
    train = np.flatnonzero(role == 0)
    if not len(train):
        raise DistillationError(f"--holdout {' '.join(parts)}: leaves no pair to train on.")
    return Split(train, held_out, int((role == 2).sum()))


def count_disjoint(index: PairIndex, rows: np.ndarray) -> int:
    """Count regions among `rows` that share no pixel with each other, taken greedily in order.

    Overlapping pairs are not independent samples; this number is the honest n.
    """
    kept: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        slide, x, y = int(index.slide[row]), int(index.x[row]), int(index.y[row])
        width = index.width0[row] - 1  # regions that touch start within a rounded px of each other
        others = kept.setdefault(slide, [])
        if all(abs(x - a) >= width or abs(y - b) >= width for a, b in others):
            others.append((x, y))
    return sum(map(len, kept.values()))


def split_digest(index: PairIndex, split: Split) -> str:
    """sha256, hex, over rows and places (slide_id, x, y) of the pairs trained on and held out."""
    digest = hashlib.sha256(json.dumps(list(map(str, index.slide_names))).encode())
    for rows in (split.train, *split.held_out.values()):
        digest.update(f"{len(rows)} pairs".encode())
        for column in (rows, index.slide[rows], index.x[rows], index.y[rows]):
            digest.update(np.ascontiguousarray(column, np.int64).tobytes())
    return digest.hexdigest()


def _band(index: PairIndex, part: str, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool: regions wholly in the part, and regions that with their margin touch it."""
    slide_id, _, condition = part.partition(":") if ":" in part else (part, "", "")
    names = list(index.slide_names)
    if slide_id not in names:
        shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
        raise DistillationError(f"--holdout {part}: no slide {slide_id!r}; there are {shown}.")
    mine = index.slide == names.index(slide_id)
    if not condition:
        return mine, np.isin(index.patient, index.patient[mine])
    match = re.fullmatch(r"([xy])([<>])(0?\.\d+)", condition)
    if not match:
        raise DistillationError(
            f"--holdout {part}: cannot read {condition!r}; write x or y, < or >, and a share "
            "between 0 and 1, such as SLIDE:y>0.75."
        )
    start = (index.x if match[1] == "x" else index.y).astype(np.float64)
    end = start + index.width0
    low, high = start[mine].min(), end[mine].max()
    edge = low + float(match[3]) * (high - low)
    around = margin * index.width0 / 2
    if match[2] == ">":
        return mine & (start >= edge), mine & (end + around > edge)
    return mine & (end <= edge), mine & (start - around < edge)


def _find_shards(data: str, streaming: bool) -> tuple[Path | None, list[str]]:
    folder = Path(data)
    if folder.is_dir():
        return folder, [str(path) for path in sorted((folder / "data").glob("*.parquet"))]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data) or folder.exists():
        raise DistillationError(f"{data}: neither a corpus folder nor a Hub repository ORG/NAME.")
    from huggingface_hub import HfFileSystem, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if streaming:
            found = HfFileSystem().glob(f"datasets/{data}/data/*.parquet")
            return None, [f"hf://{path}" for path in sorted(map(str, found))]
        patterns = ["data/*.parquet", "corpus.json"]
        folder = Path(snapshot_download(data, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise DistillationError(
            f"{data}: no such folder, and the Hub did not give a data set of that name "
            f"({type(error).__name__}). Check the name, the network and `hf auth login`."
        ) from error
    return folder, [str(path) for path in sorted((folder / "data").glob("*.parquet"))]


@contextmanager
def open_shard(shard: str) -> Iterator[pq.ParquetFile]:
    """Open one shard, local or at any address of fsspec (hf://, s3://), for reading."""
    source: Any = shard
    if "://" in shard:
        import fsspec

        source = fsspec.open(shard, "rb").open()  # type: ignore[union-attr]
    try:
        file = pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise DistillationError(
            f"{shard}: not a readable Parquet file ({error}). Build or download it again."
        ) from error
    try:
        yield file
    finally:
        file.close(force=True)


def _read_index_columns(shard: str) -> tuple[pa.Table, frozenset[str]]:
    with open_shard(shard) as file:
        names = frozenset(file.schema_arrow.names)
        missing = {*INDEX_COLUMNS, "image_20x", "image_5x"} - names
        if missing:
            raise DistillationError(
                f"{shard}: columns {sorted(missing)} are missing; not a paired corpus."
            )
        return file.read(columns=list(INDEX_COLUMNS)), names


def _index(table: pa.Table) -> PairIndex:
    slide_names, slide = _codes(table.column("slide_id"))
    return PairIndex(
        slide_names=slide_names,
        slide=slide,
        patient=_codes(table.column("patient_id"))[1],
        x=table.column("x").to_numpy().astype(np.int64),
        y=table.column("y").to_numpy().astype(np.int64),
        width0=table.column("width0").to_numpy().astype(np.float64),
    )


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Names, and (n,) int32 indices into them: millions of strings would not fit."""
    coded = pa.concat_arrays(column.chunks).dictionary_encode()
    names = np.array(coded.dictionary.to_pylist(), dtype=object)
    return names, coded.indices.to_numpy(zero_copy_only=False).astype(np.int32)


def _read_info(folder: Path | None, data: str) -> dict[str, Any]:
    if folder is None:
        from huggingface_hub import HfFileSystem

        files = HfFileSystem()
        path = f"datasets/{data}/corpus.json"
        return json.loads(files.read_text(path)) if files.exists(path) else {}
    path = folder / "corpus.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _index_fingerprint(index: PairIndex) -> str:
    """Of the pairs' places, for a corpus that comes without corpus.json."""
    digest = hashlib.sha256("\n".join(map(str, index.slide_names)).encode())
    for column in (index.slide, index.x, index.y, index.width0):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def iterate_shard(
    shard: str, columns: Sequence[str], batch_rows: int = 32
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read one shard in file order, a few rows in memory at a time.

    Args:
        shard: Path or address.
        columns: To read; images come as {"bytes", "path"}.
        batch_rows: Rows read at once.

    Yields:
        (row within the shard, columns of that row).
    """
    row = 0
    with open_shard(shard) as file:
        for batch in file.iter_batches(batch_rows, columns=list(columns)):
            for values in batch.to_pylist():
                yield row, values
                row += 1


def read_pairs(
    corpus: Corpus, rows: np.ndarray, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read some pairs in row order; only row groups that hold one are read.

    Args:
        corpus: To read.
        rows: (n,) rows of the corpus.
        columns: To read.

    Yields:
        (row of the corpus, its columns), in ascending order of row.
    """
    rows = np.sort(rows)
    starts = corpus.shard_starts
    for number, shard in enumerate(corpus.shards):
        wanted = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
        if not len(wanted):
            continue
        with open_shard(shard) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                inside = wanted[(wanted >= first) & (wanted < first + count)] - first
                if len(inside):
                    table = file.read_row_group(group, columns=list(columns)).take(inside)
                    for offset, values in zip(inside, table.to_pylist(), strict=True):
                        yield int(starts[number] + first + offset), values
                first += count

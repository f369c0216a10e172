"""From one slide to its pairs, and to Parquet parts. Runs in worker processes; no `datasets`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from xmag_hf.atomic_write import write_atomically
from xmag_hf.slides import (
    Slide,
    SlideError,
    SlideReadError,
    SlideScaleError,
    find_tissue,
    grid_origins,
    open_slide,
    resample,
    tissue_mask,
)

from .corpus_options import (
    REGION_PX,
    REGION_UM,
    STUDENT_MPP,
    STUDENT_PX,
    TEACHER_MPP,
    CorpusOptions,
)
from .reading_paths import other_views, view_mpps
from .slide_list import SlideRow

ROWS_PER_GROUP = 64  # about 40 MB: what a writer holds, and what a streaming reader fetches at once
TEXT_COLUMNS = ("slide_id", "patient_id", "cancer_type", "source")

# SlideError is a ValueError; the others are what a header that lies can provoke.
SLIDE_FAULTS = (ValueError, ArithmeticError, LookupError, MemoryError)

Report = Callable[[int, int], None]  # (regions done, regions to do)


@dataclass
class SlideRecord:
    """What became of a slide: a line of the manifest.

    Attributes:
        status: `ok`, `no_tissue`, `refused` (scale) or `failed` (unreadable, error).
        reason: Why not `ok`, and what to do.
        grid_xy: Where the slide's grids start (x0, y0), level-0 px: region column k starts at
            x0 + round(k * stride * 0.5 / mpp0), and a 224 px patch column likewise with 224.
        extent_xy: Where they end, level-0 px.
        view_mpps: um/px behind each optional view, see `reading_paths.view_mpps`.
        regions: Regions on the grid.
        pairs: Regions kept and written.
        unreadable: Regions with enough tissue that could not be decoded.
        parts: (file name, rows) of the Parquet files.
    """

    slide_id: str
    patient_id: str
    cancer_type: str
    source: str
    path: str
    extra: dict[str, str]
    slide_sha256_head: str | None = None
    status: str = "failed"
    reason: str = ""
    mpp_given: float | None = None
    mpp0: float | None = None
    mpp_source: str = ""
    level: int | None = None
    level_mpp: float | None = None
    size_level0: tuple[int, int] | None = None
    grid_xy: tuple[int, int] | None = None
    extent_xy: tuple[int, int] | None = None
    view_mpps: dict[str, float | None] = field(default_factory=dict)
    tissue_method: str = ""
    tissue_threshold: float | None = None
    regions: int = 0
    pairs: int = 0
    unreadable: int = 0
    first_unreadable: str = ""
    parts: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def of(cls, row: SlideRow, head: str | None) -> SlideRecord:
        """A record that says nothing yet but whose slide it is."""
        return cls(
            row.slide_id,
            row.patient_id,
            row.cancer_type,
            row.source,
            str(row.path),
            row.extra,
            head,
            mpp_given=row.mpp,
        )


def open_row(row: SlideRow, options: CorpusOptions) -> Slide:
    """Open a slide of a list; its CSV's mpp goes before the option's, that before the file's."""
    return open_slide(row.path, options.mpp if row.mpp is None else row.mpp, slide_id=row.slide_id)


def slide_pairs(
    slide: Slide,
    row: SlideRow,
    options: CorpusOptions,
    record: SlideRecord,
    report: Report | None = None,
) -> Iterator[dict[str, Any]]:
    """Pairs of a slide, row by row of its grid.

    Args:
        slide: Open.
        row: Its metadata.
        options: Of the corpus.
        record: Filled in as the slide is worked through.
        report: Called after each region.

    Yields:
        One pair as the corpus's columns; images are {"bytes", "path"}.

    Raises:
        SlideScaleError: Coarser than allowed.
        SlideReadError: Not one region could be decoded.
    """
    level = slide.level_for(TEACHER_MPP, allow_coarse=options.allow_coarse)
    _describe(record, slide, level, options)
    origins = grid_origins(slide, patch_px=REGION_PX, stride_px=options.stride, mpp=TEACHER_MPP)
    width0 = REGION_UM / slide.mpp0
    tissue = find_tissue(slide)
    fractions = tissue.fractions(origins, width0)
    # Where the overview had gaps there may be tissue: those regions are tried, and counted.
    possible = tissue.fractions(origins, width0, with_gaps=True)
    kept = np.flatnonzero((possible >= options.tissue) & (possible > 0))
    record.regions, record.tissue_threshold = len(origins), tissue.threshold
    record.tissue_method = tissue.method
    for done, index in enumerate(kept, start=1):
        x, y = (int(v) for v in origins[index])
        try:
            pixels = slide.read_region(
                (x, y), REGION_PX, TEACHER_MPP, allow_coarse=options.allow_coarse
            )
            others = other_views(slide, (x, y), options)
        except SlideReadError as error:
            record.unreadable += 1
            record.first_unreadable = record.first_unreadable or str(error)
        else:
            small = reduce_region(pixels)
            fraction = float(fractions[index])
            if possible[index] > fractions[index]:  # the overview did not see all of it
                fraction = float(tissue_mask(small, STUDENT_MPP)[0].mean())
            if not fraction >= options.tissue or fraction == 0:
                continue
            record.pairs += 1
            yield {
                "image_20x": encode(pixels, options.codec),
                "image_5x": encode(small, "png"),
                "slide_id": row.slide_id,
                "patient_id": row.patient_id,
                "cancer_type": row.cancer_type,
                "x": x,
                "y": y,
                "width0": width0,
                "mpp0": slide.mpp0,
                "level": level,
                "tissue_fraction": fraction,
                "source": row.source,
                **{n: None if v is None else encode(v, "png") for n, v in others.items()},
            }
        finally:
            if report is not None:
                report(done, len(kept))
    if record.unreadable and not record.pairs:
        raise SlideReadError(
            f"{row.slide_id}: none of {record.unreadable} regions could be decoded; first: "
            f"{record.first_unreadable}"
        )


def reduce_region(pixels: np.ndarray) -> np.ndarray:
    """The 5x view of a region: reduced by 4 with the contract's filter.

    Args:
        pixels: (896, 896, 3) uint8, undamaged by any codec.

    Returns:
        (224, 224, 3) uint8.
    """
    return resample(pixels, (STUDENT_PX, STUDENT_PX), (0, 0, REGION_PX, REGION_PX))


def encode(pixels: np.ndarray, codec: str) -> dict[str, Any]:
    """An image as `datasets` stores it: {"bytes": ..., "path": None}.

    Args:
        pixels: (H, W, 3) uint8.
        codec: `jpeg95` (quality 95, 4:4:4) or `png`.
    """
    buffer = io.BytesIO()
    if codec == "jpeg95":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_slide(
    row: SlideRow,
    head: str | None,
    options: CorpusOptions,
    schema: pa.Schema,
    folder: Path,
    key: str,
    report: Report | None = None,
) -> SlideRecord:
    """Write a slide's pairs to `folder` and say what became of it. Never raises for a bad slide.

    Parts are `<key>-00000.parquet`, ...; `<key>.json`, the record, is written last, so a slide
    without one is unfinished.

    Args:
        row: The slide.
        head: Its slide_sha256_head, None if unreadable.
        options: Of the corpus.
        schema: Of the Parquet files, with the features in its metadata.
        folder: Exists.
        key: File name stem, unique to the slide.
        report: Called after each region.

    Returns:
        The record.

    Raises:
        OSError: The output could not be written (a full disk is no fault of the slide).
    """
    record = SlideRecord.of(row, head)
    for stale in folder.glob(f"{key}*"):
        stale.unlink()
    parts = _PartWriter(folder, key, schema, options.max_shard_mb * 1_000_000)
    try:
        with open_row(row, options) as slide:
            for pair in slide_pairs(slide, row, options, record, report):
                parts.add(pair)
        record.parts = parts.close()
        record.status = "ok" if record.pairs else "no_tissue"
        record.reason = "" if record.pairs else _no_tissue_reason(record, options)
    except SLIDE_FAULTS as error:
        parts.discard()
        record.status = "refused" if isinstance(error, SlideScaleError) else "failed"
        record.reason = describe_fault(row, error)
        record.pairs = 0
    write_atomically(folder / f"{key}.json", json.dumps(asdict(record), indent=1))
    return record


def describe_fault(row: SlideRow, error: Exception) -> str:
    """One of `SLIDE_FAULTS` in words; a SlideError names the slide and the remedy itself."""
    if isinstance(error, SlideError):
        return str(error)
    return f"{row.slide_id}: {type(error).__name__}: {error}"


class _PartWriter:
    """Parquet files of at most `max_bytes`, written group by group."""

    def __init__(self, folder: Path, key: str, schema: pa.Schema, max_bytes: int):
        self.folder, self.key, self.schema, self.max_bytes = folder, key, schema, max_bytes
        self.done: list[tuple[str, int]] = []
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._sink: Any = None
        self._written = 0

    def add(self, pair: dict[str, Any]) -> None:
        images = [value for value in pair.values() if isinstance(value, dict)]
        size = sum(len(image["bytes"]) for image in images) + 1024
        used = self._sink.tell() if self._sink is not None else 0
        if used + self._row_bytes + size > self.max_bytes and (used or self._rows):
            self._finish_part()
        self._rows.append(pair)
        self._row_bytes += size
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> list[tuple[str, int]]:
        self._finish_part()
        return self.done

    def discard(self) -> None:
        """Remove what was written."""
        self._rows = []
        self._finish_part()
        for name, _ in self.done:
            (self.folder / name).unlink()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            plain = [name for name in self.schema.names if not name.startswith("image_")]
            self._sink = self._temporary.open("wb")
            self._writer = pq.ParquetWriter(
                self._sink,
                self.schema,
                # Images are compressed already; repeated texts are packed by the dictionary.
                compression="none",
                use_dictionary=list(TEXT_COLUMNS),  # pyright: ignore[reportArgumentType]
                # Minimum and maximum of an image's bytes mean nothing and can be large.
                write_statistics=plain,  # pyright: ignore[reportArgumentType]
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
        self._written += len(self._rows)
        self._rows, self._row_bytes = [], 0

    def _finish_part(self) -> None:
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        name = f"{self.key}-{len(self.done):05d}.parquet"
        self._temporary.replace(self.folder / name)
        self.done.append((name, self._written))
        self._writer, self._sink, self._written = None, None, 0

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{self.key}.parquet.tmp"


def _describe(record: SlideRecord, slide: Slide, level: int, options: CorpusOptions) -> None:
    record.mpp0, record.mpp_source = slide.mpp0, slide.mpp_source
    record.level, record.level_mpp = level, slide.level_mpps[level]
    record.size_level0 = slide.size_level0
    record.grid_xy, record.extent_xy = slide.origin_xy, slide.extent_xy
    record.view_mpps = view_mpps(slide, options)


def _no_tissue_reason(record: SlideRecord, options: CorpusOptions) -> str:
    return (
        f"{record.slide_id}: none of {record.regions} regions has a tissue fraction of "
        f"{options.tissue:g} or more. Look at the slide, or lower --tissue."
    )

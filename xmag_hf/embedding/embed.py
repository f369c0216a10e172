"""Slides to bags: one, or a folder of them that several processes may fill together.

Planning and reading run a few batches ahead of encoding and writing, so the next slide is read
while the last one is encoded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xmag_hf.atomic_write import remove_drafts, write_atomically
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.slides import SlideError, SlideReadError, SlideScaleError, sha256_head
from xmag_hf.slides.tissue import METHOD as TISSUE_METHOD

from .ahead import ahead
from .annotation import annotation_method
from .bag import Bag, BagError, BagInfo, read_info, write_bag
from .encode import PatchEncoder
from .lock import SlideLock, acquire, describe_holder
from .options import EmbedError, EmbedOptions
from .plan import PatchGeometry, SlidePlan, no_tissue_reason, patch_geometry, plan_slide
from .preview import preview_png
from .read import PatchBatch, read_patches
from .records import RunSummary, SlideRecord, recall, write_summary
from .sources import SLIDE_FAULTS, SlideSource, reason_of

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 3
WAIT_SECONDS = 1.0  # between looks at slides that another process has
MAX_ID_BYTES = 200  # with the temporary name's suffix a file name may have 255


@dataclass
class EmbedState:
    """Where a run stands, for progress bars.

    Attributes:
        slides: In all.
        slides_done: Finished, whatever their status.
        patches: Encoded in this run.
        share: Slides done, with the current one counted in part.
    """

    slides: int
    slides_done: int = 0
    patches: int = 0
    share: float = 0.0


Progress = Callable[[EmbedState], None]


def embed_slide(
    path: str | os.PathLike[str],
    encoder: Encoder | str,
    options: EmbedOptions | None = None,
    *,
    mpp0: float | None = None,
    slide_id: str | None = None,
    tissue_geojson: str | os.PathLike[str] | None = None,
) -> Bag:
    """Embed one slide. Nothing is written; `write_bag` does that.

    Args:
        path: What OpenSlide reads, or a PNG or JPEG with `mpp0`.
        encoder: Loaded (its device and precision are used), or a name for `load_encoder`.
        options: Default `EmbedOptions()`.
        mpp0: um/px of level 0 if the file's own must be overruled.
        slide_id: Default the file's stem.
        tissue_geojson: Polygons that say where tissue is.

    Returns:
        The bag; without tissue it has no rows.

    Raises:
        SlideError: The slide cannot be read, or has no usable scale.
        EmbedError: The encoder cannot do what the options ask for.
        EncoderError: The encoder cannot be had.
        OSError: The file may not be read.
    """
    options = options or EmbedOptions()
    loaded = loaded_encoder(encoder, options)
    geometry = patch_geometry(loaded.card, options)
    patch_encoder = _patch_encoder(loaded, options)
    geojson = None if tissue_geojson is None else Path(tissue_geojson)
    source = SlideSource(Path(path), slide_id or "", mpp0, "", geojson)
    head = sha256_head(source.path) if source.path.is_file() else None
    plan = plan_slide(source, geometry, options)
    filling = _Filling(plan, SlideRecord.of(source), options.features)
    batches = read_patches(
        plan,
        batch_size=patch_encoder.batch_size,
        threads=options.threads,
        device=loaded.device,
    )
    for batch in ahead(batches, BATCHES_AHEAD):  # type: ignore[arg-type]
        filling.add(batch, patch_encoder)
    return filling.bag(patch_encoder, head)


def embed_slides(
    sources: Sequence[SlideSource],
    out_dir: str | os.PathLike[str],
    encoder: Encoder | str,
    options: EmbedOptions | None = None,
    *,
    progress: Progress | None = None,
) -> RunSummary:
    """Embed slides into a folder of bags, or go on with one.

    A slide with a bag is left alone if the bag is what would be made; several processes may work
    on one folder, and each waits at its end for the slides that another still has.

    Args:
        sources: The slides.
        out_dir: Gets `<slide_id>.h5`, `previews/<slide_id>.png`, summary.csv and summary.json.
        encoder: Loaded, or a name for `load_encoder`.
        options: Default `EmbedOptions()`.
        progress: Called after each batch and slide.

    Returns:
        The summary; slides that failed are in it, not raised.

    Raises:
        EmbedError: No slides, ids that are no file names or stand for two slides, or an encoder
            that cannot do what the options ask for.
        EncoderError: The encoder cannot be had.
        OSError: The output cannot be written (a full disk is no fault of a slide). Finished bags
            stay; the same command goes on.
    """
    options = options or EmbedOptions()
    check_sources(sources)
    loaded = loaded_encoder(encoder, options)
    geometry = patch_geometry(loaded.card, options)
    out_dir = Path(out_dir)
    run = _Run(out_dir, options, geometry, _patch_encoder(loaded, options), progress)
    (out_dir / ".locks").mkdir(parents=True, exist_ok=True)
    run.state.slides = len(sources)
    facts = run.facts()
    try:
        todo = list(sources)
        while todo:
            busy = run.work(todo)
            if len(busy) == len(todo):
                time.sleep(WAIT_SECONDS)
            todo = busy
    except BaseException:
        records = tuple(run.records.values())
        if records:
            recall(records, out_dir)
            with contextlib.suppress(OSError):
                write_summary(RunSummary(out_dir, records, facts))
        raise
    records = tuple(run.records[source.slide_id] for source in sources)
    recall(records, out_dir)
    summary = RunSummary(out_dir, records, facts)
    write_summary(summary)
    return summary


def check_sources(sources: Sequence[SlideSource]) -> None:
    """Refuse an empty list, ids that are no file names, and ids given twice.

    Raises:
        EmbedError: Names the ids and their files.
    """
    if not sources:
        raise EmbedError("No slides given. Name files, folders, globs, or a slide CSV.")
    seen: dict[str, Path] = {}
    for source in sources:
        name = source.slide_id
        bad = not name.isprintable() or set(name) & set("/\\") or name.startswith(".")
        if bad or len(name.encode()) > MAX_ID_BYTES:
            raise EmbedError(
                f"slide_id {name!r} cannot name a file: it has slashes or unprintable characters, "
                f"begins with a dot, or is longer than {MAX_ID_BYTES} bytes. Give another slide_id "
                "in the slide CSV."
            )
        if name in seen:
            raise EmbedError(
                f"slide_id {name!r} stands for {seen[name]} and {source.path}. Give each its own "
                "slide_id in the slide CSV."
            )
        seen[name] = source.path


# --- one slide --------------------------------------------------------------------------------


class _Filling:
    """A bag that fills up, batch by batch."""

    def __init__(self, plan: SlidePlan, record: SlideRecord, dtype: str):
        self.plan, self.record, self._dtype = plan, record, np.dtype(dtype)
        self.unreadable: list[int] = []
        self._filled = np.zeros(len(plan.coords), dtype=bool)
        self._features: np.ndarray | None = None
        self._tokens: np.ndarray | None = None
        record.take(plan)

    @property
    def share(self) -> float:
        """Of the patches that are done with."""
        done = int(self._filled.sum()) + len(self.unreadable)
        return done / max(1, len(self._filled))

    def add(self, batch: PatchBatch, encoder: PatchEncoder) -> None:
        record = self.record
        self.unreadable += [row for row, _ in batch.unreadable]
        record.unreadable = len(self.unreadable)
        if batch.unreadable and not record.first_unreadable:
            record.first_unreadable = batch.unreadable[0][1]
        record.seconds["read"] += batch.seconds - batch.resample_seconds
        record.seconds["resample"] += batch.resample_seconds
        if not len(batch.rows):
            return
        started = time.perf_counter()
        encoded = encoder(batch.pixels)
        record.seconds["encode"] += time.perf_counter() - started
        self._features = self._put(self._features, batch.rows, encoded.features, self._dtype)
        if encoded.tokens is not None:
            self._tokens = self._put(self._tokens, batch.rows, encoded.tokens, np.dtype("f2"))
        self._filled[batch.rows] = True

    def bag(self, encoder: PatchEncoder, head: str | None) -> Bag:
        """The bag of what was read.

        Raises:
            SlideReadError: Patches with tissue, and not one could be decoded.
        """
        plan, record, rows = self.plan, self.record, self._filled
        if record.unreadable and not rows.any():
            raise SlideReadError(
                f"{record.slide_id}: none of {record.unreadable} patches could be decoded; first: "
                f"{record.first_unreadable}"
            )
        record.patches, record.padded = int(rows.sum()), int(plan.padded[rows].sum())
        features = self._features
        if features is None:
            features = np.empty((len(rows), encoder.feature_dim), self._dtype)
        whole = bool(rows.all())  # the usual case: no copy
        tokens = self._tokens
        return Bag(
            record.slide_id,
            features if whole else features[rows],
            plan.coords if whole else plan.coords[rows],
            _info(plan, encoder, record, head),
            tokens if whole or tokens is None else tokens[rows],
        )

    def _put(
        self, into: np.ndarray | None, rows: np.ndarray, values: np.ndarray, dtype: np.dtype
    ) -> np.ndarray:
        if into is None:
            into = np.zeros((len(self._filled), *values.shape[1:]), dtype)
        with np.errstate(over="ignore"):  # infinities are refused, with a remedy, by write_bag
            into[rows] = values
        return into


def _info(plan: SlidePlan, encoder: PatchEncoder, record: SlideRecord, head: str | None) -> BagInfo:
    geometry = plan.geometry
    return BagInfo(
        encoder=encoder.encoder.name,
        encoder_revision=encoder.encoder.revision,
        pooling=encoder.pooling,
        precision=encoder.encoder.precision,
        mpp=geometry.mpp,
        patch_px=geometry.patch_px,
        overlap=geometry.overlap,
        input_px=geometry.input_px,
        input_mpp=geometry.input_mpp,
        mpp0=plan.mpp0,
        mpp_source=plan.mpp_source,
        level=plan.level,
        level0_size=plan.level0_size,
        reader=plan.reader,
        tissue=plan.tissue_method,
        tissue_threshold=plan.least_tissue,
        pad_edges=plan.pad_edges,
        unreadable_patches=record.unreadable,
        padded_patches=record.padded,
        slide_sha256_head=head,
    )


# --- many slides ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Started:
    source: SlideSource
    record: SlideRecord
    plan: SlidePlan
    head: str


@dataclass(frozen=True, eq=False)
class _Ended:
    """The last event of a slide; `busy` where another process has it."""

    source: SlideSource
    record: SlideRecord
    read_whole: bool = False
    busy: bool = False


@dataclass
class _Run:
    out_dir: Path
    options: EmbedOptions
    geometry: PatchGeometry
    encoder: PatchEncoder
    progress: Progress | None
    state: EmbedState = field(default_factory=lambda: EmbedState(0))
    records: dict[str, SlideRecord] = field(default_factory=dict)
    locks: dict[str, SlideLock] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def work(self, sources: Sequence[SlideSource]) -> list[SlideSource]:
        """One pass; returns the slides that another process has."""
        busy: list[SlideSource] = []
        filling: _Filling | None = None
        head = ""
        events = ahead(self._events(sources), BATCHES_AHEAD)
        try:
            for event in events:
                if isinstance(event, _Started):
                    filling = _Filling(event.plan, event.record, self.options.features)
                    head = event.head
                elif isinstance(event, PatchBatch):
                    filling = self._encode(filling, event)
                elif event.busy:
                    busy.append(event.source)
                else:
                    if event.read_whole and filling is not None:
                        self._finish(filling, head)
                    self._close(event)
                    filling = None
                self._show(filling)
        finally:
            events.close()  # type: ignore[attr-defined]
            for lock in self.locks.values():
                lock.release()
            self.locks.clear()
        return busy

    def facts(self) -> dict[str, Any]:
        """What the summary says about the run."""
        encoder = self.encoder.encoder
        return {
            "encoder": encoder.name,
            "encoder_revision": encoder.revision,
            "licence": encoder.licence,
            "pooling": self.encoder.pooling,
            "device": str(encoder.device),
            "geometry": asdict(self.geometry),
            "options": asdict(self.options),
        }

    def _events(
        self, sources: Sequence[SlideSource]
    ) -> Generator[_Started | PatchBatch | _Ended, None, None]:
        """Plan and read: runs ahead in a thread."""
        for source in sources:
            record = SlideRecord.of(source)
            record.bag = f"{source.slide_id}.h5"
            path = self.out_dir / ".locks" / f"{source.slide_id}.lock"
            if self._settled(source, record):
                if path.exists() and (left := acquire(path)) is not None:
                    left.release()  # of a process killed between its bag and its lock
                yield _Ended(source, record)
                continue
            lock = acquire(path)
            if lock is None:
                self._tell(source, describe_holder(path))
                yield _Ended(source, record, busy=True)
                continue
            self.locks[source.slide_id] = lock
            # Once more: whoever held the lock until now may have finished the slide.
            if self._settled(source, record):
                yield _Ended(source, record)
                continue
            self._sweep(source)
            yield from self._read(source, record)

    def _read(
        self, source: SlideSource, record: SlideRecord
    ) -> Generator[_Started | PatchBatch | _Ended, None, None]:
        whole = False
        try:
            head = sha256_head(source.path)
            plan = plan_slide(source, self.geometry, self.options)
            yield _Started(source, record, plan, head)
            size, threads = self.encoder.batch_size, self.options.threads
            device = self.encoder.encoder.device
            yield from read_patches(plan, batch_size=size, threads=threads, device=device)
            whole = True
        except SLIDE_FAULTS as error:
            _blame(record, error)
        yield _Ended(source, record, read_whole=whole)

    def _settled(self, source: SlideSource, record: SlideRecord) -> bool:
        """Whether a bag decides the slide: the same (present), or another (refused)."""
        path = self.out_dir / f"{source.slide_id}.h5"
        if not path.exists():
            return False
        try:
            info, shape = read_info(path)
            wanted = self._wanted(source)
        except SLIDE_FAULTS as error:
            _blame(record, error)
            return True
        found = {name: getattr(info, name, None) for name in wanted}
        found["features"] = shape["features"]
        found["tokens"] = self.options.tokens and shape["tokens"]  # more than asked for is fine
        if "mpp0" not in wanted and info.mpp_source == "given":
            # A scale said last time and not now: the file's own may well be another.
            wanted["mpp0"] = "the file's own"
            found["mpp0"] = info.mpp0
        differing = [
            f"{name} {found[name]!r} there, {value!r} asked for"
            for name, value in wanted.items()
            if found[name] != value
        ]
        if differing:
            record.status = "refused"
            record.reason = (
                f"{source.slide_id}: {path} is another bag: {', '.join(differing)}. Choose another "
                "--out, or remove it."
            )
            return True
        record.status, record.patches = "present", shape["patches"]
        record.unreadable = info.unreadable_patches or 0
        record.padded, record.level = info.padded_patches or 0, info.level
        record.mpp0, record.mpp_source = info.mpp0, info.mpp_source or ""
        return True

    def _wanted(self, source: SlideSource) -> dict[str, Any]:
        """What a bag must say to be taken for finished."""
        options, geometry, encoder = self.options, self.geometry, self.encoder
        wanted: dict[str, Any] = {
            "encoder": encoder.encoder.name,
            "encoder_revision": encoder.encoder.revision,
            "pooling": encoder.pooling,
            "precision": encoder.encoder.precision,
            "mpp": geometry.mpp,
            "patch_px": geometry.patch_px,
            "overlap": geometry.overlap,
            "input_mpp": geometry.input_mpp,
            "tissue": TISSUE_METHOD,
            "tissue_threshold": options.tissue,
            "pad_edges": options.pad_edges,
            "features": options.features,
            "tokens": options.tokens,
            "slide_sha256_head": sha256_head(source.path),
        }
        if source.tissue_geojson is not None:
            wanted["tissue"] = annotation_method(source.tissue_geojson.read_bytes())
        given = options.slide_mpp if source.mpp is None else source.mpp
        return wanted if given is None else wanted | {"mpp0": given}

    def _sweep(self, source: SlideSource) -> None:
        """Remove what a killed run left of this slide; its lock is ours."""
        remove_drafts(self.out_dir / f"{source.slide_id}.h5")
        remove_drafts(self.out_dir / "previews" / f"{source.slide_id}.png")

    def _encode(self, filling: _Filling | None, batch: PatchBatch) -> _Filling | None:
        """Add a batch; a slide that fails here is dropped, and its later batches with it."""
        if filling is None:
            return None
        try:
            filling.add(batch, self.encoder)
        except torch.OutOfMemoryError as error:
            raise EmbedError(
                f"{self.encoder.encoder.name}: not even one patch fits into the memory of "
                f"{self.encoder.encoder.device}. Free it, or choose another --device."
            ) from error
        self.state.patches += len(batch.rows)
        return filling

    def _finish(self, filling: _Filling, head: str) -> None:
        """Write what was read, or say why not."""
        record, plan = filling.record, filling.plan
        started = time.perf_counter()
        try:
            bag = filling.bag(self.encoder, head)
            if self.options.preview:
                # Before the bag: a slide with a bag is not looked at again.
                folder = self.out_dir / "previews"
                folder.mkdir(exist_ok=True)
                picture = preview_png(plan, filling.unreadable)
                write_atomically(folder / f"{record.slide_id}.png", picture)
            if not len(bag.features):
                record.status = "no_tissue"
                record.reason = no_tissue_reason(plan)
                return
            write_bag(self.out_dir / record.bag, bag)
        except (SlideError, BagError) as error:
            _blame(record, error)
            return
        record.status = "ok"
        record.seconds["write"] = time.perf_counter() - started

    def _close(self, event: _Ended) -> None:
        record = event.record
        if record.status in ("no_tissue", "refused", "failed"):
            record.bag, record.patches, record.padded = "", 0, 0
        self.records[record.slide_id] = record
        self.state.slides_done += 1
        lock = self.locks.pop(record.slide_id, None)
        if lock is not None:
            lock.release()

    def _tell(self, source: SlideSource, holder: str) -> None:
        if source.slide_id not in self.told:
            self.told.add(source.slide_id)
            logger.info("%s: %s has it; looked at again later.", source.slide_id, holder)

    def _show(self, filling: _Filling | None) -> None:
        if self.progress is not None:
            part = 0.0 if filling is None else filling.share
            self.state.share = self.state.slides_done + part
            self.progress(self.state)


def _blame(record: SlideRecord, error: BaseException) -> None:
    record.status = "refused" if isinstance(error, SlideScaleError) else "failed"
    record.reason = reason_of(record.slide_id, error)


def loaded_encoder(encoder: Encoder | str, options: EmbedOptions) -> Encoder:
    """An encoder on the device and at the precision of the options; a loaded one as it is.

    Raises:
        EmbedError: There is no such device.
        EncoderError: The encoder cannot be had.
    """
    if isinstance(encoder, Encoder):
        return encoder
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_encoder(encoder, device=torch.device(device), precision=options.precision)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise EmbedError(f"--device {options.device}: {error}") from error


def _patch_encoder(encoder: Encoder, options: EmbedOptions) -> PatchEncoder:
    return PatchEncoder(
        encoder, pooling=options.pooling, tokens=options.tokens, batch_size=options.batch_size
    )

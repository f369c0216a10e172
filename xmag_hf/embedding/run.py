"""One process that takes slides in turn and leaves a bag for each.

Planning and reading run a few batches ahead of encoding and writing, so the next slide is read
while the last one is encoded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xmag_hf.atomic_write import remove_drafts, write_atomically
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.lock import SlideLock, acquire, describe_holder
from xmag_hf.slides import SlideError, sha256_head
from xmag_hf.slides.tissue import METHOD as TISSUE_METHOD

from .ahead import ahead
from .annotation import annotation_method
from .bag import BagError, not_the_same, read_info, write_bag
from .encode import PatchEncoder
from .filling import Filling
from .options import EmbedError, EmbedOptions
from .plan import PatchGeometry, SlidePlan, no_tissue_reason, patch_geometry, plan_slide
from .preview import preview_png
from .read import PatchBatch, read_patches
from .records import SlideRecord
from .sources import SLIDE_FAULTS, SlideSource, changed_at, reason_of, status_of

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 3
WAIT_SECONDS = 1.0  # between looks at slides that another process has


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
class Run:
    """What one process needs and knows while it works. Make it with `start_run`."""

    out_dir: Path
    options: EmbedOptions
    geometry: PatchGeometry
    encoder: PatchEncoder
    progress: Progress | None
    state: EmbedState = field(default_factory=lambda: EmbedState(0))
    records: dict[str, SlideRecord] = field(default_factory=dict)
    locks: dict[str, SlideLock] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def finish(self, sources: Iterable[SlideSource]) -> None:
        """Take slides until each has a record; wait for those that another process has."""
        busy = self.work(sources)
        while busy:
            done = self.state.slides_done
            busy = self.work(busy)
            if self.state.slides_done == done:
                time.sleep(WAIT_SECONDS)

    def work(self, sources: Iterable[SlideSource]) -> list[SlideSource]:
        """One pass; returns the slides that another process has."""
        busy: list[SlideSource] = []
        filling: Filling | None = None
        head = ""
        events = ahead(self._events(sources), BATCHES_AHEAD)
        try:
            for event in events:
                if isinstance(event, _Started):
                    filling = Filling(event.plan, event.record, self.options.features)
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
            "encoder_commit": encoder.card.commit,
            "licence": encoder.licence,
            "pooling": self.encoder.pooling,
            "device": str(encoder.device),
            "geometry": asdict(self.geometry),
            "options": asdict(self.options),
        }

    def _events(
        self, sources: Iterable[SlideSource]
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
        """Whether a bag decides the slide: the same (present), or another (refused).

        One that lost patches does not, if the slide was copied again since.
        """
        path = self.out_dir / f"{source.slide_id}.h5"
        if not path.exists():
            return False
        try:
            info, shape = read_info(path)
            wanted = self._wanted(source)
            copied_again = info.unreadable_patches and (
                changed_at(source.path) > path.stat().st_mtime
            )
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
            f"{name} {found[name]!r} there, {wanted[name]!r} asked for"
            for name in not_the_same(wanted, found)
        ]
        if differing:
            record.status = "refused"
            record.reason = (
                f"{source.slide_id}: {path} is another bag: {', '.join(differing)}. Choose another "
                "--out, or remove it."
            )
            return True
        if copied_again:
            return False
        record.status, record.patches = "present", shape["patches"]
        record.unreadable = info.unreadable_patches or 0
        if record.unreadable:
            record.reason = (
                f"{source.slide_id}: {record.unreadable} patches could not be decoded. Copy the "
                f"slide again, or remove {path} to try again."
            )
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
            "normalisation": encoder.encoder.normalisation,
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

    def _encode(self, filling: Filling | None, batch: PatchBatch) -> Filling | None:
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

    def _finish(self, filling: Filling, head: str) -> None:
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

    def _show(self, filling: Filling | None) -> None:
        if self.progress is not None:
            part = 0.0 if filling is None else filling.share
            self.state.share = self.state.slides_done + part
            self.progress(self.state)


def _blame(record: SlideRecord, error: BaseException) -> None:
    record.status = status_of(error)
    record.reason = reason_of(record.slide_id, error)


def start_run(
    out_dir: Path,
    encoder: Encoder | str,
    options: EmbedOptions,
    progress: Progress | None = None,
    *,
    slides: int = 0,
) -> Run:
    """A run on one device, its folders made.

    Raises:
        EmbedError: The encoder cannot do what the options ask for, or there is no such device.
        EncoderError: The encoder cannot be had.
        OSError: The folder cannot be written.
    """
    loaded = loaded_encoder(encoder, options)
    geometry = patch_geometry(loaded.card, options)
    run = Run(out_dir, options, geometry, patch_encoder(loaded, options), progress)
    (out_dir / ".locks").mkdir(parents=True, exist_ok=True)
    run.state.slides = slides
    return run


def named_devices(options: EmbedOptions) -> list[str]:
    """The devices that options name; on auto one, the first GPU if there is one, else the CPU."""
    if options.device == "auto":
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    return [name.strip() for name in options.device.split(",")]


def on_every_gpu(options: EmbedOptions) -> EmbedOptions:
    """The options with every GPU named, if they leave the device open and there are several."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device != "auto" or gpus < 2:
        return options
    return replace(options, device=",".join(f"cuda:{number}" for number in range(gpus)))


def one_device(options: EmbedOptions) -> str:
    """The device of work that is not shared out.

    Raises:
        EmbedError: Several are named.
    """
    devices = named_devices(options)
    if len(devices) > 1:
        raise EmbedError(f"--device {options.device}: this takes one device. Name one of them.")
    return devices[0]


def checked_device(name: str) -> str:
    """The name of a device, once it is known to be there: before weights are loaded for it.

    Raises:
        EmbedError: It is not.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's words for one that is not there
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise EmbedError(
            f"--device {name}: {reason}. `auto` takes what there is; GPUs are called cuda:0, ..."
        ) from error
    return name


def loaded_encoder(encoder: Encoder | str, options: EmbedOptions) -> Encoder:
    """An encoder on the device and at the precision of the options; a loaded one as it is.

    Raises:
        EmbedError: There is no such device.
        EncoderError: The encoder cannot be had.
    """
    if isinstance(encoder, Encoder):
        return encoder
    device = checked_device(one_device(options))
    try:
        return load_encoder(encoder, device=torch.device(device), precision=options.precision)
    except RuntimeError as error:  # the weights do not fit
        raise EmbedError(f"--device {device}: {error}") from error


def patch_encoder(encoder: Encoder, options: EmbedOptions) -> PatchEncoder:
    """As the options ask for; raises EmbedError if the encoder cannot."""
    return PatchEncoder(
        encoder,
        pooling=options.pooling,
        tokens=options.tokens,
        batch_size=options.batch_size,
        compiled=options.compile,
    )

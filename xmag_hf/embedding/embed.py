"""Slides to bags: one, or a folder of them that several processes may fill together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xmag_hf.encoders import Encoder
from xmag_hf.slides import sha256_head

from .ahead import ahead
from .bag import Bag
from .devices import run_on_devices
from .filling import Filling
from .options import EmbedError, EmbedOptions
from .plan import patch_geometry, plan_slide
from .read import read_patches
from .records import RunSummary, SlideRecord, write_summary
from .run import BATCHES_AHEAD, Progress, loaded_encoder, named_devices, patch_encoder, start_run
from .sources import SlideSource

MAX_ID_BYTES = 200  # with the temporary name's suffix a file name may have 255


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
    encode = patch_encoder(loaded, options)
    geojson = None if tissue_geojson is None else Path(tissue_geojson)
    source = SlideSource(Path(path), slide_id or "", mpp0, "", geojson)
    head = sha256_head(source.path) if source.path.is_file() else None
    plan = plan_slide(source, geometry, options)
    filling = Filling(plan, SlideRecord.of(source), options.features)
    batches = read_patches(
        plan,
        batch_size=encode.batch_size,
        threads=options.threads,
        device=loaded.device,
    )
    for batch in ahead(batches, BATCHES_AHEAD):  # type: ignore[arg-type]
        filling.add(batch, encode)
    return filling.bag(encode, head)


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
    on one folder, and each waits at its end for the slides that another still has. Several devices
    (`options.device`, with commas) get a process each, started anew: a program that calls this
    needs the usual `if __name__ == "__main__":`.

    Args:
        sources: The slides.
        out_dir: Gets `<slide_id>.h5`, `previews/<slide_id>.png`, summary.csv and summary.json,
            which keep the lines of earlier runs' other slides.
        encoder: A name for `load_encoder`; or loaded, then its device is the only one.
        options: Default `EmbedOptions()`.
        progress: Called after each batch and slide, or a few times a second.

    Returns:
        The summary of this run; slides that failed are in it, not raised.

    Raises:
        EmbedError: No slides, ids that are no file names or stand for two slides, or an encoder
            that cannot do what the options ask for.
        EncoderError: The encoder cannot be had.
        OSError: The output cannot be written (a full disk is no fault of a slide). Finished bags
            stay; the same command goes on.
    """
    options = options or EmbedOptions()
    check_sources(sources)
    out_dir = Path(out_dir)
    records: dict[str, SlideRecord] = {}
    facts: dict[str, Any] = {}
    devices = named_devices(options)[: len(sources)]
    try:
        if isinstance(encoder, str) and len(devices) > 1:
            run_on_devices(
                sources, out_dir, encoder, options, devices, records, facts, progress=progress
            )
        else:
            alone = options if isinstance(encoder, Encoder) else replace(options, device=devices[0])
            run = start_run(out_dir, encoder, alone, progress, slides=len(sources))
            records, facts = run.records, run.facts()
            facts["options"]["device"] = options.device
            run.finish(sources)
    except BaseException:
        if records:
            with contextlib.suppress(OSError):
                done = RunSummary(out_dir, tuple(records.values()), facts)
                write_summary(done, ended=False)
        raise
    summary = RunSummary(out_dir, tuple(records[source.slide_id] for source in sources), facts)
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

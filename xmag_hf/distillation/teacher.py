"""Where a run's targets come from: cached teacher features, or the teacher itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xmag_hf.distillation.corpus import Corpus
from xmag_hf.distillation.hub_cache import Fetch, find_hub_cache
from xmag_hf.distillation.options import DistillationError, DistillOptions
from xmag_hf.distillation.scoring import live_features
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    TeacherIdentity,
    build_cache,
    find_cache,
    finish_cache,
    teacher_identity,
)
from xmag_hf.distillation.teacher_encoding import CELLS, encode_sub_patches
from xmag_hf.encoders import Encoder, EncoderCard, EncoderError, check_encoder, load_encoder

SUB_PATCH_PX = 224
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """Where targets come from: a cache, or a live encoder; exactly one of the two.

    Attributes:
        name: Table name or id.
        revision: Of its weights.
        precision: It runs, or ran, in.
        licence: Of its weights.
        embed_dim: d_T.
        features: Cached features.
        encoder: Live encoder, on the device.
        reference: Cached features of the 20x sub-patches, which scores are against; the same as
            `features` unless those are of the enlarged 5x view.
    """

    name: str
    revision: str
    precision: str
    licence: str
    embed_dim: int
    features: TeacherFeatures | None
    encoder: Encoder | None
    reference: TeacherFeatures | None


@dataclass(frozen=True)
class TeacherPlan:
    """How a run will get its targets, known before any weights are loaded.

    Attributes:
        name: Of the teacher, as its card says.
        revision: Of its weights.
        precision: It runs, or ran, in.
        cache_dir: Holds one folder per key.
        cached: Identity of a complete cache, if one is to be used.
        reference: Identity of a complete cache of the 20x sub-patches, where `cached` is, or will
            be, of the enlarged 5x view.
        fetches: What gets the files of a cache that lies on the Hub, by its key.
    """

    name: str
    revision: str
    precision: str
    cache_dir: Path
    cached: TeacherIdentity | None
    reference: TeacherIdentity | None = None
    fetches: dict[str, Fetch] = field(default_factory=dict)


def check_teacher(options: DistillOptions) -> EncoderCard | EncoderError:
    """Make sure that the teacher can be had, before any data is touched.

    Args:
        options: Teacher and cache.

    Returns:
        Its card; or, with --cache-teacher, what stands against it: a complete cache from another
        machine may still serve (`plan_teacher` decides).

    Raises:
        EncoderError: Gated, missing or unknown.
        DistillationError: It does not take 224 px sub-patches.
    """
    try:
        card = check_encoder(options.teacher)
    except EncoderError as error:
        if not options.cache_teacher:
            raise
        return error
    if card.input_px != SUB_PATCH_PX:
        raise DistillationError(
            f"{options.teacher} takes {card.input_px} px, but a sub-patch has {SUB_PATCH_PX} px. "
            "Choose a teacher for 224 px."
        )
    return card


def plan_teacher(
    options: DistillOptions,
    checked: EncoderCard | EncoderError,
    corpus: Corpus,
    accelerator: Accelerator,
) -> TeacherPlan:
    """Decide between a cache that is there and the teacher itself; the same on every process.

    Args:
        options: Precision and cache.
        checked: From `check_teacher`.
        corpus: To encode.
        accelerator: The processes.

    Returns:
        The plan.

    Raises:
        EncoderError: The teacher cannot be had, and no complete cache stands in for it.
        DistillationError: Several caches fit, or processes see different ones.
    """
    cache_dir = cache_folder(options, corpus)
    cached = reference = None
    fetches: dict[str, Fetch] = {}
    if options.cache_teacher:
        seen = (options.teacher_view, options.cache_views)
        cached = _agreed_cache(options, *seen, checked, corpus, accelerator, fetches)
    if options.cache_teacher and options.teacher_view != "20x":
        for views in sorted({1, options.cache_views}):  # either holds the view as it lies
            found = _agreed_cache(options, "20x", views, checked, corpus, accelerator, fetches)
            reference = reference or found
    scored_live = options.teacher_view != "20x" and options.holdout and reference is None
    if isinstance(checked, EncoderError) and (cached is None or scored_live):
        raise checked
    if cached is not None:
        if isinstance(checked, EncoderError):
            logger.warning("cached features of %s; not checked: %s", cached.encoder, checked)
        facts = (cached.encoder, cached.revision, cached.precision)
    else:
        card = cast(EncoderCard, checked)
        facts = (card.name, str(card.revision), precision_on(accelerator.device, options))
    return TeacherPlan(*facts, cache_dir, cached, reference, fetches)


def open_teacher(
    options: DistillOptions,
    plan: TeacherPlan,
    corpus: Corpus,
    accelerator: Accelerator,
    quiet: bool,
) -> Teacher:
    """Open the targets of a run, computing the cache first if it is asked for and not there.

    With a complete cache the teacher itself is not loaded.

    Args:
        options: Teacher, cache.
        plan: From `plan_teacher`.
        corpus: To encode.
        accelerator: Device, and the processes that build the cache together.
        quiet: No progress bar.

    Returns:
        The teacher.

    Raises:
        DistillationError: A stale or damaged cache, or a pair that does not decode.
    """
    reference = None
    if plan.reference is not None:
        folder = plan.cache_dir / plan.reference.key
        fetch = plan.fetches.get(plan.reference.key)
        reference = TeacherFeatures(folder, corpus, plan.reference, fetch)
    identity = plan.cached
    if identity is None:
        encoder = load_encoder(options.teacher, device=accelerator.device, precision=plan.precision)
        if not options.cache_teacher:
            facts = (encoder.name, encoder.revision, encoder.precision, encoder.licence)
            return Teacher(*facts, encoder.embed_dim, None, encoder, reference)
        identity = teacher_identity(encoder, corpus, options.teacher_view, options.cache_views)
        _fill_cache(options, corpus, encoder, plan.cache_dir, accelerator, quiet)
    fetch = plan.fetches.get(identity.key)
    features = TeacherFeatures(plan.cache_dir / identity.key, corpus, identity, fetch)
    facts = (identity.encoder, identity.revision, identity.precision, features.licence)
    if options.teacher_view == "20x":
        reference = features
    return Teacher(*facts, features.teacher_dim, features, None, reference)


def scoring_features(
    options: DistillOptions, teacher: Teacher, corpus: Corpus, device: torch.device
) -> Callable[[np.ndarray], np.ndarray]:
    """What students are scored against: features of the 20x sub-patches, whatever they learnt from.

    Args:
        options: Teacher and its batch size.
        teacher: Of the run.
        corpus: To read.
        device: For a teacher that has to be loaded again, because only its features of the
            enlarged 5x view are cached.

    Returns:
        A function (n,) rows -> (n, 16, d_T).
    """
    if teacher.reference is not None:
        return teacher.reference.rows
    encoder = teacher.encoder
    if encoder is None:
        encoder = load_encoder(options.teacher, device=device, precision=teacher.precision)
    batch_size = options.teacher_batch_size
    return live_features(
        corpus,
        lambda patches: encode_sub_patches(encoder, patches, batch_size),
        pairs_per_call=max(1, batch_size // CELLS),
    )


def agree(accelerator: Accelerator, value: Any, what: str, option: str) -> None:
    """Raise unless all processes found the same on disk: they would wait for each other forever.

    Args:
        accelerator: The processes.
        value: What this one found.
        what: Name of it.
        option: That says where it lies.

    Raises:
        DistillationError: The disk is not shared.
    """
    values = gather_object([value])
    if any(other != values[0] for other in values):
        raise DistillationError(
            f"processes see different {what}: {values}. Put {option} on a disk that all share."
        )


def best_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def precision_on(device: torch.device, options: DistillOptions) -> str:
    """What the teacher runs in: auto is bf16 on a GPU, else fp32."""
    if options.teacher_precision != "auto":
        return options.teacher_precision
    return "bf16" if device.type == "cuda" else "fp32"


def _agreed_cache(
    options: DistillOptions,
    teacher_view: str,
    views: int,
    checked: EncoderCard | EncoderError,
    corpus: Corpus,
    accelerator: Accelerator,
    fetches: dict[str, Fetch],
) -> TeacherIdentity | None:
    """A complete cache of this view that every process sees, if there is one.

    One that lies on the Hub, beside the corpus, is entered in `fetches`.
    """
    cached = complete_cache(options, teacher_view, views, checked, corpus)
    if cached is None and not Path(options.data).is_dir():
        wanted = _wanted(options, teacher_view, views, checked)
        found = find_hub_cache(options.data, corpus, wanted)
        if found is not None:
            cached, fetches[found[0].key] = found
    agree(accelerator, cached and cached.key, "teacher caches", "--cache-dir")
    return cached


def complete_cache(
    options: DistillOptions,
    teacher_view: str,
    views: int,
    checked: EncoderCard | EncoderError,
    corpus: Corpus,
) -> TeacherIdentity | None:
    """The complete cache that `options` ask for, if it is there.

    Args:
        options: Teacher, precision, sharing and folder.
        teacher_view: 20x or 5x.
        views: Number of dihedral views.
        checked: From `check_teacher`.
        corpus: That it must belong to.

    Returns:
        Its identity, or None.

    Raises:
        DistillationError: Several fit.
    """
    wanted = _wanted(options, teacher_view, views, checked)
    return find_cache(cache_folder(options, corpus), corpus=corpus, **wanted)


def _wanted(
    options: DistillOptions, teacher_view: str, views: int, checked: EncoderCard | EncoderError
) -> dict[str, Any]:
    """What a cache is chosen by."""
    card = checked if isinstance(checked, EncoderCard) else None
    return {
        "encoder": card.name if card else options.teacher,
        "precision": None if options.teacher_precision == "auto" else options.teacher_precision,
        "revision": card.revision if card else None,
        "share": options.share_sub_patches,
        "teacher_view": teacher_view,
        "views": views,
    }


def _fill_cache(
    options: DistillOptions,
    corpus: Corpus,
    encoder: Encoder,
    cache_dir: Path,
    accelerator: Accelerator,
    quiet: bool,
) -> None:
    world = accelerator.num_processes
    with progress_bar(accelerator, quiet) as bar:
        task = bar.add_task("teacher features", total=len(corpus.index) // world, note="")
        partial = build_cache(
            corpus,
            encoder,
            cache_dir,
            share=options.share_sub_patches,
            teacher_view=options.teacher_view,
            views=options.cache_views,
            batch_size=options.teacher_batch_size,
            num_threads=max(1, options.num_workers),
            rank=accelerator.process_index,
            world=world,
            advance=lambda pairs: bar.advance(task, pairs),
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_cache(partial)
    accelerator.wait_for_everyone()


def cache_folder(options: DistillOptions, corpus: Corpus) -> Path:
    """Where caches of a corpus lie: as said, else beside a local corpus, else under HF_HOME."""
    if options.cache_dir:
        return Path(options.cache_dir)
    if Path(options.data).is_dir():
        return Path(options.data) / "teacher"
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "xmag_hf" / corpus.location.replace("/", "--") / "teacher"


def progress_bar(accelerator: Accelerator, quiet: bool) -> Progress:
    """A bar on the main process; tasks carry a field `note`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=quiet or not accelerator.is_main_process,
    )

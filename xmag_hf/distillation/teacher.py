"""Where a run's targets come from: cached teacher features, or the teacher itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xmag_hf.distillation.corpus import Corpus
from xmag_hf.distillation.options import DistillationError, DistillOptions
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    TeacherIdentity,
    build_cache,
    find_cache,
    finish_cache,
    teacher_identity,
)
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
    """

    name: str
    revision: str
    precision: str
    licence: str
    embed_dim: int
    features: TeacherFeatures | None
    encoder: Encoder | None


@dataclass(frozen=True)
class TeacherPlan:
    """How a run will get its targets, known before any weights are loaded.

    Attributes:
        name: Of the teacher, as its card says.
        revision: Of its weights.
        precision: It runs, or ran, in.
        cache_dir: Holds one folder per key.
        cached: Identity of a complete cache, if one is to be used.
    """

    name: str
    revision: str
    precision: str
    cache_dir: Path
    cached: TeacherIdentity | None


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
    wanted = None if options.teacher_precision == "auto" else options.teacher_precision
    card = checked if isinstance(checked, EncoderCard) else None
    cache_dir = _cache_dir(options, corpus)
    cached = None
    if options.cache_teacher:
        cached = find_cache(
            cache_dir,
            card.name if card else options.teacher,
            corpus,
            precision=wanted,
            revision=card.revision if card else None,
            share=options.share_sub_patches,
        )
        agree(accelerator, cached and cached.key, "teacher caches", "--cache-dir")
    if cached is not None:
        if isinstance(checked, EncoderError):
            logger.warning("cached features of %s; not checked: %s", cached.encoder, checked)
        return TeacherPlan(cached.encoder, cached.revision, cached.precision, cache_dir, cached)
    if isinstance(checked, EncoderError):
        raise checked
    on_gpu = accelerator.device.type == "cuda"
    precision = wanted or ("bf16" if on_gpu else "fp32")
    return TeacherPlan(checked.name, str(checked.revision), precision, cache_dir, None)


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
    identity, encoder = plan.cached, None
    if identity is None:
        encoder = load_encoder(options.teacher, device=accelerator.device, precision=plan.precision)
        if not options.cache_teacher:
            facts = (encoder.name, encoder.revision, encoder.precision, encoder.licence)
            return Teacher(*facts, encoder.embed_dim, None, encoder)
        identity = teacher_identity(encoder, corpus)
        _fill_cache(options, corpus, encoder, plan.cache_dir, accelerator, quiet)
    features = TeacherFeatures(plan.cache_dir / identity.key, corpus, identity)
    facts = (identity.encoder, identity.revision, identity.precision, features.licence)
    return Teacher(*facts, features.teacher_dim, features, None)


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


def _cache_dir(options: DistillOptions, corpus: Corpus) -> Path:
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

"""Where a run's targets come from: cached teacher features, or the teacher itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xmag_hf.distillation.corpus import Corpus
from xmag_hf.distillation.options import DistillOptions
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    build_cache,
    find_cache,
    finish_cache,
    teacher_identity,
)
from xmag_hf.encoders import Encoder, load_encoder


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


def open_teacher(
    options: DistillOptions, corpus: Corpus, accelerator: Accelerator, quiet: bool
) -> Teacher:
    """Open the targets of a run, computing the cache first if it is asked for and not there.

    With a complete cache the teacher itself is not loaded.

    Args:
        options: Teacher, precision, cache.
        corpus: To encode.
        accelerator: Device, and the processes that build the cache together.
        quiet: No progress bar.

    Returns:
        The teacher.

    Raises:
        DistillationError: A stale or damaged cache, or a pair that does not decode.
    """
    on_gpu = accelerator.device.type == "cuda"
    precision = options.teacher_precision
    wanted = None if precision == "auto" else precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    cache_dir = _cache_dir(options, corpus)
    identity = None
    if options.cache_teacher:
        identity = find_cache(cache_dir, options.teacher, wanted, corpus, options.share_sub_patches)
        accelerator.wait_for_everyone()
    if identity is None:
        encoder = load_encoder(options.teacher, device=accelerator.device, precision=precision)
        if not options.cache_teacher:
            return Teacher(
                encoder.name,
                encoder.revision,
                encoder.precision,
                encoder.licence,
                encoder.embed_dim,
                None,
                encoder,
            )
        identity = teacher_identity(encoder, corpus)
        _fill_cache(options, corpus, encoder, cache_dir, accelerator, quiet)
    features = TeacherFeatures(cache_dir / identity.key, corpus, identity)
    return Teacher(
        identity.encoder,
        identity.revision,
        identity.precision,
        features.licence,
        features.teacher_dim,
        features,
        None,
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

"""Fill a teacher cache without training: several processes or machines, one folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from xmag_hf.distillation.corpus import Corpus, open_corpus
from xmag_hf.distillation.options import DistillationError, DistillOptions
from xmag_hf.distillation.teacher import (
    cache_folder,
    check_teacher,
    complete_cache,
    precision_on,
)
from xmag_hf.distillation.teacher_cache import (
    TeacherIdentity,
    build_cache,
    building_folder,
    finish_cache,
    missing_shards,
    shard_name,
    teacher_identity,
)
from xmag_hf.encoders import EncoderError, load_encoder


@dataclass(frozen=True)
class CacheReport:
    """What one process did for a cache.

    Attributes:
        folder: Of the cache; `.partial` while shards are missing.
        missing: Shards that other processes have yet to finish.
        pairs: Encoded by this call (and by another with the same share, if there was one at the
            same time); 0 if there was nothing left to do.
        seconds: That took, the loading of the teacher not included.
        bytes_per_pair: On disk, of what was encoded; 0 if nothing was.
    """

    folder: Path
    missing: int
    pairs: int
    seconds: float
    bytes_per_pair: float


def fill_cache(
    options: DistillOptions,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    advance: Callable[[int], None] = lambda pairs: None,
) -> CacheReport:
    """Compute the teacher features of a corpus; finished shards are not done again.

    Processes need no link but the folder: the one that ends last gives the cache its name.

    Args:
        options: Corpus, teacher and cache; `cache_teacher` is taken as said.
        device: Of the teacher.
        rank: This process does shards `rank::world`.
        world: Number of processes, on one machine or many.
        advance: Called with the number of pairs finished, for progress bars.

    Returns:
        What was done.

    Raises:
        DistillationError: `rank` is not below `world`, or what `build_cache` refuses.
        EncoderError: The teacher cannot be had.
    """
    if not 0 <= rank < world:
        raise DistillationError(f"--rank={rank}: must be at least 0 and below --world={world}.")
    checked = check_teacher(options)
    corpus = open_corpus(options.data, streaming=options.streaming)
    cache_dir, share = cache_folder(options, corpus), options.share_sub_patches
    seen = (options.teacher_view, options.cache_views)
    complete = complete_cache(options, *seen, checked, corpus)
    if complete is not None:
        return CacheReport(cache_dir / complete.key, 0, 0, 0.0, 0.0)
    if isinstance(checked, EncoderError):
        raise checked
    precision = precision_on(device, options)
    encoder = load_encoder(options.teacher, device=device, precision=precision)
    identity = teacher_identity(encoder, corpus, *seen)
    todo = missing_shards(building_folder(cache_dir, identity), corpus, share)
    began = time.perf_counter()
    build_cache(
        corpus,
        encoder,
        cache_dir,
        share=share,
        teacher_view=options.teacher_view,
        views=options.cache_views,
        batch_size=options.teacher_batch_size,
        num_threads=max(1, options.num_workers),
        rank=rank,
        world=world,
        advance=advance,
    )
    seconds = time.perf_counter() - began
    mine = [number for number in todo if number % world == rank]
    return _report(cache_dir, identity, corpus, share, mine, seconds)


def _report(
    cache_dir: Path,
    identity: TeacherIdentity,
    corpus: Corpus,
    share: bool,
    mine: list[int],
    seconds: float,
) -> CacheReport:
    """Count what was written, and complete the cache if nothing is missing."""
    pairs = int(corpus.shard_rows[mine].sum())
    names = [shard_name(number, len(corpus.shards)) for number in mine]
    folder = building_folder(cache_dir, identity)
    final = cache_dir / identity.key  # another process that ends now may have renamed it
    paths = [(folder if (folder / name).exists() else final) / name for name in names]
    size = sum(path.stat().st_size for path in paths)
    missing = len(missing_shards(building_folder(cache_dir, identity), corpus, share))
    folder = folder if missing else finish_cache(folder)
    return CacheReport(folder, missing, pairs, seconds, size / max(pairs, 1))

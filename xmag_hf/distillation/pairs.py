"""Pairs as training batches: decoded, augmented, shuffled by epoch, split by rank.

What a sample looks like depends only on (seed, epoch, row), never on the worker, the process or
the moment, so an interrupted run goes on with the very same batches.
"""

from __future__ import annotations

import glob
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from xmag_hf.distillation.augmentation import (
    N_VIEWS,
    cell_permutation,
    dihedral_view,
    draw_jitter,
    draw_stain,
    sample_generator,
    zoomed_view,
)
from xmag_hf.distillation.corpus import Corpus, iterate_shard, read_pairs
from xmag_hf.distillation.options import DistillationError, DistillOptions
from xmag_hf.distillation.teacher_cache import TeacherFeatures
from xmag_hf.distillation.teacher_encoding import (
    VIEW_PX,
    cut_cells,
    decode_image,
    teacher_column,
    teacher_image,
)

READING_PATHS = ("image_5x", "image_5x_scanner", "image_5x_fast")
WIDE = "image_5x_wide"
EVEN_SHARE = 0.9  # of an equal share of the pairs: what whole shards must give every process
PATCH_TOKENS = 16 * 16  # of every ViT student at 224 px
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class PairReader:
    """Turns a stored pair into a sample.

    Attributes:
        features: Cached teacher features; None to decode the sub-patches for a live teacher.
        dihedral: Draw one of the eight views, or of those cached if there are several.
        color_jitter: Draw jitter factors (applied later, on the device).
        seed: Of the augmentation.
        teacher_view: What a live teacher sees: 20x, or 5x enlarged.
        stain_jitter: Strength of the stain factors drawn (applied later); 0 draws none.
        token_mask_ratio: Share of the student's patch tokens to mask; 0 draws none.
        student_columns: Images of the student's view; of several one is drawn, of those that the
            row has.
        mpp_jitter: Largest change of the view's um/px, as a share; 0 draws none.
    """

    features: TeacherFeatures | None
    dihedral: bool
    color_jitter: bool
    seed: int
    teacher_view: str = "20x"
    stain_jitter: float = 0.0
    token_mask_ratio: float = 0.0
    student_columns: tuple[str, ...] = ("image_5x",)
    mpp_jitter: float = 0.0

    @classmethod
    def of(
        cls, options: DistillOptions, features: TeacherFeatures | None, corpus: Corpus
    ) -> PairReader:
        """The reader of a run."""
        return cls(
            features,
            options.dihedral,
            options.color_jitter,
            options.seed,
            options.teacher_view,
            options.stain_jitter,
            options.token_mask_ratio,
            student_columns(options, corpus),
            options.mpp_jitter,
        )

    @property
    def columns(self) -> list[str]:
        """Columns to read: the 20x image only if the teacher must see it."""
        seen = [] if self.features is not None else [teacher_column(self.teacher_view)]
        return list(dict.fromkeys([*self.student_columns, *seen]))

    def __call__(self, row: int, epoch: int, values: dict[str, Any]) -> dict[str, Any]:
        """Make one sample.

        Args:
            row: Of the corpus.
            epoch: Counts from 0.
            values: Columns of the pair, images as {"bytes", "path"}.

        Returns:
            `row`; `image_5x` (3, 224, 224) uint8; `jitter` (4,) float32, `stain` (6,) float32,
            `mask` (256,) bool, `zoom` () float32, each if drawn; and `features` (16, d_T) float16
            or `sub_patches` (16, 3, 224, 224) uint8.
        """
        draw = sample_generator(self.seed, epoch, row)
        views = self.features.views if self.features is not None else (0,)
        choice = views if len(views) > 1 else tuple(range(N_VIEWS))
        view = choice[draw.integers(len(choice))] if self.dihedral else 0
        sample: dict[str, Any] = {"row": row}
        if self.color_jitter:
            sample["jitter"] = torch.from_numpy(draw_jitter(draw))
        # Drawn after all else, so that the other draws do not depend on these options.
        if self.stain_jitter:
            sample["stain"] = torch.from_numpy(draw_stain(draw, self.stain_jitter))
        if self.token_mask_ratio:
            masked = round(self.token_mask_ratio * PATCH_TOKENS)
            sample["mask"] = torch.from_numpy(draw.permutation(PATCH_TOKENS) < masked)
        image = self._student_image(row, values, draw, sample)
        sample["image_5x"] = _channels_first(dihedral_view(image, view))
        if self.features is not None:
            sample["features"] = torch.from_numpy(self._cached(self.features, row, view))
        else:
            image = teacher_image(values, self.teacher_view, f"pair {row},")
            sample["sub_patches"] = _channels_first(cut_cells(image, self.teacher_view, view))
        return sample

    def _student_image(
        self, row: int, values: dict[str, Any], draw: np.random.Generator, sample: dict[str, Any]
    ) -> np.ndarray:
        """(224, 224, 3) of the student's view; says its zoom in `sample` if that is drawn."""
        there = [name for name in self.student_columns if values[name] is not None]
        if not there:
            raise DistillationError(f"pair {row}: no picture in {', '.join(self.student_columns)}.")
        name = there[draw.integers(len(there))] if len(self.student_columns) > 1 else there[0]
        where = f"pair {row}, {name}"
        if not self.mpp_jitter:
            return decode_image(values[name]["bytes"], VIEW_PX, where)
        zoom = draw.uniform(1 - self.mpp_jitter, 1 + self.mpp_jitter)
        sample["zoom"] = torch.tensor(zoom, dtype=torch.float32)
        try:
            return zoomed_view(decode_image(values[name]["bytes"], None, where), zoom)
        except DistillationError:
            raise
        except ValueError as error:
            raise DistillationError(
                f"{where}: {error} Lower --mpp_jitter, or build the corpus with a larger --margin."
            ) from error

    @staticmethod
    def _cached(features: TeacherFeatures, row: int, view: int) -> np.ndarray:
        """(16, d_T) of the view: its own, or those of the pair as it lies, permuted."""
        if view in features.views:
            return features.view(row, features.views.index(view))
        return features[row][cell_permutation(view)]


def student_columns(options: DistillOptions, corpus: Corpus) -> tuple[str, ...]:
    """Images that the student's view is taken from.

    Raises:
        DistillationError: The corpus lacks what the options ask for, or its wide views (the first
            one is looked at) are narrower than --mpp_jitter needs.
    """
    wanted = ("image_5x",)
    if options.reading_paths:
        wanted = tuple(name for name in READING_PATHS if name in corpus.columns)
        if len(wanted) == 1:
            raise DistillationError(
                f"{corpus.location}: no column {' or '.join(READING_PATHS[1:])}. Build the corpus "
                "with `xmag corpus --reading-paths`, or leave --reading_paths out."
            )
    if options.mpp_jitter:
        wanted = (WIDE,)
        if WIDE not in corpus.columns:
            raise DistillationError(
                f"{corpus.location}: no column {WIDE}. Build the corpus with `xmag corpus --margin "
                f"{options.mpp_jitter:g}`, or leave --mpp_jitter out."
            )
        _refuse_narrow(corpus, options.mpp_jitter)
    return wanted


def _refuse_narrow(corpus: Corpus, jitter: float) -> None:
    """Refuse a jitter that the first wide view does not hold."""
    ((_, values),) = read_pairs(corpus, np.arange(1), [WIDE])
    wide = decode_image(values[WIDE]["bytes"], None, f"{corpus.location}, pair 0, {WIDE}")
    try:
        zoomed_view(wide, 1 + jitter)
    except ValueError as error:
        raise DistillationError(
            f"--mpp_jitter={jitter:g}: {corpus.location}, {WIDE}: {error} Lower it, or build the "
            f"corpus with `xmag corpus --margin {jitter:g}`."
        ) from error


class MappedPairs(Dataset):
    """Random access over the memory-mapped corpus; indexed by (epoch, row)."""

    def __init__(self, corpus: Corpus, reader: PairReader) -> None:
        import datasets

        table = datasets.load_dataset(
            "parquet",
            # A folder's name is no pattern, whatever characters it has.
            data_files={"train": [glob.escape(shard) for shard in corpus.shards]},
            split="train",
            columns=reader.columns,
        )
        for column in reader.columns:
            table = table.cast_column(column, datasets.Image(decode=False))
        if len(table) != len(corpus.index):
            raise DistillationError(
                f"{corpus.location}: {len(table)} rows mapped, {len(corpus.index)} in the shards. "
                "The data set cache is stale; remove it and run again."
            )
        self.table = table
        self.reader = reader

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, row = key
        return self.reader(row, epoch, self.table[row])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, row) for one rank, from any micro-batch of the run on.

    In each epoch all rows are permuted with (seed, epoch) and cut into global batches of
    `batch_size * world`; rank r takes the r-th slice of each. Ranks therefore never share a row,
    and the global batch does not depend on how many processes it is split over.

    Args:
        rows: (n,) rows to train on.
        batch_size: Per rank.
        rank: Of this process.
        world: Number of processes.
        seed: Of the order.
        start: First micro-batch.
        stop: Micro-batch after the last.
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        start: int,
        stop: int,
    ) -> None:
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world
        self.seed, self.start, self.stop = seed, start, stop
        self.per_epoch = len(rows) // (batch_size * world)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, self.rows
        for micro in range(self.start, self.stop):
            if micro // self.per_epoch != epoch:
                epoch = micro // self.per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            first = ((micro % self.per_epoch) * self.world + self.rank) * self.batch_size
            yield [(epoch, int(row)) for row in order[first : first + self.batch_size]]


@dataclass(frozen=True)
class Placement:
    """Which process this is: rank of world."""

    rank: int = 0
    world: int = 1


def micro_batches_per_epoch(
    corpus: Corpus, rows: np.ndarray, options: DistillOptions, world: int
) -> int:
    """Micro-batches that every rank can fill in one epoch.

    Raises:
        DistillationError: Fewer pairs than one global micro-batch.
    """
    if options.streaming:
        mine = [len(_streamed_rows(corpus, rows, Placement(r, world))) for r in range(world)]
        count = min(mine) // options.batch_size
    else:
        count = len(rows) // (options.batch_size * world)
    if count == 0:
        raise DistillationError(
            f"{corpus.location}: {len(rows)} training pairs do not fill one batch of "
            f"{options.batch_size} on {world} process(es). Lower --batch_size or add slides."
        )
    return count


def batches(
    corpus: Corpus,
    rows: np.ndarray,
    reader: PairReader,
    options: DistillOptions,
    placement: Placement,
    *,
    start: int,
    stop: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches `start` to `stop` of the run.

    Args:
        corpus: To read.
        rows: (n,) rows to train on.
        reader: Makes samples.
        options: Batch size, seed, streaming, workers.
        placement: Rank and world.
        start: First micro-batch.
        stop: Micro-batch after the last.
        pin_memory: For copies to a GPU.

    Yields:
        Samples of `PairReader`, stacked: `image_5x` (B, 3, 224, 224) and so on.
    """
    if options.streaming:
        yield from _streamed_batches(corpus, rows, reader, options, placement, start, stop)
        return
    sampler = EpochBatches(
        rows,
        batch_size=options.batch_size,
        rank=placement.rank,
        world=placement.world,
        seed=options.seed,
        start=start,
        stop=stop,
    )
    yield from DataLoader(
        MappedPairs(corpus, reader),
        batch_sampler=sampler,
        num_workers=options.num_workers,
        pin_memory=pin_memory,
        generator=_own_generator(options),
        worker_init_fn=_ignore_sigterm,
    )


def _streamed_rows(corpus: Corpus, rows: np.ndarray, placement: Placement) -> np.ndarray:
    """Rows of this rank: whole shards, dealt out evenly; every world-th row if that is uneven.

    A rank without its share would end the epoch of all. Reading every shard on every rank costs
    less than that, but more than reading each once.
    """
    shard = np.searchsorted(corpus.shard_starts, rows, side="right") - 1
    counts = np.bincount(shard, minlength=len(corpus.shards))
    weights = np.zeros(placement.world, np.int64)
    rank_of = np.zeros(len(counts), np.int64)
    for number in np.argsort(-counts, kind="stable"):  # largest first, to the lightest rank
        rank_of[number] = weights.argmin()
        weights[rank_of[number]] += counts[number]
    if weights.min() < EVEN_SHARE * len(rows) / placement.world:
        return rows[placement.rank :: placement.world]
    return rows[rank_of[shard] == placement.rank]


def _streamed_batches(
    corpus: Corpus,
    rows: np.ndarray,
    reader: PairReader,
    options: DistillOptions,
    placement: Placement,
    start: int,
    stop: int,
) -> Iterator[Batch]:
    import datasets

    mine = _streamed_rows(corpus, rows, placement)
    shard = np.searchsorted(corpus.shard_starts, mine, side="right") - 1
    stream = datasets.IterableDataset.from_generator(
        _read_rows,
        gen_kwargs={
            "numbers": np.unique(shard).tolist(),  # a list: `datasets` splits it over workers
            "corpus": corpus,
            "wanted": mine,
            "columns": tuple(reader.columns),
        },
    ).shuffle(seed=options.seed, buffer_size=options.shuffle_buffer)
    per_epoch = micro_batches_per_epoch(corpus, rows, options, placement.world)
    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        prepared = stream.map(
            partial(_prepare, reader=reader, epoch=epoch), remove_columns=["values"]
        )
        prepared.set_epoch(epoch)  # the shuffle's seed becomes seed + epoch
        workers = min(options.num_workers, prepared.num_shards)
        samples = iter(
            DataLoader(
                prepared,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=workers,
                generator=_own_generator(options),
                worker_init_fn=_ignore_sigterm,
            )
        )
        for number in range(per_epoch):
            batch = [next(samples) for _ in range(options.batch_size)]
            # What a checkpoint has already seen is read again and passed over: slower than a
            # seek, but the shuffle buffer then holds just what it held.
            if start <= epoch * per_epoch + number < stop:
                yield default_collate(batch)


def _ignore_sigterm(worker: int) -> None:
    """A scheduler's SIGTERM reaches the whole process group; only the trainer answers it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _own_generator(options: DistillOptions) -> torch.Generator:
    """For the loader's seed of its workers, which no sample uses.

    Without it the loader draws that seed from the global generator, so that a resumed run, which
    starts its loader later, would drop other paths than an uninterrupted one.
    """
    return torch.Generator().manual_seed(options.seed)


def _prepare(example: dict[str, Any], *, reader: PairReader, epoch: int) -> dict[str, Any]:
    return reader(example["row"], epoch, example["values"])


def _read_rows(
    numbers: list[int], corpus: Corpus, wanted: np.ndarray, columns: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for number in numbers:
        first = int(corpus.shard_starts[number])
        mine = set(wanted[(wanted >= first) & (wanted < corpus.shard_starts[number + 1])].tolist())
        for offset, values in iterate_shard(corpus.shards[number], columns):
            if first + offset in mine:
                yield {"row": first + offset, "values": values}


def _channels_first(images: np.ndarray) -> Tensor:
    """(..., H, W, 3) -> (..., 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))

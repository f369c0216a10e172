from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from xmag_hf.distillation.corpus import Corpus, open_corpus
from xmag_hf.distillation.options import DistillationError
from xmag_hf.distillation.pairs import (
    PairReader,
    Placement,
    batches,
    micro_batches_per_epoch,
    student_columns,
)
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    build_cache,
    finish_cache,
    teacher_identity,
)


@pytest.fixture
def corpus(pair_corpus: Path) -> Corpus:
    return open_corpus(str(pair_corpus))


LIVE = PairReader(None, dihedral=True, color_jitter=True, seed=5)


def _rows(corpus, options, world=1, rank=0, start=0, stop=6, rows=None) -> list[list[int]]:
    rows = np.arange(24) if rows is None else rows
    found = batches(corpus, rows, LIVE, options, Placement(rank, world), start=start, stop=stop)
    return [batch["row"].tolist() for batch in found]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_shows_each_row_once_and_epochs_differ(corpus, options, streaming: bool) -> None:
    chosen = options(streaming=streaming)
    twelve = _rows(corpus, chosen, stop=12)
    first, second = sum(twelve[:6], []), sum(twelve[6:], [])
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_no_row(corpus, options, streaming: bool) -> None:
    chosen = options(streaming=streaming)
    a = _rows(corpus, chosen, world=2, rank=0, stop=3)
    b = _rows(corpus, chosen, world=2, rank=1, stop=3)
    assert sorted(sum(a, []) + sum(b, [])) == list(range(24))


def test_the_global_batch_does_not_depend_on_the_split(corpus, options) -> None:
    whole = _rows(corpus, options(batch_size=8), stop=3)
    halves = [_rows(corpus, options(), world=2, rank=r, stop=3) for r in range(2)]
    assert whole == [a + b for a, b in zip(*halves, strict=True)]


@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 0), (True, 2), (False, 2)])
def test_starting_late_gives_the_same_batches(corpus, options, streaming, workers) -> None:
    chosen = options(streaming=streaming, num_workers=workers)
    args = (corpus, np.arange(24), LIVE, chosen, Placement())
    whole = list(batches(*args, start=0, stop=9))
    late = list(batches(*args, start=7, stop=9))
    for a, b in zip(whole[7:], late, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("world", [2, 3])
def test_streamed_ranks_with_held_out_rows_stop_together(corpus, options, world: int) -> None:
    """Three ranks over two shards: split by row, and an uneven training set."""
    chosen = options(streaming=True, batch_size=2)
    rows = np.array([0, 1, 2, 5, 6, 9, 12, 13, 14, 15, 20, 21, 23])
    steps = micro_batches_per_epoch(corpus, rows, chosen, world)
    seen = [_rows(corpus, chosen, world, r, stop=steps, rows=rows) for r in range(world)]
    flat = [row for rank in seen for batch in rank for row in batch]
    assert all(len(rank) == steps for rank in seen)
    assert len(set(flat)) == len(flat) and set(flat) <= set(rows.tolist())


def test_streaming_shares_out_uneven_shards_pair_by_pair(corpus, options) -> None:
    """Two processes, batches of 48: 1,100 pairs are 11 batches each, however they are sharded."""
    chosen = options(streaming=True, batch_size=48)
    for sizes in ([1000, 100], [1100, 0], [550, 550]):
        uneven = dataclasses.replace(
            corpus, shards=("a shard",) * len(sizes), shard_rows=np.array(sizes)
        )
        assert micro_batches_per_epoch(uneven, np.arange(1100), chosen, 2) == 11
    # Held-out pairs can empty a shard: what counts is where the training pairs are.
    assert micro_batches_per_epoch(uneven, np.arange(100), chosen, 2) == 1


def test_uneven_streams_show_almost_every_pair(corpus, options) -> None:
    chosen = options(streaming=True, batch_size=2)
    rows = np.array([*range(12), 13, 20])  # twelve of one shard, two of the other
    steps = micro_batches_per_epoch(corpus, rows, chosen, 2)
    seen = [_rows(corpus, chosen, 2, rank, stop=steps, rows=rows) for rank in range(2)]
    flat = [row for rank in seen for batch in rank for row in batch]
    assert len(flat) == 12 and len(set(flat)) == 12 and set(flat) <= set(rows.tolist())


@pytest.mark.parametrize("seen", ["20x", "5x"])
def test_cached_targets_are_those_of_the_view(
    corpus, options, teacher, tmp_path: Path, seen: str
) -> None:
    """Mean colour does not care how a cell is turned, so live and cached targets must agree."""
    finish_cache(build_cache(corpus, teacher, tmp_path, teacher_view=seen, share=False))
    identity = teacher_identity(teacher, corpus, seen)
    features = TeacherFeatures(tmp_path / identity.key, corpus, identity)
    fresh = dataclasses.replace(LIVE, teacher_view=seen)
    assert fresh.columns == (["image_5x", "image_20x"] if seen == "20x" else ["image_5x"])
    cached = dataclasses.replace(fresh, features=features)
    assert cached.columns == ["image_5x"]  # the 20x JPEG is not even read
    args = (corpus, np.arange(24), options(), Placement())
    pairs = zip(
        batches(args[0], args[1], fresh, *args[2:], start=0, stop=6),
        batches(args[0], args[1], cached, *args[2:], start=0, stop=6),
        strict=True,
    )
    for live, kept in pairs:
        assert torch.equal(live["image_5x"], kept["image_5x"])
        targets = teacher(live["sub_patches"].flatten(0, 1)).unflatten(0, (-1, 16))
        assert (targets - kept["features"].float()).abs().max() < 1e-3


def _cache(corpus, teacher, folder: Path, views: int, seen: str = "20x") -> TeacherFeatures:
    made = build_cache(corpus, teacher, folder, views=views, teacher_view=seen, share=False)
    finish_cache(made)
    identity = teacher_identity(teacher, corpus, seen, views)
    return TeacherFeatures(folder / identity.key, corpus, identity)


@pytest.mark.parametrize("seen", ["20x", "5x"])
def test_with_all_views_cached_nothing_is_approximated(
    corpus, options, turning_teacher, tmp_path: Path, seen: str
) -> None:
    """A teacher that sees how it is turned: live and cached targets agree, permuted ones do not."""
    live = dataclasses.replace(LIVE, teacher_view=seen)
    args = (options(), Placement())
    fresh = list(batches(corpus, np.arange(24), live, *args, start=0, stop=6))
    targets = [
        turning_teacher(b["sub_patches"].flatten(0, 1)).unflatten(0, (-1, 16)) for b in fresh
    ]
    worst = {}
    for views in (1, 8):
        features = _cache(corpus, turning_teacher, tmp_path, views, seen)
        reader = dataclasses.replace(live, features=features)
        kept = list(batches(corpus, np.arange(24), reader, *args, start=0, stop=6))
        for a, b in zip(fresh, kept, strict=True):
            assert torch.equal(a["image_5x"], b["image_5x"])
        pairs = zip(targets, kept, strict=True)
        worst[views] = max((t - b["features"]).abs().max().item() for t, b in pairs)
    assert worst[8] < 1e-3 < 0.05 < worst[1]


def test_only_cached_views_are_drawn(corpus, options, turning_teacher, tmp_path: Path) -> None:
    features = _cache(corpus, turning_teacher, tmp_path, 2)
    reader = dataclasses.replace(LIVE, features=features)
    original = dataclasses.replace(LIVE, dihedral=False, color_jitter=False)
    args = (options(), Placement())
    as_it_lies = {}
    for batch in batches(corpus, np.arange(24), original, *args, start=0, stop=6):
        as_it_lies |= dict(zip(batch["row"].tolist(), batch["image_5x"], strict=True))
    drawn = []
    for batch in batches(corpus, np.arange(24), reader, *args, start=0, stop=18):
        for row, image, target in zip(
            batch["row"].tolist(), batch["image_5x"], batch["features"], strict=True
        ):
            flipped = torch.equal(image, as_it_lies[row].flip(-1))
            assert flipped or torch.equal(image, as_it_lies[row])
            assert np.array_equal(target.numpy(), features.view(row, int(flipped)))
            drawn.append(flipped)
    assert 18 < sum(drawn) < 54  # of 72; outside that once in ten thousand seeds


def test_views_of_both_magnifications_show_the_same_tissue(corpus, options) -> None:
    """The sixteen sub-patches, put together and reduced by 4, are the 5x view."""
    differences = []
    for batch in batches(corpus, np.arange(24), LIVE, options(), Placement(), start=0, stop=6):
        for cells, small in zip(batch["sub_patches"], batch["image_5x"], strict=True):
            grid = cells.unflatten(0, (4, 4)).permute(0, 3, 1, 4, 2)  # (4, 224, 4, 224, 3)
            region = Image.fromarray(grid.reshape(896, 896, 3).numpy())
            reduced = np.asarray(region.resize((224, 224), Image.Resampling.LANCZOS), float)
            differences.append(np.abs(reduced - small.permute(1, 2, 0).numpy()).mean())
    # Pillow rounds and clips between its two passes, so a turned region reduces to a few grey
    # levels' difference at sharp edges; another view of the same tissue differs by tens on average.
    assert max(differences) < 0.5


def test_a_pair_that_does_not_decode_is_named(corpus, options, tmp_path: Path) -> None:
    table = pq.read_table(corpus.shards[0])
    values = table.to_pylist()
    values[4]["image_5x"]["bytes"] = values[4]["image_5x"]["bytes"][:100]
    (tmp_path / "c" / "data").mkdir(parents=True)
    path = tmp_path / "c" / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(values, schema=table.schema), path)
    broken = open_corpus(str(tmp_path / "c"))
    with pytest.raises(DistillationError, match="pair 4, image_5x: does not decode"):
        list(batches(broken, np.arange(12), LIVE, options(), Placement(), start=0, stop=3))


def test_new_draws_leave_the_others_as_they_were(corpus, options) -> None:
    more = dataclasses.replace(LIVE, stain_jitter=0.1, token_mask_ratio=0.3)
    args = (options(), Placement())
    plain, extended = (
        next(iter(batches(corpus, np.arange(24), reader, *args, start=0, stop=1)))
        for reader in (LIVE, more)
    )
    assert set(extended) - set(plain) == {"stain", "mask"}
    assert all(torch.equal(plain[name], extended[name]) for name in plain)
    assert extended["mask"].sum(1).tolist() == [77] * 4  # 0.3 * 256 = 76.8
    assert not torch.equal(extended["mask"][0], extended["mask"][1])


def test_fewer_pairs_than_a_batch(corpus, options) -> None:
    with pytest.raises(DistillationError, match="3 training pairs do not fill one batch of 4"):
        micro_batches_per_epoch(corpus, np.arange(3), options(), 1)


def _with_columns(corpus: Corpus, folder: Path, **columns: list[bytes | None]) -> Corpus:
    """The first shard of the corpus with more images."""
    table = pq.read_table(corpus.shards[0])
    for name, images in columns.items():
        cells = [None if data is None else {"bytes": data, "path": None} for data in images]
        table = table.append_column(name, pa.array(cells, table.schema.field("image_5x").type))
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    return open_corpus(str(folder))


def _picture(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _flat(colour: int, side: int = 224) -> bytes:
    return _picture(np.full((side, side, 3), colour, np.uint8))


class _NoTeacher:
    """Cached features that cost nothing."""

    views = (0,)

    def __getitem__(self, row: int) -> np.ndarray:
        return np.zeros((16, 3), np.float16)

    def view(self, row: int, number: int) -> np.ndarray:
        return self[row]


def test_reading_paths_are_drawn_evenly_among_those_a_row_has(
    corpus, options, tmp_path: Path
) -> None:
    scanner = [_flat(11)] * 6 + [None] * 6
    more = _with_columns(
        corpus, tmp_path / "c", image_5x_scanner=scanner, image_5x_fast=[_flat(22)] * 12
    )
    chosen = options(reading_paths=True)
    reader = PairReader.of(chosen, _NoTeacher(), more)  # type: ignore[arg-type]
    assert reader.columns == ["image_5x", "image_5x_scanner", "image_5x_fast"]
    plain = dataclasses.replace(reader, student_columns=("image_5x",))
    values = pq.read_table(more.shards[0]).to_pylist()
    counts = {True: [0, 0, 0], False: [0, 0, 0]}  # by whether the row has three
    for epoch in range(40):
        for row in range(12):
            sample, other = reader(row, epoch, values[row]), plain(row, epoch, values[row])
            image = sample["image_5x"]
            drawn = int(image[0, 0, 0]) if image.min() == image.max() else 0
            counts[row < 6][(0, 11, 22).index(drawn)] += 1
            assert torch.equal(sample["jitter"], other["jitter"])
            if drawn == 0:
                assert torch.equal(image, other["image_5x"])
    assert all(abs(n - 80) < 32 for n in counts[True])  # 240 draws, four sd
    assert counts[False][1] == 0 and abs(counts[False][0] - 120) < 32
    for streaming in (False, True):  # nulls come through both ways of reading
        way = options(reading_paths=True, streaming=streaming)
        found = list(batches(more, np.arange(12), reader, way, Placement(), start=0, stop=3))
        assert sorted(row for batch in found for row in batch["row"].tolist()) == list(range(12))


def test_a_random_scale_shows_what_it_says(corpus, options, tmp_path: Path) -> None:
    """The wide view is a ramp, so the view's edges and centre are known in closed form."""
    ramp = np.repeat(np.linspace(0, 255, 336)[None, :, None], 336, 0).repeat(3, 2)
    wide = [_picture(ramp.round().astype(np.uint8))] * 12
    more = _with_columns(corpus, tmp_path / "c", image_5x_wide=wide)
    chosen = options(mpp_jitter=0.2, dihedral=False, color_jitter=False)
    assert PairReader.of(chosen, None, more).columns == ["image_5x_wide", "image_20x"]
    reader = PairReader.of(chosen, _NoTeacher(), more)  # type: ignore[arg-type]
    zooms = []
    for batch in batches(more, np.arange(12), reader, chosen, Placement(), start=0, stop=12):
        for zoom, image in zip(batch["zoom"].tolist(), batch["image_5x"], strict=True):
            zooms.append(zoom)
            row = image[0, 100].double()
            # 224 px of 2 * zoom um/px, seen as px of 1.6 um/px: this many steps of the ramp each.
            slope = (row[200] - row[23]) / 177
            assert slope == pytest.approx(255 / 335 * zoom / 0.8, abs=0.02)
            assert row[111:113].mean() == pytest.approx(127.5, abs=1)
    assert 0.8 <= min(zooms) < 0.85 and 1.15 < max(zooms) <= 1.2
    at_once = dataclasses.replace(reader, mpp_jitter=0.4)
    with pytest.raises(DistillationError, match=r"image_5x_wide: zoom=.* hold 0.800 to 1.200"):
        list(batches(more, np.arange(12), at_once, chosen, Placement(), start=0, stop=6))


def test_more_jitter_than_the_wide_views_hold(corpus, options, tmp_path: Path) -> None:
    """Said before the teacher is at work: 336 px are 224 at 2.0 um/px and a fifth around it."""
    more = _with_columns(corpus, tmp_path / "c", image_5x_wide=[_flat(9, 336)] * 12)
    assert student_columns(options(mpp_jitter=0.2), more) == ("image_5x_wide",)
    told = "mpp_jitter=0.3: .*336 px hold 0.800 to 1.200.*--margin 0.3"
    with pytest.raises(DistillationError, match=told):
        student_columns(options(mpp_jitter=0.3), more)


@pytest.mark.parametrize("name", ["corpus[v2]", "*?{a,b}"])
def test_a_folder_may_be_called_anything(corpus, options, tmp_path: Path, name: str) -> None:
    """What loads the shards takes names for patterns."""
    shutil.copytree(Path(corpus.shards[0]).parent, tmp_path / name / "data")
    odd = open_corpus(str(tmp_path / name))
    for streaming in (False, True):
        found = _rows(odd, options(streaming=streaming))
        assert sorted(sum(found, [])) == list(range(24))


def test_columns_that_the_corpus_lacks(corpus, options) -> None:
    with pytest.raises(DistillationError, match="no column image_5x_wide.*--margin 0.2"):
        PairReader.of(options(mpp_jitter=0.2), None, corpus)
    with pytest.raises(DistillationError, match="image_5x_scanner or image_5x_fast"):
        PairReader.of(options(reading_paths=True), None, corpus)
    with pytest.raises(DistillationError, match="Choose one"):
        options(mpp_jitter=0.2, reading_paths=True)

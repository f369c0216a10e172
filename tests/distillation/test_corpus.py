from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from xmag_hf.distillation.corpus import (
    PairIndex,
    count_disjoint,
    iterate_shard,
    open_corpus,
    read_pairs,
    split_pairs,
)
from xmag_hf.distillation.options import DistillationError


def _index(
    xs: list[int], ys: list[int], slides: list[int] | None = None, patients=None
) -> PairIndex:
    slides = slides or [0] * len(xs)
    names = np.array([f"s{i}" for i in range(max(slides) + 1)], dtype=object)
    width = np.full(len(xs), 896.0)
    coded = np.array(slides, np.int32)
    return PairIndex(
        names, coded, coded if patients is None else patients, *map(np.array, (xs, ys)), width
    )


def test_index_is_the_shards_in_order(pair_corpus: Path) -> None:
    corpus = open_corpus(str(pair_corpus))
    rows = [
        row
        for path in sorted((pair_corpus / "data").iterdir())
        for row in pq.read_table(path, columns=["slide_id", "x", "y"]).to_pylist()
    ]
    index = corpus.index
    got = [
        {"slide_id": index.slide_names[s], "x": int(x), "y": int(y)}
        for s, x, y in zip(index.slide, index.x, index.y, strict=True)
    ]
    assert got == rows
    assert corpus.shard_starts.tolist() == [0, 12, 24]
    assert corpus.fingerprint == "f" * 64


def test_without_corpus_json_the_fingerprint_follows_the_pairs(
    pair_corpus: Path, tmp_path: Path
) -> None:
    def copy(name: str, shards: list[int]) -> str:
        (tmp_path / name / "data").mkdir(parents=True)
        for path in [sorted((pair_corpus / "data").iterdir())[n] for n in shards]:
            shutil.copy(path, tmp_path / name / "data")
        return open_corpus(str(tmp_path / name)).fingerprint

    assert copy("a", [0, 1]) == copy("b", [0, 1]) != copy("c", [1])


@pytest.mark.parametrize("part", ["s0:y>0.6", "s0:y<0.4", "s0:x>0.5", "s1"])
def test_no_training_region_shares_a_pixel_with_a_held_out_one(part: str) -> None:
    rng = np.random.default_rng(0)
    n = 300
    index = _index(
        rng.integers(0, 6000, n).tolist(), rng.integers(0, 6000, n).tolist(), [0, 1, 1] * 100
    )
    split = split_pairs(index, [part])
    held = split.held_out[part]
    assert len(held) and len(split.train)
    assert len(held) + len(split.train) + split.dropped == n
    for a in held:
        for b in split.train:
            same = index.slide[a] == index.slide[b]
            overlap = (
                abs(index.x[a] - index.x[b]) < 896 and abs(index.y[a] - index.y[b]) < 896 and same
            )
            assert not overlap


@pytest.mark.parametrize("part", ["s0:y>0.6", "s0:y<0.4", "s0:x>0.5", "s0:x<0.4"])
def test_no_view_of_a_training_pair_shows_a_held_out_pixel(part: str) -> None:
    """With --mpp-jitter 0.2 a view is up to 1.2 regions wide, about the same centre."""
    rng = np.random.default_rng(1)
    xs, ys = (rng.integers(0, 2000, 400) for _ in "xy")
    index = _index(xs.tolist(), ys.tolist())
    split = split_pairs(index, [part], margin=0.2)
    held_out = np.zeros((3000, 3000), bool)
    for row in split.held_out[part]:
        held_out[ys[row] : ys[row] + 896, xs[row] : xs[row] + 896] = True
    around = int(0.1 * 896)  # whole pixels: 89 of 89.6
    for row in split.train:
        top, left = max(0, ys[row] - around), max(0, xs[row] - around)
        assert not held_out[top : ys[row] + 896 + around, left : xs[row] + 896 + around].any()
    plain = split_pairs(index, [part])
    assert len(split.held_out[part]) == len(plain.held_out[part])
    assert 0 < len(split.train) < len(plain.train)


def test_other_slides_of_a_held_out_patient_are_not_trained_on() -> None:
    patients = np.array([0, 0, 1], np.int32)
    index = _index([0, 0, 0], [0, 0, 0], [0, 1, 2], patients)
    split = split_pairs(index, ["s0"])
    assert split.held_out["s0"].tolist() == [0]
    assert split.train.tolist() == [2] and split.dropped == 1
    banded = split_pairs(_index([0, 0, 0], [0, 896, 0], [0, 0, 1], patients), ["s0:y<0.5"])
    assert banded.train.tolist() == [1, 2]  # a band holds out that part of the slide alone


def test_two_parts_of_one_slide_are_both_held_out() -> None:
    index = _index([0] * 10, list(range(0, 8960, 896)))
    split = split_pairs(index, ["s0:y<0.2", "s0:y>0.8"])
    assert split.held_out["s0:y<0.2"].tolist() == [0, 1]
    assert split.held_out["s0:y>0.8"].tolist() == [8, 9]
    assert split.train.tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("nobody", "no slide 'nobody'; there are s0"),
        ("s0:z>0.5", "cannot read 'z>0.5'"),
        ("s0:y>1.5", "cannot read"),
        ("s0:y>0.99", "holds no whole region"),
        ("s0", "leaves no pair to train on"),
    ],
)
def test_bad_parts_are_refused(part: str, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        split_pairs(_index([0, 224, 448], [0, 0, 0]), [part])


def test_disjoint_regions_are_counted() -> None:
    dense = [(x, y) for y in range(0, 2000, 224) for x in range(0, 3000, 224)]
    index = _index([x for x, _ in dense], [y for _, y in dense])
    # Every fourth column and row of the stride: 4 columns (0, 896, 1792, 2688) by 3 rows.
    assert count_disjoint(index, np.arange(len(index))) == 4 * 3
    both = _index([0, 0], [0, 0], [0, 1])
    assert count_disjoint(both, np.arange(2)) == 2  # of two slides


def test_read_pairs_opens_only_what_it_needs(pair_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(pair_corpus, folder)
    corpus = open_corpus(str(folder))
    Path(corpus.shards[0]).write_bytes(b"damaged after opening")
    got = [(row, values["x"]) for row, values in read_pairs(corpus, np.array([13, 20]), ["x"])]
    assert got == [(13, 224), (20, 0)]


def test_clear_errors(tmp_path: Path, pair_corpus: Path) -> None:
    with pytest.raises(DistillationError, match="neither a corpus folder nor a Hub repository"):
        open_corpus(str(tmp_path / "nothing" / "there"))
    with pytest.raises(DistillationError, match="no data/"):
        open_corpus(str(tmp_path))
    with pytest.raises(DistillationError, match=r"nobody/nothing: no such folder, and the Hub"):
        open_corpus("nobody/nothing")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"junk")
    with pytest.raises(DistillationError, match="not a readable Parquet file"):
        open_corpus(str(tmp_path))
    table = pq.read_table(next((pair_corpus / "data").iterdir())).drop_columns(["image_5x"])
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DistillationError, match=r"\['image_5x'\] are missing"):
        open_corpus(str(tmp_path))
    pq.write_table(
        pq.read_table(next((pair_corpus / "data").iterdir())).slice(0, 0),
        tmp_path / "data" / "train-00000-of-00001.parquet",
    )
    with pytest.raises(DistillationError, match="holds no pair"):
        open_corpus(str(tmp_path))


def test_shards_are_read_from_any_address(pair_corpus: Path) -> None:
    import fsspec

    path = sorted((pair_corpus / "data").iterdir())[0]
    with fsspec.open("memory://corpus/train-00000-of-00001.parquet", "wb") as file:
        file.write(path.read_bytes())
    far = list(iterate_shard("memory://corpus/train-00000-of-00001.parquet", ["x", "image_5x"], 5))
    assert far == list(iterate_shard(str(path), ["x", "image_5x"]))
    assert [row for row, _ in far] == list(range(12))


def test_a_repository_is_downloaded(pair_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options["repo_type"], options["allow_patterns"]))
        return str(pair_corpus)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    corpus = open_corpus("lab/pairs")
    assert len(corpus.index) == 24 and corpus.location == "lab/pairs"
    assert asked == [("lab/pairs", "dataset", ["data/*.parquet", "corpus.json"])]

"""SPIDER as a data set: rows, splits, missing context, damaged files, resume, the builder class."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from lanczos_reference import expected_region
from PIL import Image
from process_state import worker_ends_with_killed_parent
from spider_folder import (
    CLASSES,
    LABELLED,
    PATCH,
    TEST,
    TILES,
    TRAIN,
    make_spider,
    name_of,
    origin,
    png,
    record,
    tar_of,
    write_parts,
)

from xmag_hf.data_builders import SpiderError, SpiderOptions, find_source
from xmag_hf.data_builders.spider import Spider, build_spider
from xmag_hf.data_builders.spider_records import (
    CLASSES as KNOWN_CLASSES,
)
from xmag_hf.data_builders.spider_records import (
    locate,
    make_rows,
    mirror_missing,
    read_records,
    validation_slides,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory, cmu_pixels) -> Path:
    return make_spider(tmp_path_factory.mktemp("spider"), cmu_pixels)


@pytest.fixture(scope="module")
def built(tmp_path_factory, root) -> Path:
    out = tmp_path_factory.mktemp("built") / "test set"  # a name that could be taken for a split
    build_spider(find_source("colorectal", root), out)
    return out


@pytest.fixture
def copy(tmp_path, root) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / root.name))


def _rows(folder: Path) -> dict[str, dict]:
    """Name of the labelled image -> row with undecoded images, of all splits."""
    splits = load_dataset(str(folder))
    assert isinstance(splits, DatasetDict)
    rows = {}
    for split, data in splits.items():
        for name in ("image_20x", "image_5x"):
            data = data.cast_column(name, ImageFeature(decode=False))
        rows |= {row["image_20x"]["path"]: row | {"split": split} for row in data}
    return rows


def _pixels(row: dict, name: str = "image_5x") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))


def _known_canvas(pixels: np.ndarray, slide_id: str, row: int, column: int, **pad) -> np.ndarray:
    """1120 x 1120 px around a labelled patch, cut from the slide; beyond its patches, padded."""
    x0, y0 = origin(slide_id)
    slide = pixels[y0 : y0 + TILES * PATCH, x0 : x0 + TILES * PATCH]
    slide = np.pad(slide, [(2 * PATCH, 2 * PATCH)] * 2 + [(0, 0)], **pad)
    return slide[row * PATCH : row * PATCH + 1120, column * PATCH : column * PATCH + 1120]


# --- rows -------------------------------------------------------------------------------------


def test_load_dataset_reads_it_without_us(built):
    for extra in ("manifest.jsonl", "cache.json"):
        (built / extra).write_text('{"a": 1}\n')
    splits = load_dataset(str(built))
    assert isinstance(splits, DatasetDict)
    assert {name: data.num_rows for name, data in splits.items()} == {
        "train": 16, "validation": 4, "test": 4
    }  # fmt: skip
    row = splits["train"][0]
    assert row["image_20x"].size == row["image_5x"].size == (224, 224)
    assert (row["mpp"], row["mpp_5x"]) == (0.5, 2.0)
    streamed = load_dataset(str(built), split="train", streaming=True)
    assert [r["slide_id"] for r in streamed] == splits["train"]["slide_id"][:]
    labels = splits["test"].features["label"]
    assert isinstance(labels, ClassLabel)
    assert labels.names == list(KNOWN_CLASSES["colorectal"])
    assert [labels.int2str(i) for i in splits["test"]["label"]] == list(CLASSES)


def test_rows_are_the_records(built, root):
    rows = _rows(built)
    for line in json.loads((root / "metadata.json").read_text()):
        row = rows.pop(line["image_name"])
        assert row["image_20x"]["bytes"] == (root / "images" / line["image_name"]).read_bytes()
        assert row["slide_id"] == line["slide_id"]
        assert (row["split"] == "test") == (line["split"] == "test")
        # 25 places, of which the table names those that are there, the centre among them.
        assert row["num_missing_context"] == 25 - len(line["context_info"])
    assert not rows


@pytest.mark.parametrize("missing", ["white", "reflect"])
def test_5x_is_the_slide_reduced_by_lanczos(tmp_path, built, root, cmu_pixels, missing):
    folder = built
    if missing == "reflect":
        folder = tmp_path / "out"
        build_spider(find_source("colorectal", root), folder, SpiderOptions(missing="reflect"))
    pad = {"mode": "symmetric"} if missing == "reflect" else {"constant_values": 255}
    rows = _rows(folder)
    for slide_id in ("slide_0", "slide_3"):
        for row, column in LABELLED:
            canvas = _known_canvas(cmu_pixels, slide_id, row, column, **pad)
            # The central 896 of 1120 px, with what lies beyond them in reach of the kernel.
            expected = expected_region(canvas, 1.0, (112, 112), (224, 224), 2.0, 0.5)
            found = _pixels(rows[name_of(slide_id, row, column)])
            assert np.abs(found.astype(int) - expected).max() <= 1


def test_validation_is_whole_slides(built):
    rows = _rows(built).values()
    slides = {s: {r["slide_id"] for r in rows if r["split"] == s} for s in ("train", "validation")}
    assert len(slides["validation"]) == 1  # 20% of five
    assert slides["train"] | slides["validation"] == set(TRAIN)
    assert not slides["train"] & slides["validation"]
    listed = json.loads((built / "spider.json").read_text())["validation_slides"]
    assert slides["validation"] == set(listed)


def test_validation_slides_follow_seed_and_share():
    names = [f"s{number}" for number in range(1000)]
    chosen = validation_slides(names, 0.2, 0)
    assert len(chosen) == 200
    assert chosen == validation_slides(reversed(names * 2), 0.2, 0)
    # Two independent fifths share a fifth of 200: 40, with a standard deviation below 6.
    assert 10 < len(chosen & validation_slides(names, 0.2, 1)) < 70
    assert validation_slides(names, 0, 0) == set()


def test_drop_leaves_only_whole_surroundings(tmp_path, root):
    options = SpiderOptions(missing="drop")
    summary = build_spider(find_source("colorectal", root), tmp_path / "out", options)
    whole = {name_of(s, *at) for s in (*TRAIN, *TEST) for at, n in LABELLED.items() if n == 0}
    assert set(_rows(tmp_path / "out")) == whole
    assert (summary.dropped, sum(summary.rows.values())) == (12, 12)
    assert not summary.problems
    assert "12 were dropped" in (tmp_path / "out" / "README.md").read_text()


def test_mirror_fills_holes_inside():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 255, (5, 5, 4, 4, 3), np.uint8)
    rows: list[list[np.ndarray | None]] = [list(row) for row in tiles]
    rows[1][3] = None
    rows[3][0] = None
    filled = mirror_missing(rows)
    assert np.array_equal(filled[1][3], tiles[2, 3, ::-1])  # across the edge towards the centre
    assert np.array_equal(filled[3][0], tiles[2, 0, ::-1])
    # Nothing but the centre: it is folded over and over.
    only = [[tiles[2, 2] if (r, c) == (2, 2) else None for c in range(5)] for r in range(5)]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in mirror_missing(only)], axis=0)
    assert np.array_equal(whole, np.pad(tiles[2, 2], [(8, 8), (8, 8), (0, 0)], mode="symmetric"))


def test_parts_workers_and_shards_do_not_change_the_rows(tmp_path, root, built):
    content = tar_of(root)
    write_parts(tmp_path, content, [len(content) // 2 + 77])
    source = find_source("colorectal", tmp_path)
    options = SpiderOptions(max_shard_mb=1)
    build_spider(source, tmp_path / "out", options, workers=2)
    assert _rows(tmp_path / "out") == _rows(built)
    shards = sorted((tmp_path / "out" / "data").glob("train-*.parquet"))
    assert len(shards) > 1
    assert max(path.stat().st_size for path in shards) < 1_050_000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "data", "spider.json"
    }  # fmt: skip


# --- damage -----------------------------------------------------------------------------------


def test_images_that_cannot_be_had_are_reported(tmp_path, copy, built, cmu_pixels):
    images = copy / "images"
    centre = images / name_of("slide_0", 2, 2)  # also a neighbour of (0, 0) and (3, 3)
    centre.write_bytes(centre.read_bytes()[: centre.stat().st_size // 2])
    (images / name_of("slide_1", 5, 5)).unlink()  # a neighbour of (3, 3) only
    (images / name_of("slide_2", 5, 5)).write_bytes(png(cmu_pixels[:300, :224]))
    (images / name_of("slide_3", 5, 5)).write_bytes(b"GIF89a no PNG")
    summary = build_spider(find_source("colorectal", copy), tmp_path / "out")
    rows, before = _rows(tmp_path / "out"), _rows(built)
    assert set(before) - set(rows) == {centre.name}
    for slide, row, column in ((0, 0, 0), (0, 3, 3), (1, 3, 3), (2, 3, 3), (3, 3, 3)):
        name = name_of(f"slide_{slide}", row, column)
        more = rows[name]["num_missing_context"] - before[name]["num_missing_context"]
        assert more == 1, name
    # Place (2 + 2, 2 + 2) of the grid is white: rows and columns from 784 px of the central 896 on.
    assert (_pixels(rows[name_of("slide_1", 3, 3)])[200:, 200:] == 255).all()
    said = "\n".join(summary.problems)
    assert f"record 1 (slide_0), 2_2 {centre.name}: does not decode" in said
    assert "record 1 left out" in said
    assert "4_4 slide_1_5_5.png: no such file" in said
    assert "4_4 slide_2_5_5.png: 224 x 300 px, expected 224 x 224" in said
    assert "4_4 slide_3_5_5.png: does not decode" in said
    assert len(summary.problems) == 7
    assert centre.name in (tmp_path / "out" / "README.md").read_text()


def test_a_disk_that_fails_stops_the_run_which_goes_on_later(tmp_path, root, monkeypatch):
    """EIO from one read on; with it the remaining records were once left out and all was done."""
    reads, plain = [], Path.read_bytes

    def read_bytes(path):
        reads.append(path)
        if path.suffix == ".png" and len(reads) > 60:
            raise OSError(errno.EIO, "Input/output error")
        return plain(path)

    source = find_source("colorectal", root)
    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(SpiderError, match=r"record \d+ .slide_\d.*png: .*Input/output.*again"):
            build_spider(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not build_spider(source, tmp_path / "out").problems


def test_a_source_that_becomes_shorter_stops_the_run(tmp_path, root):
    """It says to leave the source alone, and no record is left out for it."""
    content = tar_of(root)
    write_parts(tmp_path, content, [len(content) // 2])
    source = find_source("colorectal", tmp_path).open()
    tasks = [locate(source, record) for record in _records(source)]
    with source.reader.paths[1].open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SpiderError, match="has become shorter while it was read"):
        make_rows(source.reader, tasks, "white")
    source.reader.paths[1].unlink()  # a share that is gone
    with pytest.raises(SpiderError, match="No such file.*Run the same command again"):
        make_rows(source.reader, tasks, "white")


def _records(source):
    return read_records("colorectal", source.metadata, SpiderOptions()).records


def _changed(index: int = 3, **changes) -> list[dict]:
    """Good records, one of them changed."""
    lines = [
        record(slide, *at, "Fat") for slide in ("slide_0", "slide_5") for at in LABELLED
    ]  # fmt: skip
    lines[index] |= {name.rstrip("_"): value for name, value in changes.items()}
    return lines


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (_changed(class_="Spleen"), "record 3: class 'Spleen' is none of SPIDER-colorectal's 13"),
        (_changed(split="val"), "record 3: .*split 'val', expected 'train' or 'test'"),
        (_changed(image_name="slide_0_0_0.png", context_info={}), "records 0 and 3 are both of"),
        (_changed(image_name="../x.png", context_info={}), r"record 3: '\.\./x.png' is no plain"),
        (_changed(context_info={"0_0": "/etc/x"}), "record 3: '/etc/x' is no plain file name"),
        (_changed(context_info={"0_0": "..\\x"}), "record 3: .* is no plain file name"),
        (_changed(context_info={"5_0": "x.png"}), "record 3: .*context '5_0', expected '0_0'"),
        (_changed(context_info={"2_2": "x.png"}), "record 3: .*centre .* another image, x.png"),
        (_changed(context_info={"0_0": 7}), "record 3: .*context 0_0 is 7"),
        (_changed(context_info=["x"]), "record 3: .*context_info is no table"),
        (_changed(slide_id=None), "record 3: slide_id is None"),
        (_changed(class_=3), "record 3: class is 3"),
        ([*_changed(), "x"], "record 8: 'x' is no record"),
        ([], "expected a list"),
        ({"a": 1}, "expected a list"),
    ],
)
def test_bad_metadata_is_refused(metadata, said):
    read_records("colorectal", json.dumps(_changed()).encode(), SpiderOptions())  # good as it is
    with pytest.raises(SpiderError, match=said):
        read_records("colorectal", json.dumps(metadata).encode(), SpiderOptions())


def test_text_that_is_no_json():
    for content in (b"", b'[{"slide_id": ', b"\xff\xfe\x00"):
        with pytest.raises(SpiderError, match="no JSON"):
            read_records("skin", content, SpiderOptions())


def test_counts_and_leaks_are_reported():
    lines = _changed(split="test")
    found = read_records("colorectal", json.dumps(lines).encode(), SpiderOptions())
    said = "; ".join(found.warnings)
    assert "1 slides are in both train and test" in said
    assert "slide_0" in said
    assert "3 training records, published: 63,989" in said
    assert "5 test records, published: 13,193" in said
    assert "1 classes, published: 13" in said
    # Other organs: any class, sorted; nothing published to differ from.
    for number, line in enumerate(lines):
        line["class"] = f"class {9 - number}"
    found = read_records("skin", json.dumps(lines).encode(), SpiderOptions())
    assert found.classes == tuple(f"class {number}" for number in range(2, 10))
    assert [r.label for r in found.records] == list(range(7, -1, -1))
    assert not any("published" in warning for warning in found.warnings)


def test_an_empty_split_is_left_out(tmp_path, root):
    options = SpiderOptions(validation=0)
    source = find_source("colorectal", root)
    summary = build_spider(source, tmp_path / "out", options)
    assert "split validation is empty, so it is left out" in summary.warnings
    splits = load_dataset(str(tmp_path / "out"))
    assert isinstance(splits, DatasetDict)
    assert {name: data.num_rows for name, data in splits.items()} == {"train": 20, "test": 4}


def test_load_dataset_tells_folders_of_one_name_apart(tmp_path, root):
    # Its cache goes by the folder's name and the card's block; in both folders that is "out".
    source = find_source("colorectal", root)
    for seed in (0, 2):
        build_spider(source, tmp_path / str(seed) / "out", SpiderOptions(seed=seed))
    said = [json.loads((tmp_path / s / "out" / "spider.json").read_text()) for s in "02"]
    aside = [load_dataset(str(tmp_path / s / "out"), split="validation")["slide_id"] for s in "02"]
    assert [sorted(set(a)) for a in aside] == [s["validation_slides"] for s in said]
    assert said[0]["validation_slides"] != said[1]["validation_slides"]


@pytest.mark.parametrize(
    "options", [{"missing": "black"}, {"validation": 1.0}, {"max_shard_mb": 0}]
)
def test_bad_options(options):
    with pytest.raises(SpiderError, match=next(iter(options))):
        SpiderOptions(**options)


# --- again ------------------------------------------------------------------------------------


class _KilledError(Exception):
    pass


def test_a_killed_run_goes_on_after_its_last_shard(tmp_path, root):
    source, options = find_source("colorectal", root), SpiderOptions(max_shard_mb=1)
    build_spider(source, tmp_path / "once", options)

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("records", 14):
            raise _KilledError

    out = tmp_path / "out"
    with pytest.raises(_KilledError):
        build_spider(source, out, options, progress=kill)
    assert not out.exists()
    parts = (tmp_path / "out.partial/parts").glob("*.parquet")
    kept = {path.name: path.stat().st_mtime_ns for path in parts}
    assert kept
    with pytest.raises(SpiderError, match="missing 'white' there, 'drop' asked for"):
        build_spider(source, out, SpiderOptions(max_shard_mb=1, missing="drop"))
    seen = []
    build_spider(source, out, options, progress=lambda *state: seen.append(state))
    assert 1 < seen[0][1] < 14  # not from the start
    for number, name in enumerate(sorted(kept)):
        (shard,) = (out / "data").glob(f"train-{number:05d}-*")
        assert shard.stat().st_mtime_ns == kept[name]
    mine, once = (
        {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
        for folder in (out, tmp_path / "once")
    )
    assert mine == once
    assert (out / "spider.json").read_text() == (tmp_path / "once" / "spider.json").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_a_second_build_into_one_folder_is_refused_at_every_step(tmp_path, root, built):
    source, out, refusals = find_source("colorectal", root), tmp_path / "out", []

    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(
            SpiderError, match=f"--out {out}: process {os.getpid()} on .*out[.]lock"
        ):
            build_spider(source, out)
        refusals.append((stage, done))

    build_spider(source, out, progress=second)
    assert ("records", 1) in refusals and ("records", 24) in refusals
    assert _rows(out) == _rows(built)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no lock is left
    assert build_spider(source, out).already_done


def test_what_is_there_is_kept(tmp_path, root, built, copy):
    source = find_source("colorectal", root)
    again = build_spider(source, built)
    assert again.already_done
    assert sum(again.rows.values()) == 24
    with pytest.raises(SpiderError, match="seed 0 there, 5 asked for"):
        build_spider(source, built, SpiderOptions(seed=5))
    (copy / "metadata.json").write_text(json.dumps(_changed()))
    with pytest.raises(SpiderError, match="source_sha256"):
        build_spider(find_source("colorectal", copy), built)
    (tmp_path / "other").mkdir()
    with pytest.raises(SpiderError, match="is no SPIDER data set"):
        build_spider(source, tmp_path / "other")


# --- the builder class ------------------------------------------------------------------------


def _plain(data) -> list[dict]:
    for name in ("image_20x", "image_5x"):
        data = data.cast_column(name, ImageFeature(decode=False))
    return sorted(data, key=lambda row: row["image_20x"]["path"])


def test_builder_class_has_the_same_rows(tmp_path, root, built):
    builder = Spider(config_name="colorectal", data_dir=root, cache_dir=str(tmp_path))
    builder.download_and_prepare()
    ours = load_dataset(str(built))
    assert isinstance(ours, DatasetDict)
    for split in ("train", "validation", "test"):
        made, streamed = builder.as_dataset(split), builder.as_streaming_dataset(split)
        assert made.features == streamed.features == ours[split].features
        assert _plain(made) == _plain(streamed) == _plain(ours[split])


def test_builder_class_of_an_organ_whose_classes_are_in_the_data(tmp_path, cmu_pixels):
    make_spider(tmp_path, cmu_pixels, organ="thorax")
    options = SpiderOptions(missing="drop")
    builder = Spider(
        config_name="thorax", data_dir=tmp_path, options=options, cache_dir=str(tmp_path / "c")
    )
    streamed = builder.as_streaming_dataset("test")
    assert streamed.features["label"].names == sorted(CLASSES)
    builder.download_and_prepare()
    again = Spider(
        config_name="thorax", data_dir=tmp_path, options=options, cache_dir=str(tmp_path / "c")
    )
    assert again.cache_dir == builder.cache_dir
    assert again.as_dataset("test").num_rows == 2
    white = Spider(config_name="thorax", data_dir=tmp_path, cache_dir=str(tmp_path / "c"))
    assert white.cache_dir != builder.cache_dir


# Workers import this file anew; the first to work tells its pid and is busy for ever.
ORPHANED = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from xmag_hf.data_builders import spider_build
def make_rows(*args):
    Path(sys.argv[1]).write_text(f"{os.getpid()} ")
    time.sleep(600)
spider_build.make_rows, spider_build.locate = make_rows, lambda source, record: record
if __name__ == "__main__":
    records = range(2 * spider_build.CHUNK)
    list(spider_build._rows(SimpleNamespace(reader=None), records, "error", workers=2))
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script, told = tmp_path / "orphaned.py", tmp_path / "pid"
    script.write_text(ORPHANED)
    assert worker_ends_with_killed_parent([sys.executable, str(script), str(told)], told)

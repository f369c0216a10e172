"""Corpora from real slides: rows, files, resume, failures, and loading without the package."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from datasets import load_dataset
from lanczos_reference import expected_region
from PIL import Image
from process_state import worker_ends_with_killed_parent
from tiled_tiff import write_tiff

from xmag_hf.data_builders import CorpusError, CorpusOptions, SlideRow
from xmag_hf.data_builders.build import BuildState, build_corpus

OPTIONS = CorpusOptions(stride=896, codec="png")


def read_rows(corpus: Path) -> list[dict]:
    files = sorted((corpus / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def pixels_of(image: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image["bytes"])))


@pytest.fixture(scope="module")
def small_slides(tmp_path_factory, cmu_pixels) -> list[Path]:
    """Two crops of real tissue, 1,100 x 1,000 px at 0.5 um/px: one region each, or 2 at 128."""
    folder = tmp_path_factory.mktemp("slides")
    return [
        write_tiff(folder / f"{name}.tif", [cmu_pixels[top : top + 1000, 700:1800]], mpp=0.5)
        for name, top in (("test_upper", 200), ("train_lower", 1500))
    ]


@pytest.fixture(scope="module")
def cmu_corpus(tmp_path_factory, cmu_slide) -> Path:
    out = tmp_path_factory.mktemp("cmu") / "corpus"
    build_corpus([SlideRow(cmu_slide, cancer_type="skin")], out, OPTIONS)
    return out


def test_rows_are_the_slides_pixels_at_closed_form_places(cmu_corpus, cmu_pixels):
    """At 0.499 um/px the reduction is by 1.002."""
    rows = read_rows(cmu_corpus)
    width0 = 448 / 0.499
    places = {(round(i * width0), round(j * width0)) for i in range(2) for j in range(3)}
    assert {(row["x"], row["y"]) for row in rows} <= places
    assert [(r["y"], r["x"]) for r in rows] == sorted((r["y"], r["x"]) for r in rows)
    assert 3 <= len(rows) <= 6
    for row in rows:
        place = (row["x"], row["y"])
        region = expected_region(cmu_pixels, 1, place, (896, 896), 0.5, 0.499)
        large, small = pixels_of(row["image_20x"]), pixels_of(row["image_5x"])
        assert np.abs(large - region).max() <= 1
        exact = np.asarray(Image.fromarray(large).resize((224, 224), Image.Resampling.LANCZOS))
        assert (small == exact).all()
        assert row["width0"] == pytest.approx(width0, rel=1e-12)
        assert row["mpp0"] == pytest.approx(0.499, rel=1e-6)
        assert (row["level"], row["slide_id"]) == (0, "CMU-1-Small-Region")
        assert (row["patient_id"], row["cancer_type"]) == ("CMU-1-Small-Region", "skin")
        assert 0.25 <= row["tissue_fraction"] <= 1


def test_jpeg_is_quality_95_without_chroma_subsampling(tmp_path, small_slides):
    """And the 5x view is made before it: equal to that of the PNG corpus."""
    rows = SlideRow(small_slides[0])
    build_corpus([rows], tmp_path / "jpeg", CorpusOptions())
    build_corpus([rows], tmp_path / "png", OPTIONS)
    (jpeg,), (png,) = read_rows(tmp_path / "jpeg"), read_rows(tmp_path / "png")
    assert jpeg["image_5x"] == png["image_5x"]
    image = Image.open(io.BytesIO(jpeg["image_20x"]["bytes"]))
    assert image.format == "JPEG"
    assert all(component[1:3] == (1, 1) for component in image.layer)  # 4:4:4
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=95)
    assert image.quantization == Image.open(reference).quantization
    error = pixels_of(jpeg["image_20x"]).astype(float) - pixels_of(png["image_20x"])
    assert 0 < np.sqrt((error**2).mean()) < 4


LOAD = """
import sys
sys.modules["xmag_hf"] = None  # import xmag_hf raises
from datasets import load_dataset
folder, cache = sys.argv[1:]
mapped = load_dataset(folder, cache_dir=cache)
assert list(mapped) == ["train"], mapped
mapped = mapped["train"]
assert mapped.features["image_20x"].__class__.__name__ == "Image"
streamed = list(load_dataset(folder, split="train", streaming=True))
assert len(streamed) == len(mapped) > 0
for a, b in zip(mapped, streamed):
    assert a["image_20x"].size == (896, 896) and a["image_5x"].size == (224, 224)
    assert (a["x"], a["slide_id"]) == (b["x"], b["slide_id"])
    assert a["image_5x"].tobytes() == b["image_5x"].tobytes()
print(len(mapped), *mapped.column_names)
"""


def test_load_dataset_without_the_package_among_other_files(tmp_path, small_slides):
    corpus = tmp_path / "corpus"
    build_corpus([SlideRow(path) for path in small_slides], corpus, OPTIONS)
    cache = corpus / "teacher" / "0123456789abcdef"
    cache.mkdir(parents=True)
    with h5py.File(cache / "features-00000-of-00001.h5", "w") as file:
        file["features"] = np.zeros((2, 16, 8), np.float16)
    (corpus / "notes.jsonl").write_text('{"text": "not the data"}\n' * 9)
    assert (corpus / "manifest.jsonl").is_file()
    assert (corpus / "corpus.json").is_file()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(corpus), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    columns = "image_20x image_5x slide_id patient_id cancer_type x y width0 mpp0 level"
    assert done.stdout.split() == ["2", *columns.split(), "tissue_fraction", "source"]


def test_load_dataset_tells_corpora_in_folders_of_one_name_apart(tmp_path, small_slides):
    """`datasets` names its cache by the folder's last name and the card's configuration."""
    found = []
    for number, path in enumerate(small_slides):
        out = tmp_path / str(number) / "corpus"
        build_corpus([SlideRow(path)], out, OPTIONS)
        loaded = load_dataset(str(out), cache_dir=str(tmp_path / "cache"), split="train")
        found.append(set(loaded["slide_id"]))
    assert found == [{path.stem} for path in small_slides]


def test_shards_are_small_and_named_in_order(tmp_path, cmu_slide):
    """A part of 1 MB holds no two PNG regions: a shard each, rows in the order of one shard."""
    options = CorpusOptions(codec="png", max_shard_mb=1)
    summary = build_corpus([SlideRow(cmu_slide)], tmp_path / "many", options)
    build_corpus([SlideRow(cmu_slide)], tmp_path / "one", OPTIONS)
    files = sorted(path.name for path in (tmp_path / "many" / "data").iterdir())
    n = summary.pairs
    assert files == [f"train-{i:05d}-of-{n:05d}.parquet" for i in range(n)]
    assert read_rows(tmp_path / "many") == read_rows(tmp_path / "one")
    described = json.loads((tmp_path / "many" / "corpus.json").read_text())
    assert [shard["file"] for shard in described["shards"]] == [f"data/{name}" for name in files]
    assert {shard["rows"] for shard in described["shards"]} == {1}
    types = {f.name: f.type for f in pq.read_schema(tmp_path / "many" / "data" / files[0])}
    assert types["width0"] == pa.float64()
    assert types["level"] == pa.int16()


def test_bad_slides_are_recorded_and_do_not_stop_the_rest(tmp_path, small_slides, cmu_pixels):
    glass = np.full((1000, 1000, 3), 242, np.uint8)
    crop = cmu_pixels[200:1200, 700:1800]
    tiny = cmu_pixels[900:1100, 900:1200]
    corrupt = tmp_path / "corrupt.tif"
    corrupt.write_bytes(small_slides[0].read_bytes()[:300])
    paths = {
        "absent": tmp_path / "absent.svs",
        "corrupt": corrupt,
        "blank": write_tiff(tmp_path / "blank.tif", [glass], mpp=0.5),
        "no_mpp": write_tiff(tmp_path / "no_mpp.tif", [crop], mpp=None),
        "coarse": write_tiff(tmp_path / "coarse.tif", [crop], mpp=1.0),
        "skewed": write_tiff(tmp_path / "skewed.tif", [crop], mpp=(0.5, 0.6)),
        "ordinary": write_tiff(tmp_path / "ordinary.tif", [crop], mpp=0.5266),
        "tiny": write_tiff(tmp_path / "tiny.tif", [tiny], mpp=0.5),
    }
    options = CorpusOptions(codec="png", tissue=0.05)
    summary = build_corpus([SlideRow(p) for p in paths.values()], tmp_path / "corpus", options)
    lines = (tmp_path / "corpus" / "manifest.jsonl").read_text().splitlines()
    manifest = {line["slide_id"]: line for line in map(json.loads, lines)}
    assert list(manifest) == list(paths)
    assert {name: line["status"] for name, line in manifest.items()} == {
        "absent": "failed",
        "corrupt": "failed",
        "blank": "no_tissue",
        "no_mpp": "refused",
        "coarse": "refused",
        "skewed": "refused",
        "ordinary": "ok",
        "tiny": "ok",
    }
    for name, line in manifest.items():
        assert (name in line["reason"]) == (line["status"] != "ok")
    assert {r.slide_id for r in summary.problems} == set(paths) - {"blank", "ordinary", "tiny"}
    rows = {row["slide_id"]: row for row in read_rows(tmp_path / "corpus")}
    assert rows["ordinary"]["width0"] == pytest.approx(448 / 0.5266)
    assert rows["ordinary"]["level"] == 0
    padded = pixels_of(rows["tiny"]["image_20x"])  # smaller than a region: one, white around it
    assert (padded[:200, :300] == tiny).all()
    assert (padded[200:] == 255).all()
    assert (padded[:, 300:] == 255).all()


def test_a_file_that_may_not_be_read_does_not_stop_the_rest(tmp_path, small_slides, monkeypatch):
    """An administrator may read files of mode 000: the error is made here."""
    closed, original = small_slides[0], Path.open

    def refuse(self: Path, *args, **kwargs):
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    options = CorpusOptions(codec="png", tissue=0.05)
    rows = [SlideRow(path) for path in small_slides[:2]]
    summary = build_corpus(rows, tmp_path / "corpus", options)
    assert [record.status for record in summary.records] == ["failed", "ok"]
    assert "Permission denied" in summary.records[0].reason


def test_given_mpp_and_coarse_slides_on_request(tmp_path, cmu_pixels):
    crop = cmu_pixels[200:1200, 700:1800]
    path = write_tiff(tmp_path / "a.tif", [crop], mpp=None)
    lied = write_tiff(tmp_path / "b.tif", [crop], mpp=1.0)
    options = CorpusOptions(mpp=0.52, allow_coarse=True)
    rows = [SlideRow(path), SlideRow(lied, mpp=0.5)]
    summary = build_corpus(rows, tmp_path / "given", options)
    assert [record.mpp0 for record in summary.records] == [0.52, 0.5]
    assert {record.mpp_source for record in summary.records} == {"given"}
    coarse = build_corpus([SlideRow(lied)], tmp_path / "coarse", CorpusOptions(allow_coarse=True))
    assert coarse.records[0].status == "ok"
    assert read_rows(tmp_path / "coarse")[0]["width0"] == pytest.approx(448)


def test_damaged_regions_are_skipped_and_counted(tmp_path, cmu_slide):
    content = bytearray(cmu_slide.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    damaged = tmp_path / "damaged.svs"
    damaged.write_bytes(content)
    options = CorpusOptions(stride=448, codec="png")
    whole = build_corpus([SlideRow(cmu_slide)], tmp_path / "whole", options).records[0]
    part = build_corpus([SlideRow(damaged)], tmp_path / "part", options)
    record = part.records[0]
    assert record.status == "ok"
    assert record.unreadable > 0
    assert part.problems == [record]
    intact = {(r["x"], r["y"]): r["image_20x"] for r in read_rows(tmp_path / "whole")}
    kept = {(r["x"], r["y"]): r["image_20x"] for r in read_rows(tmp_path / "part")}
    assert 0 < len(kept) < whole.pairs
    assert record.pairs + record.unreadable >= whole.pairs  # none is lost without being counted
    assert all(intact[place] == image for place, image in kept.items())


def test_a_slide_without_one_readable_tile_has_failed(tmp_path, cmu_slide):
    """Not "no tissue": somebody has to look at it."""
    with tifffile.TiffFile(cmu_slide) as tiff:
        page = tiff.pages[0]
        tiles = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    content = bytearray(cmu_slide.read_bytes())
    for offset, count in tiles:
        content[offset : offset + count] = bytes(count)
    dead = tmp_path / "dead.svs"
    dead.write_bytes(content)
    summary = build_corpus([SlideRow(dead)], tmp_path / "out", CorpusOptions(stride=896))
    record = summary.records[0]
    assert (record.status, record.pairs) == ("failed", 0)
    assert "could be decoded" in record.reason
    assert summary.problems == [record]


def test_corrected_metadata_is_not_taken_for_done(tmp_path, small_slides):
    row = SlideRow(small_slides[0])
    build_corpus([row], tmp_path / "out", OPTIONS)
    assert build_corpus([row], tmp_path / "out", OPTIONS).already_done
    corrected = dataclasses.replace(row, patient_id="P7")
    with pytest.raises(CorpusError, match="patient_id .* 'P7' asked for"):
        build_corpus([corrected], tmp_path / "out", OPTIONS)


def test_processes_change_nothing(tmp_path, small_slides):
    rows = [SlideRow(path) for path in small_slides]
    one = build_corpus(rows, tmp_path / "one", OPTIONS, workers=1)
    two = build_corpus(rows, tmp_path / "two", OPTIONS, workers=2)
    assert one.fingerprint == two.fingerprint
    for file in sorted((tmp_path / "one" / "data").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / "data" / file.name).read_bytes()
    for name in ("manifest.jsonl", "corpus.json", "README.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    described = json.loads((tmp_path / "one" / "corpus.json").read_text())
    assert [slide["slide_id"] for slide in described["slides"]] == ["test_upper", "train_lower"]


KILLER = """
import os, signal, sys
import openslide
plain = openslide.OpenSlide.read_region
def read_region(self, location, level, size):
    if "deadly" in str(self._filename):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, location, level, size)
openslide.OpenSlide.read_region = read_region
"""


def test_a_worker_that_dies_costs_only_its_slide(tmp_path, small_slides, monkeypatch):
    """`sitecustomize` plants the crash in the spawned workers, as a decoder's bug would be."""
    deadly = tmp_path / "deadly.tif"
    deadly.write_bytes(small_slides[0].read_bytes())
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(planted))
    rows = [SlideRow(deadly), *(SlideRow(path) for path in small_slides)]
    summary = build_corpus(rows, tmp_path / "corpus", OPTIONS, workers=2)
    assert [record.status for record in summary.records] == ["failed", "ok", "ok"]
    assert "process that read it died" in summary.records[0].reason
    assert len(read_rows(tmp_path / "corpus")) == 2
    alone = build_corpus(rows[:1], tmp_path / "alone", OPTIONS, workers=2)
    assert [record.status for record in alone.records] == ["failed"]


BUILD = """
import sys, time
from pathlib import Path
from xmag_hf.data_builders import CorpusOptions, SlideRow
from xmag_hf.data_builders import build
out, slow, *slides = sys.argv[1:]
if slow == "slow":  # time to be killed between the slides
    plain = build.write_slide
    def write_slide(*args):
        if args[0].slide_id != Path(slides[0]).stem:
            time.sleep(60)
        return plain(*args)
    build.write_slide = write_slide
options = CorpusOptions(codec="png", max_shard_mb=1)
build.build_corpus([SlideRow(Path(s)) for s in slides], out, options)
"""


# Workers import this file anew; the first to work tells its pid and is busy for ever.
ORPHANED = """
import os, sys, time
from pathlib import Path
from xmag_hf.data_builders import CorpusOptions, SlideRow
from xmag_hf.data_builders import build
out, slide = sys.argv[1:]
def write_slide(*args):
    Path(out + ".pid").write_text(f"{os.getpid()} ")
    time.sleep(600)
build.write_slide = write_slide
if __name__ == "__main__":
    build.build_corpus([SlideRow(Path(slide))], out, CorpusOptions(), workers=2)
"""


def test_workers_end_with_a_killed_parent(tmp_path, cmu_slide):
    script, told = tmp_path / "orphaned.py", tmp_path / "out.pid"
    script.write_text(ORPHANED)
    command = [sys.executable, str(script), str(tmp_path / "out"), str(cmu_slide)]
    assert worker_ends_with_killed_parent(command, told)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, cmu_slide, small_slides):
    slides = [str(cmu_slide), *map(str, small_slides)]
    command = [sys.executable, "-c", BUILD, str(tmp_path / "a")]
    victim = subprocess.Popen([*command, "slow", *slides])
    parts = tmp_path / "a.partial" / "parts"
    deadline = time.monotonic() + 60
    while not list(parts.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (finished,) = parts.glob("*.json")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "a").exists()
    (parts / "0123.parquet.tmp").write_bytes(b"half a part")
    written = {path: path.stat().st_mtime_ns for path in parts.glob(f"{finished.stem}*")}
    options = CorpusOptions(codec="png", max_shard_mb=1)
    with pytest.raises(CorpusError, match="tissue 0.25 there, 0.5 asked for"):
        build_corpus(
            [SlideRow(Path(s)) for s in slides],
            tmp_path / "a",
            CorpusOptions(codec="png", max_shard_mb=1, tissue=0.5),
        )
    subprocess.run([*command, "plain", *slides], check=True)
    build_corpus([SlideRow(Path(s)) for s in slides], tmp_path / "b", options)
    names = sorted(path.name for path in (tmp_path / "b" / "data").iterdir())
    assert sorted(path.name for path in (tmp_path / "a" / "data").iterdir()) == names
    for name in names:
        one, other = (tmp_path / out / "data" / name for out in "ab")
        assert one.read_bytes() == other.read_bytes()
    times = {path.stat().st_mtime_ns for path in (tmp_path / "a" / "data").iterdir()}
    done = {t for path, t in written.items() if path.suffix == ".parquet"}
    assert done <= times  # the finished slide was not written again
    assert not (tmp_path / "a.partial").exists()
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"data", "README.md", "corpus.json"}
    assert not (tmp_path / "a" / "parts").exists()


def test_naming_of_shards_cut_short_is_taken_up(tmp_path, small_slides, monkeypatch):
    rows = [SlideRow(path) for path in small_slides]
    build_corpus(rows, tmp_path / "b", OPTIONS)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("xmag_hf.data_builders.build.write_card", fail)
        with pytest.raises(OSError, match="disk full"):
            build_corpus(rows, tmp_path / "a", OPTIONS)
    assert not (tmp_path / "a").exists()
    build_corpus(rows[::-1], tmp_path / "a", OPTIONS)  # the other order: other shard names
    assert read_rows(tmp_path / "a") == read_rows(tmp_path / "b")[::-1]


def test_finished_corpora(tmp_path, small_slides):
    rows = [SlideRow(path, cancer_type="BRCA") for path in small_slides]
    first = build_corpus(rows[:1], tmp_path / "a", OPTIONS)
    again = build_corpus(rows[:1], tmp_path / "a", OPTIONS)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.records == first.records
    with pytest.raises(CorpusError, match="stride 896 there, 448 asked for"):
        build_corpus(rows[:1], tmp_path / "a", CorpusOptions(stride=448, codec="png"))
    with pytest.raises(CorpusError, match="other slides"):
        build_corpus(rows, tmp_path / "a", OPTIONS)
    (tmp_path / "mine").mkdir()
    with pytest.raises(CorpusError, match="no corpus"):
        build_corpus(rows, tmp_path / "mine", OPTIONS)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "path: data/*.parquet" in card
    assert "| BRCA | 1 | 1 | 1 |" in card
    with Image.open(tmp_path / "a" / "cancer_types.png") as picture:
        assert picture.width > 100


def test_a_second_build_into_one_folder_is_refused_at_every_step(tmp_path, small_slides):
    rows, out, refusals = [SlideRow(path) for path in small_slides], tmp_path / "a", []

    def second(state: BuildState) -> None:
        with pytest.raises(CorpusError, match=f"--out {out}: process {os.getpid()} on .*a[.]lock"):
            build_corpus(rows, out, OPTIONS)
        refusals.append(state.slides_done)

    first = build_corpus(rows, out, OPTIONS, progress=second)
    assert {0, 2} <= set(refusals)
    assert len(read_rows(out)) == first.pairs
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # no lock is left
    assert build_corpus(rows, out, OPTIONS).already_done


def test_changed_slides_are_done_again(tmp_path, small_slides, monkeypatch):
    """In a begun corpus: other pixels under the same name, or other metadata."""
    slide = tmp_path / "slide.tif"
    slide.write_bytes(small_slides[0].read_bytes())

    def fail(*args: object) -> None:
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr("xmag_hf.data_builders.build._finish", fail)
        with pytest.raises(OSError, match="stop"):
            build_corpus([SlideRow(slide)], tmp_path / "a", OPTIONS)
    slide.write_bytes(small_slides[1].read_bytes())
    build_corpus([SlideRow(slide, cancer_type="LUAD")], tmp_path / "a", OPTIONS)
    build_corpus([SlideRow(slide, cancer_type="LUAD")], tmp_path / "b", OPTIONS)
    assert read_rows(tmp_path / "a") == read_rows(tmp_path / "b")


def test_wrong_calls_fail_before_any_work(tmp_path, small_slides):
    twice = [SlideRow(small_slides[0]), SlideRow(small_slides[1], slide_id="test_upper")]
    with pytest.raises(CorpusError, match="test_upper"):
        build_corpus(twice, tmp_path / "a", OPTIONS)
    with pytest.raises(CorpusError, match="No slides"):
        build_corpus([], tmp_path / "a", OPTIONS)
    with pytest.raises(CorpusError, match="workers=0"):
        build_corpus([SlideRow(small_slides[0])], tmp_path / "a", OPTIONS, workers=0)
    for wrong in ({"stride": 0}, {"tissue": 1.5}, {"mpp": -1.0}, {"codec": "gif"}):
        with pytest.raises(CorpusError, match=next(iter(wrong))):
            CorpusOptions(**wrong)
    assert not any(tmp_path.iterdir())


def test_corpus_json_lets_the_grid_be_rebuilt(tmp_path, cmu_slide):
    """The teacher's 224 px cells: sixteen to a region, on one grid of the slide."""
    build_corpus([SlideRow(cmu_slide)], tmp_path / "a", CorpusOptions(stride=448))
    described = json.loads((tmp_path / "a" / "corpus.json").read_text())
    (grid,) = described["slides"]
    assert (described["mpp"], described["region_px"], described["stride_px"]) == (0.5, 896, 448)
    scale = described["mpp"] / grid["mpp0"]
    for row in read_rows(tmp_path / "a"):
        column, line = (
            round((row[axis] - grid[f"{axis}0"]) / (224 * scale)) for axis in ("x", "y")
        )
        assert row["x"] == grid["x0"] + round(column * 224 * scale)
        assert row["y"] == grid["y0"] + round(line * 224 * scale)
        assert column % 2 == line % 2 == 0

"""Slides to bags: values, resume, and every fault for itself."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from lanczos_reference import expected_region
from mean_colour import mean_colour
from PIL import Image
from tiled_tiff import write_tiff

from xmag_hf.embedding import (
    EmbedError,
    EmbedOptions,
    SlideSource,
    embed_slide,
    embed_slides,
    read_bag,
    write_bag,
)
from xmag_hf.embedding.sources import changed_at

OPTIONS = EmbedOptions(threads=2, batch_size=4, preview=False, features="float32")


def statuses(summary) -> dict[str, str]:
    return {record.slide_id: record.status for record in summary.records}


def test_features_are_those_of_the_places(slide, tissue, encoder):
    """0.47 um/px grid over 0.5 um/px level 0: enlarged, fractional starts."""
    options = dataclasses.replace(OPTIONS, mpp=0.47, patch_px=200, overlap=56, tokens=True)
    encoder = mean_colour(input_px=200)
    bag = embed_slide(slide, encoder, options)
    starts = [round(k * 144 * 0.47 / 0.5) for k in range(9)]
    assert {x for x, _ in bag.coords.tolist()} <= set(starts)
    assert len(bag.features) > 20
    for row in (0, len(bag.features) // 2, len(bag.features) - 1):
        exact = expected_region(tissue, 1, tuple(bag.coords[row]), (200, 200), 0.47, 0.5)
        assert np.allclose(bag.features[row], exact.mean((0, 1)) / 255, atol=2e-3)
        cells = exact.reshape(4, 50, 4, 50, 3).mean((1, 3)).reshape(16, 3)
        assert np.allclose(bag.tokens[row], cells / 255, atol=4e-3)
    info = bag.info
    assert (info.encoder, info.pooling, info.precision) == ("mean-colour", "mean", "fp32")
    assert (info.mpp, info.patch_px, info.overlap, info.mpp0) == (0.47, 200, 56, 0.5)
    assert (info.level0_size, info.level, info.tissue_threshold) == ((1100, 1000), 0, 0.25)


def test_resized_patches_keep_their_true_scale(slide, encoder):
    options = dataclasses.replace(OPTIONS, patch_px=256)
    bag = embed_slide(slide, encoder, options)
    assert (bag.info.mpp, bag.info.patch_px, bag.info.width_level0) == (0.5, 256, 256.0)
    assert bag.info.input_mpp == pytest.approx(128 / 224)
    assert sorted({x for x, _ in bag.coords.tolist()})[:2] == [0, 256]


def test_the_hubs_commit_is_told_and_decides_nothing(tmp_path, slide):
    """The same weights lie at another commit once their page is corrected."""
    encoder = mean_colour()
    encoder.card = dataclasses.replace(encoder.card, commit="c" * 40)
    assert statuses(embed_slides([SlideSource(slide)], tmp_path, encoder, OPTIONS)) == {
        slide.stem: "ok"
    }
    assert read_bag(tmp_path / f"{slide.stem}.h5").info.encoder_commit == "c" * 40
    encoder.card = dataclasses.replace(encoder.card, commit="d" * 40)
    assert statuses(embed_slides([SlideSource(slide)], tmp_path, encoder, OPTIONS)) == {
        slide.stem: "present"
    }


def test_no_tissue_gives_an_empty_bag(tmp_path, encoder):
    glass = write_tiff(tmp_path / "glass.tif", [np.full((600, 600, 3), 243, np.uint8)], mpp=0.5)
    bag = embed_slide(glass, encoder, OPTIONS)
    assert (bag.features.shape, bag.coords.shape) == ((0, 3), (0, 2))


@pytest.fixture
def faulty(tmp_path, tissue, slide, cmu_slide) -> dict[str, Path]:
    """A slide with each fault, and the status it should get."""
    folder = tmp_path / "faulty"
    folder.mkdir()

    def write(name: str, *args: object) -> Path:
        return write_tiff(folder / f"{name}.tif", *args)

    (folder / "empty.tif").write_bytes(b"")
    (folder / "truncated.tif").write_bytes(slide.read_bytes()[:3000])
    (folder / "renamed.svs").write_bytes(b"GIF89a, surely")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n and then nothing")
    write("no_mpp", [tissue], None)
    write("skewed", [tissue], (0.5, 0.6))
    write("coarse", [tissue], 4.0)
    write("white", [np.full((600, 600, 3), 255, np.uint8)], 0.5)
    write("black", [np.zeros((600, 600, 3), np.uint8)], 0.5)
    write("small", [tissue[300:450, 300:450]], 0.5)
    dead = bytearray(cmu_slide.read_bytes())
    with tifffile.TiffFile(cmu_slide) as tiff:
        page = tiff.pages[0]
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            dead[offset : offset + count] = bytes(count)
    (folder / "dead.svs").write_bytes(dead)
    (folder / "good.tif").write_bytes(slide.read_bytes())
    content = bytearray(cmu_slide.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    (folder / "damaged.svs").write_bytes(content)
    return {path.stem: path for path in sorted(folder.iterdir())}


EXPECTED = {
    "empty": "failed",
    "truncated": "failed",
    "renamed": "failed",
    "dead": "failed",
    "image": "failed",
    "absent": "failed",
    "no_mpp": "refused",
    "skewed": "refused",
    "coarse": "refused",
    "white": "no_tissue",
    "black": "no_tissue",
    "small": "ok",
    "good": "ok",
    "damaged": "ok",
    "annotated": "failed",
}


def test_each_fault_costs_its_own_slide(tmp_path, faulty, slide, encoder):
    options = dataclasses.replace(OPTIONS, preview=True)
    (tmp_path / "none.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    sources = [SlideSource(path) for path in faulty.values()]
    sources += [
        SlideSource(tmp_path / "absent.svs"),
        SlideSource(slide, "annotated", tissue_geojson=tmp_path / "none.geojson"),
    ]
    out = tmp_path / "out"
    summary = embed_slides(sources, out, encoder, options)
    assert statuses(summary) == EXPECTED
    records = {record.slide_id: record for record in summary.records}
    for name, record in records.items():
        assert (name in record.reason) == (record.status != "ok")
        assert (out / f"{name}.h5").exists() == (record.status == "ok")
        assert (out / record.bag).is_file() == (record.status == "ok")
        assert not record.reason.startswith(f"{name}: {name}")
    done = {name for name, status in EXPECTED.items() if status in ("ok", "no_tissue")}
    assert {path.stem for path in (out / "previews").iterdir()} == done
    with Image.open(out / "previews" / "damaged.png") as picture:
        red = (np.asarray(picture).astype(int) - (220, 30, 30) == 0).all(axis=2)
        assert red.sum() > 20  # the crosses over what could not be read
    problems = {record.slide_id for record in summary.problems}
    failed = {name for name, status in EXPECTED.items() if status in ("failed", "refused")}
    assert problems == failed | {"damaged"}
    alone = embed_slide(slide, encoder, OPTIONS)
    assert (read_bag(out / "good.h5").features == alone.features).all()
    assert not list((out / ".locks").iterdir())
    _check_summary(out, records)


def _check_summary(out: Path, records: dict) -> None:
    with (out / "summary.csv").open(newline="") as file:
        lines = {line["slide_id"]: line for line in csv.DictReader(file)}
    assert {name: line["status"] for name, line in lines.items()} == EXPECTED
    damaged = read_bag(out / "damaged.h5")
    assert int(lines["damaged"]["patches"]) == len(damaged.features)
    assert int(lines["damaged"]["unreadable"]) == damaged.info.unreadable_patches > 0
    assert "damaged there" in lines["damaged"]["first_unreadable"]
    assert (lines["small"]["padded"], lines["small"]["patches"]) == ("1", "1")
    content = json.loads((out / "summary.json").read_text())
    assert content["slides"] == {"ok": 3, "no_tissue": 2, "refused": 3, "failed": 7}
    assert content["patches"] == sum(r.patches for r in records.values())
    assert content["geometry"]["mpp"] == 0.5
    assert "torch" in content["versions"]


def test_a_finished_slide_is_left_alone_only_if_it_is_the_same(tmp_path, slide, encoder, tissue):
    out = tmp_path / "out"
    own = tmp_path / "own.tif"
    own.write_bytes(slide.read_bytes())
    sources = [SlideSource(own)]
    options = dataclasses.replace(OPTIONS, tokens=True)
    assert statuses(embed_slides(sources, out, encoder, options)) == {"own": "ok"}
    stamp = (out / "own.h5").stat().st_mtime_ns
    again = embed_slides(sources, out, encoder, OPTIONS)  # tokens more than asked for
    assert statuses(again) == {"own": "present"}
    assert again.records[0].patches == len(read_bag(out / "own.h5").features)
    assert not again.problems
    third = embed_slides(sources, out, encoder, OPTIONS).records[0]
    assert third.seconds["encode"] > 0 and third.tissue_mm2  # known from the summary
    (out / "summary.json").write_text("{")
    assert embed_slides(sources, out, encoder, OPTIONS).records[0].tissue_mm2 is None

    def refused(said: str, encoder=encoder, source=sources[0], **changes: object) -> None:
        summary = embed_slides([source], out, encoder, dataclasses.replace(OPTIONS, **changes))
        assert statuses(summary) == {"own": "refused"}
        assert said in summary.records[0].reason
        assert "another --out" in summary.records[0].reason

    refused("encoder 'mean-colour' there, 'uni' asked", mean_colour(name="uni"))
    refused("encoder_revision", mean_colour(revision="sha256:ffffffffffffffff"))
    refused("pooling", mean_colour(pooling="cls"))
    refused("normalisation 'rgb/255 mean=(0.0", mean_colour(mean=(0.5, 0.5, 0.5)))
    half = mean_colour()
    half.precision = "bf16"
    refused("precision 'fp32' there, 'bf16' asked", half)
    refused("mpp 0.5 there, 0.46 asked", mpp=0.46)
    refused("patch_px 224 there, 256 asked", patch_px=256)
    refused("overlap 0 there, 10 asked", overlap=10)
    refused("tissue_threshold", tissue=0.5)
    refused("pad_edges", pad_edges=True)
    refused("features 'float32' there, 'float16' asked", features="float16")
    refused("mpp0 0.5 there, 0.51 asked", source=SlideSource(own, mpp=0.51))
    geojson = tmp_path / "a.geojson"
    geojson.write_text("{}")
    refused("tissue 'satur", source=SlideSource(own, tissue_geojson=geojson))
    assert (out / "own.h5").stat().st_mtime_ns == stamp
    bag = read_bag(out / "own.h5")  # made before the normalisation was written down
    older = dataclasses.replace(bag.info, normalisation=None)
    write_bag(out / "own.h5", dataclasses.replace(bag, info=older))
    assert statuses(embed_slides(sources, out, encoder, OPTIONS)) == {"own": "present"}
    write_tiff(own, [tissue[100:]], mpp=0.5)
    refused("slide_sha256_head")
    bag = read_bag(out / "own.h5")
    write_bag(out / "own.h5", dataclasses.replace(bag, tokens=None))
    refused("tokens False there, True asked", tokens=True)
    (out / "own.h5").write_bytes(b"half a bag")
    broken = embed_slides(sources, out, encoder, OPTIONS)
    assert "no complete HDF5" in broken.records[0].reason
    (out / "own.h5").unlink()
    assert statuses(embed_slides(sources, out, encoder, OPTIONS)) == {"own": "ok"}


def test_a_bag_with_losses_is_made_again_when_the_slide_was_copied_again(
    tmp_path, cmu_slide, encoder
):
    """Damaged behind the first MiB, which tells slides apart; the copy keeps its old date."""
    out, own, whole = tmp_path / "out", tmp_path / "own.svs", cmu_slide.read_bytes()
    options = dataclasses.replace(OPTIONS, mpp=1.0)
    own.write_bytes(whole[:1_100_000] + bytes(100_000) + whole[1_200_000:])

    def embedded():
        return embed_slides([SlideSource(own)], out, encoder, options).records[0]

    first = embedded()
    assert first.status == "ok" and first.unreadable > 0
    again = embedded()
    assert (again.status, again.unreadable) == ("present", first.unreadable)
    assert f"own: {first.unreadable} patches" in again.reason
    assert f"remove {out / 'own.h5'} to try again" in again.reason
    own.write_bytes(whole)
    os.utime(own, (1_000_000_000, 1_000_000_000))
    mended = embedded()
    assert (mended.status, mended.unreadable) == ("ok", 0)
    assert mended.patches == first.patches + first.unreadable
    assert len(read_bag(out / "own.h5").features) == mended.patches
    last = embedded()
    assert (last.status, last.reason) == ("present", "")


@pytest.mark.parametrize(
    ("name", "part", "content"),
    [
        ("a.svs", "a.svs", ""),
        ("a.mrxs", "a/Data0003.dat", ""),
        (
            "a.vms",
            "a scan(1,0).jpg",
            "[Virtual Microscope Specimen]\nImageFile(1,0)=a scan(1,0).jpg",
        ),
        ("a.dcm", "level1.dcm", ""),
    ],
)
def test_a_slide_changes_with_any_of_its_files(tmp_path, name, part, content):
    slide = tmp_path / name
    slide.write_text(content)
    (tmp_path / "a").mkdir()
    (tmp_path / part).touch()
    before = changed_at(slide)
    time.sleep(0.05)
    (tmp_path / "other.svs").touch()
    (tmp_path / "other.jpg").touch()
    assert changed_at(slide) == before
    (tmp_path / part).touch()
    assert changed_at(slide) > before


def test_a_scale_said_once_is_not_taken_for_the_file_s_own(tmp_path, slide, encoder):
    """The bag of a run with --slide-mpp has other coordinates than one without."""
    out = tmp_path / "out"
    given = dataclasses.replace(OPTIONS, slide_mpp=0.49)
    assert statuses(embed_slides([SlideSource(slide)], out, encoder, given)) == {"tissue": "ok"}
    assert statuses(embed_slides([SlideSource(slide)], out, encoder, given)) == {
        "tissue": "present"
    }
    summary = embed_slides([SlideSource(slide)], out, encoder, OPTIONS)
    assert statuses(summary) == {"tissue": "refused"}
    assert 'mpp0 0.49 there, "the file\'s own" asked for' in summary.records[0].reason


def test_a_decoder_s_odd_error_costs_its_slide_only(tmp_path, slide, encoder):
    """A GeoJSON nested too deep raises RecursionError."""
    deep = tmp_path / "deep.geojson"
    deep.write_text('{"type": "Feature", "geometry": ' * 20_000 + "null" + "}" * 20_000)
    sources = [SlideSource(slide, "first", tissue_geojson=deep), SlideSource(slide, "second")]
    summary = embed_slides(sources, tmp_path / "out", encoder, OPTIONS)
    assert statuses(summary) == {"first": "failed", "second": "ok"}
    assert summary.records[0].reason.startswith("first: RecursionError")


def test_a_summary_of_another_version_is_no_obstacle(tmp_path, slide, encoder):
    out = tmp_path / "out"
    embed_slides([SlideSource(slide)], out, encoder, OPTIONS)
    (out / "summary.json").write_text('{"records": [{"slide_id": "tissue", "status": "ok"}]}')
    summary = embed_slides([SlideSource(slide)], out, encoder, OPTIONS)
    assert statuses(summary) == {"tissue": "present"}


def _lines(out: Path) -> dict[str, dict]:
    content = json.loads((out / "summary.json").read_text())
    lines = {line["slide_id"]: line for line in content["records"]}
    assert sum(content["slides"].values()) == len(lines) == len(content["records"])
    assert content["patches"] == sum(line["patches"] for line in lines.values())
    with (out / "summary.csv").open(newline="") as file:
        table = {line["slide_id"]: line["status"] for line in csv.DictReader(file)}
    assert table == {name: line["status"] for name, line in lines.items()}
    return lines


def test_the_summary_keeps_lines_of_slides_that_are_not_of_the_run(tmp_path, slide, encoder):
    """A part of the list on each of several machines, or one slide more later."""
    out = tmp_path / "out"
    first = [SlideSource(slide, "a"), SlideSource(tmp_path / "absent.svs", "b")]
    embed_slides(first, out, encoder, OPTIONS)
    before = _lines(out)
    assert before["a"]["tissue_mm2"] > 0 and before["b"]["reason"]
    summary = embed_slides([SlideSource(slide, "c")], out, encoder, OPTIONS)
    assert statuses(summary) == {"c": "ok"}  # what this run is told about
    after = _lines(out)
    assert {name: after[name] for name in "ab"} == before
    assert after["c"]["seconds"]["encode"] > 0
    (out / "a.h5").unlink()
    embed_slides([SlideSource(slide, "c")], out, encoder, OPTIONS)
    assert {name: line["status"] for name, line in _lines(out).items()} == {
        "b": "failed",
        "c": "present",
    }


def test_an_interrupted_run_keeps_the_lines_of_slides_it_did_not_reach(tmp_path, slide, encoder):
    out = tmp_path / "out"
    sources = [SlideSource(slide, name) for name in "abc"]
    embed_slides(sources, out, encoder, OPTIONS)
    before = _lines(out)
    (out / "c.h5").unlink()

    def interrupt(state) -> None:
        if state.slides_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_slides(sources, out, encoder, OPTIONS, progress=interrupt)
    after = _lines(out)
    assert after.pop("a") == before.pop("a") | {"status": "present"}
    assert after == before


def test_a_lock_of_a_dead_process_and_its_leavings_are_cleared(tmp_path, slide, encoder):
    from xmag_hf.lock import host

    out = tmp_path / "out"
    (out / ".locks").mkdir(parents=True)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    lock = out / ".locks" / "tissue.lock"
    lock.write_text(json.dumps({"host": host(), "pid": child, "token": "gone"}))
    (out / ".tissue.h5.12-ab.tmp").write_bytes(b"half")
    (out / ".other.h5.12-ab.tmp").write_bytes(b"somebody else's")
    assert statuses(embed_slides([SlideSource(slide)], out, encoder, OPTIONS)) == {"tissue": "ok"}
    assert not list((out / ".locks").iterdir())
    assert [path.name for path in out.glob(".*.tmp")] == [".other.h5.12-ab.tmp"]


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(tmp_path, slide, encoder, monkeypatch):
    """The second bag does not fit; the first stays, and the same call goes on."""
    import xmag_hf.embedding.run as module

    small = write_tiff(tmp_path / "a.tif", [np.asarray(Image.open(slide))[300:700]], mpp=0.5)
    sources = [SlideSource(small), SlideSource(slide)]
    plain, soft_hard = module.write_bag, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(path, bag):  # only while the bag is written: pytest writes files too
        limit = 100 if path.stem == "tissue" else soft_hard[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft_hard[1]))
        try:
            return plain(path, bag)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_bag", write)
        with pytest.raises(OSError, match="too large"):
            embed_slides(sources, tmp_path / "out", encoder, OPTIONS)
    assert [path.name for path in (tmp_path / "out").glob("*.h5")] == ["a.h5"]
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert not list((tmp_path / "out" / ".locks").iterdir())
    summary = embed_slides(sources, tmp_path / "out", encoder, OPTIONS)
    assert statuses(summary) == {"a": "present", "tissue": "ok"}


def test_no_permission(slide, encoder):
    """A slide that may not be read fails alone; a folder that may not be written stops the run."""
    folder = Path(tempfile.mkdtemp())
    own, closed = folder / "own.tif", folder / "closed.tif"
    for path in (own, closed):
        path.write_bytes(slide.read_bytes())
    closed.chmod(0)
    (folder / "out").mkdir()
    folder.chmod(0o755)
    (folder / "out").chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        sources = [SlideSource(closed), SlideSource(own)]
        summary = embed_slides(sources, folder / "out", encoder, OPTIONS)
        assert statuses(summary) == {"closed": "failed", "own": "ok"}
        assert "closed" in summary.records[0].reason
        assert "ermission" in summary.records[0].reason
    finally:
        os.seteuid(user)
    closed.chmod(0o644)
    (folder / "out").chmod(0o755)
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            embed_slides(sources, folder / "out", encoder, OPTIONS)
    finally:
        os.seteuid(user)


def test_infinite_embeddings_fail_their_slide(tmp_path, slide, encoder):
    encoder.model.scale.fill_(1e6)
    options = dataclasses.replace(OPTIONS, features="float16")
    summary = embed_slides([SlideSource(slide)], tmp_path / "out", encoder, options)
    assert statuses(summary) == {"tissue": "failed"}
    assert "--features float32" in summary.records[0].reason


def test_memory_too_small_for_one_patch_ends_the_run(tmp_path, slide, encoder):
    encoder.model.largest = 0
    with pytest.raises(EmbedError, match="not even one patch"):
        embed_slides([SlideSource(slide)], tmp_path / "out", encoder, OPTIONS)
    assert not list((tmp_path / "out" / ".locks").iterdir())


def test_wrong_calls_fail_before_any_work(tmp_path, slide, encoder):
    out = tmp_path / "out"
    for sources, said in (
        ([], "No slides"),
        ([SlideSource(slide), SlideSource(slide)], "'tissue' stands for"),
        ([SlideSource(slide, "a/b")], "'a/b' cannot name a file"),
        ([SlideSource(slide, ".hidden")], "cannot name a file"),
        ([SlideSource(slide, "caf\udce9")], "unprintable"),  # a Latin-1 name on a UTF-8 system
        ([SlideSource(slide, "x" * 201)], "200 bytes"),
    ):
        with pytest.raises(EmbedError, match=said):
            embed_slides(sources, out, encoder, OPTIONS)
    with pytest.raises(EmbedError, match="um/px"):
        embed_slides([SlideSource(slide)], out, mean_colour(mpp=None), OPTIONS)
    with pytest.raises(EmbedError, match="no class token"):
        options = dataclasses.replace(OPTIONS, pooling="cls+mean")
        embed_slides([SlideSource(slide)], out, encoder, options)
    if not torch.cuda.is_available():
        with pytest.raises(EmbedError, match="--device cuda"):
            embed_slides([SlideSource(slide)], out, "random:tiny", EmbedOptions(device="cuda"))
    assert not out.exists()

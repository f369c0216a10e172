"""Optional 5x columns: against libjpeg's own reduced decoding, and closed-form pixels."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from lanczos_reference import expected_region
from PIL import Image
from tiled_tiff import write_tiff

from xmag_hf.data_builders import CorpusError, CorpusOptions, SlideRow, corpus_fingerprint
from xmag_hf.data_builders.build import build_corpus
from xmag_hf.data_builders.reading_paths import (
    fast_reduction,
    read_fast,
    read_scanner,
    scanner_level,
)
from xmag_hf.slides import open_slide

BOTH = CorpusOptions(reading_paths=True, margin=0.2)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory, cmu_pixels) -> Path:
    """Real tissue at 0.5044 um/px with a fourfold coarser level of other contrast."""
    level0 = cmu_pixels[600:2200, 600:2200]
    coarse = Image.fromarray(level0).resize((400, 400), Image.Resampling.BILINEAR)
    dimmed = (np.asarray(coarse) * 0.8).astype(np.uint8)  # says which level was read
    path = tmp_path_factory.mktemp("pyramid") / "slide.tif"
    return write_tiff(path, [level0, dimmed], mpp=0.5044)


def test_fast_is_what_libjpeg_decodes_reduced(pyramid, cmu_pixels) -> None:
    """Pillow's draft mode has libjpeg decode a JPEG of the very level at a quarter."""
    jpeg = io.BytesIO()
    Image.fromarray(cmu_pixels[600:2200, 600:2200]).save(jpeg, "JPEG", quality=100, subsampling=0)
    reduced = Image.open(jpeg)
    reduced.draft("RGB", (400, 400))
    assert reduced.size == (400, 400)
    x, y = 301, 203
    left, top, side = x / 4, y / 4, 448 / 0.5044 / 4
    box = (left, top, left + side, top + side)
    expected = np.asarray(reduced.resize((224, 224), Image.Resampling.LANCZOS, box), float)
    with open_slide(pyramid) as slide:
        assert fast_reduction(slide) == (0, 4)
        got = read_fast(slide, (x, y))
    difference = np.abs(got - expected)
    assert difference.max() <= 4 and difference.mean() < 0.6  # rounding of the codec
    shifted = np.asarray(reduced.resize((224, 224), Image.Resampling.LANCZOS, np.add(box, 0.5)))
    assert np.abs(got - shifted.astype(float)).mean() > 3


def test_scanner_is_the_stored_coarser_level(pyramid) -> None:
    with open_slide(pyramid) as slide:
        assert scanner_level(slide) == 1
        level = np.asarray(slide._handle.read_region((0, 0), 1, (400, 400)).convert("RGB"))
        got = read_scanner(slide, (301, 203))
    # At 0.5044 * 4 um/px a level px is 2.0176 um: enlarged by 1.0088, Lanczos not stretched.
    expected = expected_region(level, 4, (301, 203), (224, 224), 2.0, 0.5044)
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize(
    ("mpp", "factors", "scanner", "fast"),
    [
        (0.25, (1, 4, 16), 1, (1, 2)),  # 0.25, 1, 4
        (0.25, (1, 2), None, (1, 4)),  # 0.25, 0.5: the 20x view's own level is no other path
        (0.25, (1, 8), 1, None),  # 0.25, 2.0: nothing to reduce
        (0.25, (1,), None, (0, 8)),
        (0.526, (1, 4), 1, (0, 4)),  # 2.104 is 5.2% coarser
        (0.56, (1, 4), None, (0, 2)),  # 2.24 is too coarse
    ],
)
def test_which_levels_are_read(tmp_path, cmu_pixels, mpp, factors, scanner, fast) -> None:
    levels = [cmu_pixels[: 1024 // f, : 1024 // f] for f in factors]
    with open_slide(write_tiff(tmp_path / "slide.tif", levels, mpp=mpp)) as slide:
        assert (scanner_level(slide), fast_reduction(slide)) == (scanner, fast)


def test_a_corpus_with_all_columns(tmp_path, pyramid, cmu_pixels) -> None:
    summary = build_corpus([SlideRow(pyramid)], tmp_path / "corpus", BOTH)
    plain = build_corpus([SlideRow(pyramid)], tmp_path / "plain", CorpusOptions())
    table = pq.read_table(next((tmp_path / "corpus" / "data").glob("*")))
    assert table.column_names[-3:] == ["image_5x_scanner", "image_5x_fast", "image_5x_wide"]
    before = pq.read_table(next((tmp_path / "plain" / "data").glob("*")))
    assert table.select(before.column_names).equals(before)  # nothing else changes
    assert summary.fingerprint != plain.fingerprint
    row = table.to_pylist()[0]
    wide = np.asarray(Image.open(io.BytesIO(row["image_5x_wide"]["bytes"])))
    # 224 * 1.2 / 0.8 px at 1.6 um/px, centred: 44.8 um before the region; white past the edge.
    level0 = np.pad(cmu_pixels[600:2200, 600:2200], ((300,), (300,), (0,)), constant_values=255)
    start = (300 + row["x"] - 44.8 / 0.5044, 300 + row["y"] - 44.8 / 0.5044)
    expected = expected_region(level0, 1, start, (336, 336), 1.6, 0.5044)
    assert np.abs(wide - expected).max() <= 1
    line = json.loads((tmp_path / "corpus" / "manifest.jsonl").read_text())
    assert line["view_mpps"]["image_5x_scanner"] == pytest.approx(2.0176)
    assert line["view_mpps"]["image_5x_wide"] == pytest.approx(1.6)
    card = (tmp_path / "corpus" / "README.md").read_text()
    assert "`image_5x_scanner`, `image_5x_fast`" in card and "0.2 of its width more" in card
    loaded = load_dataset(str(tmp_path / "corpus"), split="train", cache_dir=str(tmp_path / "c"))
    assert loaded[0]["image_5x_fast"].size == (224, 224)


def test_a_slide_without_such_levels_has_nulls(tmp_path, cmu_pixels) -> None:
    path = write_tiff(tmp_path / "flat.tif", [cmu_pixels[600:2000, 600:2000]], mpp=0.5)
    build_corpus([SlideRow(path)], tmp_path / "corpus", CorpusOptions(reading_paths=True))
    table = pq.read_table(next((tmp_path / "corpus" / "data").glob("*")))
    assert table.num_rows > 0
    assert table["image_5x_scanner"].null_count == table.num_rows
    assert table["image_5x_fast"].null_count == 0
    loaded = load_dataset(str(tmp_path / "corpus"), split="train", cache_dir=str(tmp_path / "c"))
    assert loaded[0]["image_5x_scanner"] is None


def test_a_plain_corpus_is_still_the_one_it_was() -> None:
    """The published rule by hand: an older corpus, and every cache of it, keeps its name."""
    import hashlib

    from xmag_hf.slides.tissue import METHOD

    options = {"stride": 896, "tissue": 0.25, "mpp": None, "codec": "jpeg95"}
    options |= {"allow_coarse": False, "max_shard_mb": 500}
    content = {"format_version": 1, "options": options, "tissue_method": METHOD}
    content["slides"] = [["a", None, "0" * 64]]
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    slides = [("a", None, "0" * 64)]
    assert corpus_fingerprint(CorpusOptions(), slides) == expected
    for change in ({"margin": 0.1}, {"reading_paths": True}):
        changed = dataclasses.replace(CorpusOptions(), **change)
        assert corpus_fingerprint(changed, slides) != expected


def test_a_corpus_begun_without_them_is_not_gone_on_with(tmp_path, pyramid) -> None:
    out = tmp_path / "corpus"
    build_corpus([SlideRow(pyramid)], out, CorpusOptions())
    described = json.loads((out / "corpus.json").read_text())
    for name in ("reading_paths", "margin"):  # as an older release left it
        del described["options"][name]
    (out / "corpus.json").write_text(json.dumps(described))
    assert build_corpus([SlideRow(pyramid)], out, CorpusOptions()).already_done
    with pytest.raises(CorpusError, match="margin 0.0 there, 0.2 asked for"):
        build_corpus([SlideRow(pyramid)], out, CorpusOptions(margin=0.2))


@pytest.mark.parametrize("margin", [-0.1, 0.6, float("nan")])
def test_margins_out_of_range(margin: float) -> None:
    with pytest.raises(CorpusError, match="margin="):
        CorpusOptions(margin=margin)

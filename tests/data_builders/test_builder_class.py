"""The `datasets` builder cuts the same pairs as `build_corpus`."""

from __future__ import annotations

import io
import shutil

import pytest
from datasets import Image as ImageFeature
from PIL import Image

from xmag_hf.data_builders import CorpusError, CorpusOptions, SlideRow, paired_magnification
from xmag_hf.data_builders.paired_magnification import PairedMagnification, build_corpus
from xmag_hf.data_builders.pairs import open_row
from xmag_hf.slides import SlideOpenError


def test_same_rows_as_the_corpus(tmp_path, cmu_slide):
    import pyarrow.parquet as pq

    options = CorpusOptions(stride=896)
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"nothing")
    builder = PairedMagnification(
        slides=[broken, SlideRow(cmu_slide, cancer_type="skin")],
        options=options,
        cache_dir=str(tmp_path / "cache"),
    )
    builder.download_and_prepare()
    rows = builder.as_dataset("train")
    build_corpus([SlideRow(cmu_slide, cancer_type="skin")], tmp_path / "corpus", options)
    (shard,) = (tmp_path / "corpus" / "data").iterdir()
    expected = pq.read_table(shard).to_pylist()
    plain = rows.cast_column("image_20x", ImageFeature(decode=False))
    plain = plain.cast_column("image_5x", ImageFeature(decode=False))
    assert [row["image_20x"]["bytes"] for row in plain] == [
        r["image_20x"]["bytes"] for r in expected
    ]
    assert [row["image_5x"]["bytes"] for row in plain] == [r["image_5x"]["bytes"] for r in expected]
    for name in ("x", "y", "width0", "mpp0", "level", "cancer_type", "tissue_fraction"):
        assert rows[name][:] == [row[name] for row in expected]
    decoded = Image.open(io.BytesIO(expected[0]["image_20x"]["bytes"]))
    assert rows[0]["image_20x"].tobytes() == decoded.tobytes()


def test_a_header_that_lies_costs_its_slide_and_not_the_build(
    tmp_path, cmu_slide, monkeypatch, caplog
):
    """Whatever it provokes: reading one slide fails as NumPy and Pillow fail on such numbers."""
    lying = [tmp_path / f"{name}.svs" for name in ("value", "division", "index", "memory")]
    for path in lying:
        shutil.copy(cmu_slide, path)
    provoked = (ValueError("negative size"), ZeroDivisionError(), IndexError(), MemoryError("2 PB"))
    faults = dict(zip(lying, provoked, strict=True))

    def opened(row, options):
        if row.path in faults:
            raise faults[row.path]
        return open_row(row, options)

    monkeypatch.setattr(paired_magnification, "open_row", opened)
    builder = PairedMagnification(
        slides=[*lying, cmu_slide], options=CorpusOptions(stride=896), cache_dir=str(tmp_path / "c")
    )
    builder.download_and_prepare()
    assert set(builder.as_dataset("train")["slide_id"]) == {cmu_slide.stem}
    assert "left out: value: ValueError: negative size" in caplog.text
    assert "left out: memory: MemoryError: 2 PB" in caplog.text


def test_the_cache_notices_options_and_slides(tmp_path, cmu_slide):
    def folder(**options: object) -> str:
        builder = PairedMagnification(
            slides=[cmu_slide], options=CorpusOptions(**options), cache_dir=str(tmp_path)
        )
        return builder.cache_dir

    assert folder(stride=896) == folder(stride=896) != folder(stride=448)


def test_wrong_slides(tmp_path, cmu_slide):
    with pytest.raises(CorpusError, match="No slides"):
        PairedMagnification(cache_dir=str(tmp_path))
    with pytest.raises(CorpusError, match="CMU-1"):
        PairedMagnification(slides=[cmu_slide, cmu_slide], cache_dir=str(tmp_path))
    with pytest.raises((SlideOpenError, OSError), match="absent"):
        PairedMagnification(slides=["absent.svs"], cache_dir=str(tmp_path))

"""The `datasets` builder cuts the same pairs as `build_corpus`."""

from __future__ import annotations

import io

import pytest
from datasets import Image as ImageFeature
from PIL import Image

from xmag_hf.data_builders import CorpusError, CorpusOptions, SlideRow
from xmag_hf.data_builders.paired_magnification import PairedMagnification, build_corpus
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

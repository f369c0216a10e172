"""Fixtures shared by all tests: where real tissue lies, and a small real corpus."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes that share cores wait on threads
# Mapped corpora leave an Arrow copy: not in the user's own cache.
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="xmag-test-datasets-"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def cmu_slide() -> Path:
    return ROOT / "examples" / "data" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the tissue in ../shared/data, which is not here")
    return folder


@pytest.fixture(scope="session")
def cmu_pixels(cmu_slide: Path) -> np.ndarray:
    """(2967, 2220, 3) uint8, read by OpenSlide alone."""
    import openslide

    with openslide.OpenSlide(str(cmu_slide)) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


@pytest.fixture(scope="session")
def pair_corpus(tmp_path_factory: pytest.TempPathFactory, cmu_pixels: np.ndarray) -> Path:
    """24 pairs of real tissue in the published layout, cut without any code of the package.

    Two slides ('upper', 'lower'; 12 pairs each, stride 224, 4 columns by 3 rows), a shard each,
    as if scanned at exactly 0.5 um/px. The 20x image is PNG, so pixels are exact.
    """
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "data").mkdir()
    for number, (slide_id, top) in enumerate([("upper", 100), ("lower", 1500)]):
        rows = []
        for y in range(0, 3 * 224, 224):
            for x in range(0, 4 * 224, 224):
                region = cmu_pixels[top + y : top + y + 896, 100 + x : 100 + x + 896]
                rows.append(_pair(region, slide_id, x, y))
        path = folder / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=5)
    info = {"fingerprint": "f" * 64, "stride_px": 224}
    (folder / "corpus.json").write_text(json.dumps(info))
    return folder


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("image_20x", _IMAGE),
        ("image_5x", _IMAGE),
        ("slide_id", pa.string()),
        ("patient_id", pa.string()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("width0", pa.float64()),
    ]
)


def _pair(region: np.ndarray, slide_id: str, x: int, y: int) -> dict:
    image = Image.fromarray(region)
    small = image.resize((224, 224), Image.Resampling.LANCZOS)
    return {
        "image_20x": {"bytes": _png(image), "path": None},
        "image_5x": {"bytes": _png(small), "path": None},
        "slide_id": slide_id,
        "patient_id": f"patient of {slide_id}",
        "x": x,
        "y": y,
        "width0": 896.0,
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

"""A slide of any size in a bounded memory: peaks of processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from giant_tiff import write_giant

MiB = 1 << 20


@pytest.mark.parametrize(
    ("side_px", "limit"),
    # The larger one's limit is the product's promise. OpenSlide's caches alone take some 300 MiB.
    [(40_000, 640 * MiB), pytest.param(100_000, 2048 * MiB, marks=pytest.mark.slow)],
)
def test_a_slide_needs_no_more_than_its_overview(
    tmp_path: Path, cmu_pixels: np.ndarray, side_px: int, limit: int
):
    """At 40,000 px the pixels alone would be 4.8 GB."""
    path = write_giant(tmp_path / "giant.tif", side_px, cmu_pixels[900:1156, 1000:1256], every=8)
    assert path.stat().st_size < 8 * MiB
    here = Path(__file__).resolve().parent
    command = [sys.executable, str(here / "peak_memory.py"), str(path), str(tmp_path / "out")]
    search = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, env=environment, timeout=900, capture_output=True, text=True
    )
    status, patches, peak, *reason = done.stdout.split()
    assert status == "ok", reason
    assert int(patches) > 0.05 * (side_px / 896) ** 2
    assert int(peak) < limit

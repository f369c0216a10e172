"""An encoder whose embeddings can be computed by hand, and small slides of real tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mean_colour import mean_colour
from tiled_tiff import write_tiff

from xmag_hf.encoders import Encoder


@pytest.fixture
def encoder() -> Encoder:
    return mean_colour()


@pytest.fixture(scope="session")
def tissue(cmu_pixels: np.ndarray) -> np.ndarray:
    """(1000, 1100, 3) uint8 of stained tissue, taken as 0.5 um/px."""
    return cmu_pixels[200:1200, 700:1800]


@pytest.fixture(scope="session")
def slide(tmp_path_factory: pytest.TempPathFactory, tissue: np.ndarray) -> Path:
    return write_tiff(tmp_path_factory.mktemp("slide") / "tissue.tif", [tissue], mpp=0.5)

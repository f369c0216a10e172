"""Confusion matrices count right; files are whole; colours can be told apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from xmag_hf.reporting.errors import ReportError
from xmag_hf.reporting.pictures import COLOURS, confusion, draw_confusion

# What protanopes and deuteranopes see of linear RGB (Vienot et al. 1999,
# doi:10.1002/(SICI)1520-6378(199908)24:4<243::AID-COL5>3.0.CO;2-3).
DICHROMATS = {
    "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def test_confusion_is_scikit_learns_and_transposed_would_differ() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 90), rng.integers(0, 4, 90)
    expected = confusion_matrix(labels, predicted, labels=range(4))
    assert not (expected == expected.T).all()
    np.testing.assert_array_equal(confusion(labels, predicted, 4), expected)
    with pytest.raises(ReportError, match="3 classes"):
        confusion(labels, predicted, 3)
    with pytest.raises(ReportError, match=r"\(89,\)"):
        confusion(labels, predicted[1:], 4)


def test_confusion_picture_has_its_dark_fields_in_their_places(tmp_path: Path) -> None:
    labels, names = np.repeat(np.arange(20), 2), [f"class {label}" for label in range(20)]
    path = tmp_path / "confusion.png"
    for predicted, sign in ((labels, 1), (19 - labels, -1)):
        draw_confusion(labels, predicted, names, path, title="made", about={"Comment": "seed 0"})
        with Image.open(path) as image:
            assert image.info["Comment"] == "seed 0"
            pixels = np.asarray(image.convert("RGB"))
        full = (pixels == (0x00, 0x45, 0x7A)).all(axis=2)
        full[:, int(0.8 * full.shape[1]) :] = False  # the colour bar
        assert full.mean() > 0.005
        assert sign * np.corrcoef(np.nonzero(full))[0, 1] > 0.95
    assert list(tmp_path.iterdir()) == [path]


def test_no_two_colours_look_alike() -> None:
    def linear(colour: str) -> np.ndarray:
        return (np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255) ** 2.2

    for matrix in DICHROMATS.values():
        seen = [(np.array(matrix) @ linear(c)).clip(0, 1) ** (1 / 2.2) for c in COLOURS]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.1

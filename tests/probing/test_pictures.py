"""Pictures: what is drawn is what was given; files are whole; classes differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from xmag_hf.probing import pictures
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.pictures import (
    Panel,
    draw_embeddings,
    per_class_rows,
    tsne,
)
from xmag_hf.reporting.pictures import COLOURS


def clusters(metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that only the metric asked for can tell apart."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    if metric == "cosine":  # directions, at lengths over three orders of magnitude
        x = np.eye(80)[labels] + 0.03 * rng.standard_normal((90, 80))
        return (x * 10 ** rng.uniform(-1, 2, (90, 1))).astype(np.float32), labels
    x = 0.1 * rng.standard_normal((90, 80))
    x[:, 0] += labels  # lengths along one direction
    return (x * [100] + 1000).astype(np.float32)[:, :3], labels


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_tsne_keeps_classes_apart_and_repeats(metric: str) -> None:
    x, labels = clusters(metric)
    points = tsne(x, metric=metric, perplexity=10, seed=4)
    # Leave-one-out in the picture: the nearest other point is of the same class.
    near = KNeighborsClassifier(2).fit(points, labels).kneighbors(points)[1]
    other = np.where(near[:, 0] == np.arange(90), near[:, 1], near[:, 0])
    assert (labels[other] == labels).mean() > 0.95
    np.testing.assert_array_equal(points, tsne(x, metric=metric, perplexity=10, seed=4))


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (np.full((9, 3), np.nan), {}, "NaN"),
        (np.ones((3, 3)), {}, "at least four"),
        (np.eye(9), {"perplexity": 9.0}, "--perplexity"),
        (np.eye(9), {"perplexity": 3.0, "metric": "l1"}, "cosine or euclidean"),
        (np.ones((9, 3)), {"perplexity": 3.0}, "the same"),
    ],
)
def test_tsne_refuses(x: np.ndarray, options: dict, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        tsne(x, **options)


def test_rows_per_class() -> None:
    labels = np.array([2] * 3 + [0] * 50)
    rows = per_class_rows(labels, 10, seed=0)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[rows]).tolist() == [10, 0, 3]
    assert len(per_class_rows(labels, 0, seed=0)) == 53


def test_pictures_are_whole_png_files_that_say_how_they_were_made(tmp_path: Path) -> None:
    labels = np.arange(40) % 20
    points = np.random.default_rng(0).standard_normal((40, 2))
    names = [f"class {label}" for label in range(21)]
    path = tmp_path / "tsne.png"
    panels = [Panel("student at 2 um/px", points), Panel("teacher at 0.5 um/px", points[::-1])]
    draw_embeddings(panels, labels, names, path, title="made", about={"Comment": "seed 0"})
    with Image.open(path) as image:
        image.load()
        assert image.info["Comment"] == "seed 0"
        seen = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
    for colour in COLOURS:  # the legend holds each of them unmixed
        assert tuple(bytes.fromhex(colour[1:])) in seen
    assert [p.name for p in tmp_path.iterdir()] == ["tsne.png"]
    with pytest.raises(ProbeError, match="student"):
        draw_embeddings(panels, labels[1:], names, path, title="made")


def test_no_two_classes_have_the_same_mark() -> None:
    assert len({pictures._style(label) for label in range(64)}) == 64

"""Pictures: what is drawn is what was given; files are whole; colours can be told apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from xmag_hf.probing import pictures
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.pictures import (
    Panel,
    confusion,
    draw_confusion,
    draw_embeddings,
    per_class_rows,
    read_class_predictions,
    tsne,
)
from xmag_hf.probing.report import write_class_predictions

# What protanopes and deuteranopes see of linear RGB (Vienot et al. 1999,
# doi:10.1002/(SICI)1520-6378(199908)24:4<243::AID-COL5>3.0.CO;2-3).
DICHROMATS = {
    "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


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


def test_confusion_is_scikit_learns_and_transposed_would_differ() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 90), rng.integers(0, 4, 90)
    expected = confusion_matrix(labels, predicted, labels=range(4))
    assert not (expected == expected.T).all()
    np.testing.assert_array_equal(confusion(labels, predicted, 4), expected)
    with pytest.raises(ProbeError, match="3 classes"):
        confusion(labels, predicted, 3)
    with pytest.raises(ProbeError, match=r"\(89,\)"):
        confusion(labels, predicted[1:], 4)


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
    for colour in pictures.COLOURS:  # the legend holds each of them unmixed
        assert tuple(bytes.fromhex(colour[1:])) in seen
    draw_confusion(labels, labels[::-1], names, tmp_path / "confusion.png", title="made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["confusion.png", "tsne.png"]
    with pytest.raises(ProbeError, match="student"):
        draw_embeddings(panels, labels[1:], names, path, title="made")


def test_no_two_classes_look_alike() -> None:
    assert len({pictures._style(label) for label in range(64)}) == 64

    def linear(colour: str) -> np.ndarray:
        return (np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255) ** 2.2

    for matrix in DICHROMATS.values():
        seen = [(np.array(matrix) @ linear(c)).clip(0, 1) ** (1 / 2.2) for c in pictures.COLOURS]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.1


def test_predictions_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], (2, 10)).astype(np.float32)
    labels, names = rng.integers(0, 3, 10), ("a", "b:p:c", "d, e")
    path = tmp_path / "row-linear.csv"
    write_class_predictions(path, np.arange(10).astype(str), None, labels, p, names)
    read_labels, read_p, read_names = read_class_predictions(path)
    np.testing.assert_array_equal(read_labels, labels)
    np.testing.assert_array_equal(read_p.astype(np.float32), p)
    assert read_names == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no class predictions"),
        ("id,group,label\n1,,a\n", "no class predictions"),
        ("id,group,y:a,r0:a\n1,,2,3\n", "no class predictions"),
        ("id,group,label,r0:p:a,r0:p:b,r1:p:a\n", "no class predictions"),
        ("id,group,label,r0:p:a,r0:p:b\n", "without rows"),
        ("id,group,label,r0:p:a,r0:p:b\n1,,c,0.5,0.5\n", "damaged row"),
        ("id,group,label,r0:p:a,r0:p:b\n1,,a,0.5\n", "damaged row"),
        ("id,group,label,r0:p:a,r0:p:b\n1,,a,0.5,x\n", "damaged row"),
    ],
)
def test_bad_predictions_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(ProbeError, match=words):
        read_class_predictions(path)

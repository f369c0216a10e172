"""Against scikit-learn's RidgeCV as the protocol has it, and counts done by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xmag_hf.probing.counts import (
    ALPHAS,
    count_probe,
    images_without_nuclei,
    nuclei_counts,
    nuclei_types,
    ridge_path,
)
from xmag_hf.probing.errors import ProbeError

ALL = np.array([[-np.inf, -np.inf, np.inf, np.inf]])


def counted(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d)).astype(np.float32) * 3 + 1
    rate = np.exp(1 + 0.6 * x[:, :2] / 3 + 0.1 * rng.standard_normal((n, 2)))
    return x, rng.poisson(rate)


@pytest.mark.parametrize(("n", "d"), [(60, 90), (80, 12)])
def test_count_probe_is_scaler_and_ridgecv(n: int, d: int) -> None:
    x, counts = counted(n, d)
    expected = np.empty((2, n, 2))
    for seed in range(2):
        for train, test in KFold(5, shuffle=True, random_state=seed).split(x):
            model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(2, 7, 11), cv=5))
            expected[seed, test] = model.fit(x[train], np.log1p(counts[train])).predict(x[test])
    np.testing.assert_allclose(count_probe(x, counts, seeds=range(2)), expected, atol=1e-5)


@pytest.mark.parametrize("d", [8, 50])
def test_ridge_path_is_ridge(d: int) -> None:
    x, counts = counted(30, d)
    x = x.astype(np.float64)
    actual = ridge_path(x[:20], counts[:20], x[20:], [1.0, 100.0])
    for alpha, predicted in zip([1.0, 100.0], actual, strict=True):
        np.testing.assert_allclose(predicted, Ridge(alpha).fit(x[:20], counts[:20]).predict(x[20:]))


def test_groups_stay_together() -> None:
    """Features that name the group, and a count that hangs on the group alone.

    With a group's other rows in training the count is known; without, it is not.
    """
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 4)
    x = np.eye(40)[groups] + 0.01 * rng.standard_normal((160, 40))
    counts = rng.integers(0, 50, 40)[groups][:, None]
    truth = np.log1p(counts[:, 0])
    torn = count_probe(x, counts, seeds=[0], alphas=[1.0])[0, :, 0]
    whole = count_probe(x, counts, groups=groups, seeds=[0], alphas=[1.0])[0, :, 0]
    assert np.corrcoef(torn, truth)[0, 1] > 0.9
    assert np.corrcoef(whole, truth)[0, 1] < 0.5


def test_shuffled_counts_cannot_be_predicted() -> None:
    x, counts = counted(120, 10)
    told = count_probe(x, counts, seeds=[0], alphas=[1.0])[0, :, 0]
    assert np.corrcoef(told, np.log1p(counts[:, 0]))[0, 1] > 0.4
    shuffled = np.random.default_rng(1).permutation(counts)
    predicted = count_probe(x, shuffled, seeds=range(3), alphas=[1.0])[:, :, 0]
    assert abs(np.mean([np.corrcoef(p, shuffled[:, 0])[0, 1] for p in predicted])) < 0.25


NUCLEI = """field,x,y,type
a,0,0,epithelial
a,9.99,5,epithelial
a,10,5,inflammatory
a,3,3,
a,4,4,N/A
b,1,1,inflammatory
"""


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    path = tmp_path / "nuclei.csv"
    path.write_text(NUCLEI)
    return path


def test_nuclei_by_hand(nuclei: Path) -> None:
    types = nuclei_types(nuclei)
    assert types == ("epithelial", "inflammatory")  # two of a's nuclei have no type
    boxes = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [-np.inf, -np.inf, np.inf, np.inf]] * 2)
    ids = ["a", "a", "a", "b", "c", "b"]
    expected = [[2, 0], [0, 1], [2, 1], [0, 1], [0, 0], [0, 1]]
    np.testing.assert_array_equal(nuclei_counts(nuclei, ids, boxes, types), expected)
    assert images_without_nuclei(nuclei, ids) == ("c",)


def test_images_are_found_by_stem_where_that_is_clear(tmp_path: Path) -> None:
    """f0.png is f0, in either place; v1.2 has no ending; g.png and g.jpg are two images."""
    path = tmp_path / "nuclei.csv"
    names = ["cut/f0.png", "f1", "v1.2", "g.png", "g.jpg"]
    path.write_text("image,x,y,type\n" + "".join(f"{name},1,1,t\n" for name in names))
    ids = ["f0", "f1.tif", "v1.2", "g.jpg"]
    counts = nuclei_counts(path, ids, np.repeat(ALL, 4, axis=0), ["t"])
    np.testing.assert_array_equal(counts[:, 0], [1, 1, 1, 1])
    assert images_without_nuclei(path, [*ids, "g", "v1"]) == ("g", "v1")


def test_blanks_around_names_make_no_other_ones(tmp_path: Path) -> None:
    path = tmp_path / "nuclei.csv"
    path.write_text("image,x,y,type\na ,1,1,t\na,2,2,t \nb,1,1, t\n")
    counts = nuclei_counts(path, ["a", "b"], np.repeat(ALL, 2, axis=0), ["t"])
    assert counts.ravel().tolist() == [2, 1]


def test_more_than_half_of_the_images_without_a_line_are_refused(nuclei: Path) -> None:
    with pytest.raises(ProbeError, match="names 1 of the 3 images.*'c'"):
        nuclei_counts(nuclei, ["a", "c", "d"], np.repeat(ALL, 3, axis=0), ["epithelial"])


@pytest.mark.parametrize(
    ("text", "ids", "types", "words"),
    [
        ("field,x,type\na,1,t\n", ["a"], ["t"], "needs image"),
        ("field,x,y,type\na,1,one,t\n", ["a"], ["t"], "line 2: 'one'"),
        ("field,x,y,type\na,nan,1,t\n", ["a"], ["t"], "line 2: 'nan'"),
        ("field,x,y,type\n,1,1,t\n", ["a"], ["t"], "no image"),
        ("field,x,y,type\nNA,1,1,t\n", ["a"], ["t"], "no image"),
        ("field,x,y,x,type\na,1,1,9,t\n", ["a"], ["t"], "nuclei.csv: column x stands there twice"),
        ("field,x,y,type\n", ["a"], ["t"], "no nuclei"),
        (NUCLEI, ["a"], ["lymphocyte"], "lymphocyte.*epithelial, inflammatory"),
        (NUCLEI, ["z"], ["epithelial"], "names none of the 1 images"),
    ],
)
def test_bad_nuclei_are_named(
    tmp_path: Path, text: str, ids: list[str], types: list[str], words: str
) -> None:
    path = tmp_path / "nuclei.csv"
    path.write_text(text)
    with pytest.raises(ProbeError, match=words):
        nuclei_counts(path, ids, ALL, types)


def test_bad_nuclei_file_and_boxes(tmp_path: Path, nuclei: Path) -> None:
    with pytest.raises(ProbeError, match="cannot be read"):
        nuclei_types(tmp_path / "none.csv")
    with pytest.raises(ProbeError, match=r"expected \(2, 4\)"):
        nuclei_counts(nuclei, ["a", "b"], ALL, ["epithelial"])


X, COUNTS = counted(30, 4)


@pytest.mark.parametrize(
    ("x", "counts", "groups", "words"),
    [
        (X, COUNTS[:-1], None, "expected"),
        (X * np.nan, COUNTS, None, "NaN"),
        (X, COUNTS - 100, None, "negative"),
        (X, COUNTS * 0, None, "--nuclei-types"),
        (X[:6], COUNTS[:6], None, "too few"),
        (X, COUNTS, np.arange(30) % 4, "4 groups are too few"),
        (X, COUNTS, np.arange(29), "29 for 30"),
    ],
)
def test_bad_counts_are_named(x, counts, groups, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        count_probe(x, counts, groups=groups, alphas=ALPHAS)


@pytest.mark.slow
def test_six_numbers_measured_outside_this_project(shared_data: Path) -> None:
    """CRCHistoPhenotypes, EfficientNet-Lite0: Spearman of three types at two scales."""
    import torch
    from PIL import Image
    from scipy.stats import spearmanr

    from xmag_hf.encoders import load_encoder
    from xmag_hf.probing.patches import scaled_squares

    encoder = load_encoder("efficientnet-lite0")
    folder = shared_data / "crchisto"
    files = sorted(folder.rglob("img*.jpg"), key=lambda path: int(path.stem[3:]))
    ids = [path.stem for path in files]
    types = ("epithelial", "inflammatory", "fibroblast")
    counts = nuclei_counts(folder / "nuclei.csv", ids, np.repeat(ALL, len(ids), axis=0), types)
    for mpp, expected in ((2.0, (0.783, 0.516, 0.528)), (0.5, (0.859, 0.636, 0.606))):
        x = []
        for path in files:
            with Image.open(path) as image:
                squares = scaled_squares(image.convert("RGB"), 0.5, mpp)
            x.append(encoder(torch.from_numpy(squares).permute(0, 3, 1, 2)).numpy().mean(axis=0))
        predicted = count_probe(np.stack(x), counts)
        for kind in range(3):
            ranks = [spearmanr(counts[:, kind], p[:, kind]).statistic for p in predicted]
            assert np.mean(ranks) == pytest.approx(expected[kind], abs=0.02)

"""Splits and cross-validation: against scikit-learn, chance level, and the groups' separation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xmag_hf.probing.classifiers import fit_linear
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.images import ImageSplit, LabelledImages
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.protocols import (
    check_protocol,
    cross_validated,
    grouped_cv,
    official_split,
    validation_rows,
)

OPTIONS = ProbeOptions(
    data="made", neighbours=3, shots=(1, 2), shot_repeats=3, c_grid=(1e-3, 1e-1), repeats=2
)


def patients(n: int = 120, per_patient: int = 6, d: int = 8, seed: int = 0):
    """Features with a signal of the class and one of the patient; a patient has one class."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) // per_patient
    labels = groups % 2
    own = rng.standard_normal((n // per_patient, d))[groups]
    x = own + rng.standard_normal((n, d)) + 1.5 * labels[:, None] * (np.arange(d) == 0)
    return x.astype(np.float32), labels, np.char.add("p", groups.astype(str))


def split_of(name: str, labels: np.ndarray, groups: np.ndarray | None) -> ImageSplit:
    ids = np.char.add(name, np.arange(len(labels)).astype(str))
    return ImageSplit(ids, labels, groups, np.ones(len(labels)), read=lambda index: b"")


def images_of(**splits: ImageSplit) -> LabelledImages:
    return LabelledImages("made", "0" * 64, splits, ("benign", "malignant", "never seen"))


def test_grouped_cv_is_the_published_protocol() -> None:
    x, labels, groups = patients()
    expected = np.empty((2, len(x)))
    for repeat in range(2):
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=repeat)
        # scikit-learn codes groups in sorted order: numbers, so p9 comes before p10.
        for train, test in folds.split(x, labels, np.arange(120) // 6):
            assert not set(groups[train]) & set(groups[test])
            model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, tol=1e-9))
            expected[repeat, test] = model.fit(x[train], labels[train]).predict_proba(x[test])[:, 1]
    actual = grouped_cv(x, labels, groups, repeats=2)
    np.testing.assert_allclose(actual.probabilities[:, :, 1], expected, atol=1e-5)
    assert actual.details["not_converged"] == 0


def test_a_patient_is_never_on_both_sides() -> None:
    """Features that only name the patient say nothing about patients not seen."""
    labels = np.arange(40) % 2
    labels = np.random.default_rng(0).permutation(labels)[np.repeat(np.arange(40), 4)]
    groups = np.repeat(np.arange(40), 4)
    x = np.eye(40, dtype=np.float32)[groups]
    torn = grouped_cv(x, labels, None, c=1.0, repeats=1).probabilities[0, :, 1]
    whole = grouped_cv(x, labels, groups, c=1.0, repeats=1).probabilities[0, :, 1]
    assert roc_auc_score(labels, torn) > 0.95
    assert roc_auc_score(labels, whole) < 0.6


def test_permuted_labels_give_chance() -> None:
    """Over 30 permutations: pooled AUC of 120 images, 0.5 give or take four standard errors.

    (Pooling over folds biases it downwards a little, by the folds' unequal class shares.)
    """
    x, labels, _ = patients()
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(30):
        shuffled = rng.permutation(labels)
        p = grouped_cv(x, shuffled, None, repeats=1).probabilities[0, :, 1]
        scores.append(roc_auc_score(shuffled, p))
    assert np.mean(scores) == pytest.approx(0.5, abs=4 * np.sqrt(121 / 12 / 60**2 / 30))


def test_folds_do_not_depend_on_the_type_of_the_groups() -> None:
    """scikit-learn's folds of the numbers, also when they come as text ("10" before "2")."""
    x, labels, _ = patients()
    numbers = np.arange(120) // 6
    expected = np.empty(120)
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(
        x, labels, numbers
    ):
        expected[test] = fit_linear(x[train], labels[train], 1e-3).probabilities(x[test])[:, 1]
    for groups in (numbers, numbers.astype(str), numbers.astype(str).astype(object)):
        actual = grouped_cv(x, labels, groups, repeats=1).probabilities[0, :, 1]
        np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_train_and_validation_that_share_patients_are_drawn_anew() -> None:
    (x, y, g), (xv, yv, gv), (xt, yt, _) = patients(120), patients(60, seed=1), patients(48, seed=2)
    splits = {
        "train": split_of("a", y, g),
        "validation": split_of("b", yv, gv),  # the first ten of train's patients
        "test": split_of("c", yt, None),
    }
    options = dataclasses.replace(OPTIONS, methods=("linear",))
    [linear] = official_split(
        {"train": x, "validation": xv, "test": xt}, images_of(**splits), options
    )
    held = validation_rows(np.concatenate([y, yv]), np.concatenate([g, gv]), 0.2, 0)
    assert linear.details["c_chosen_on"].startswith(f"{held.sum()} of 180 training and validation")
    assert linear.details["fitted_on"] == 180
    assert "10 groups lie in train and in validation ('p0'" in linear.details["remarks"][0]


def test_groups_shared_with_test_can_be_allowed_and_are_said() -> None:
    x, y, g = patients(48)
    images = images_of(train=split_of("a", y, g), test=split_of("b", y, g))
    with pytest.raises(ProbeError, match="--allow-shared-groups"):
        check_protocol(images, OPTIONS)
    options = dataclasses.replace(OPTIONS, allow_shared_groups=True, methods=("knn", "linear"))
    first, _ = official_split({"train": x, "test": x}, images, options)
    np.testing.assert_array_equal(first.groups, g)  # intervals stay clustered
    assert "8 groups lie in train and in test" in first.details["remarks"][0]
    assert check_protocol(images, options) == first.details["remarks"]


def test_few_images_clamp_k_and_drop_shots_with_a_remark() -> None:
    """Six patients of two images: four of them to learn from in a fold at least."""
    x, y, g = patients(12, per_patient=2)
    images = images_of(left=split_of("a", y, g))
    options = dataclasses.replace(OPTIONS, folds=3, neighbours=20, shots=(1, 2, 16))
    found = {a.method: a for a in cross_validated({"left": x}, images, options)}
    assert list(found) == ["linear", "knn", "few-shot-1", "few-shot-2"]
    assert found["knn"].details["neighbours"] <= 8
    assert "20 neighbours wanted" in found["knn"].details["remarks"][0]
    assert "16 per class are left out" in found["few-shot-1"].details["remarks"][0]
    assert "class 'benign'" in found["few-shot-1"].details["remarks"][0]
    with pytest.raises(ProbeError, match="Nothing is left"):
        check_protocol(images, dataclasses.replace(options, methods=("few-shot",), shots=(9,)))


def test_details_of_one_method_do_not_depend_on_the_order() -> None:
    x, y, g = patients(48)
    images = images_of(left=split_of("a", y, g))
    orders = [("few-shot", "knn"), ("knn", "few-shot")]
    details = [
        next(
            a.details
            for a in cross_validated(
                {"left": x}, images, dataclasses.replace(OPTIONS, methods=methods)
            )
            if a.method == "knn"
        )
        for methods in orders
    ]
    assert details[0] == details[1] == {"folds": 5, "repeats": 2, "neighbours": 3}


def test_official_split_refits_on_all_and_asks_about_test() -> None:
    (x, y, g), (xv, yv, _), (xt, yt, _) = patients(120), patients(60, seed=1), patients(48, seed=2)
    splits = {
        "train": split_of("a", y, g),
        "validation": split_of("b", yv, np.char.add("v", np.arange(60).astype(str))),
        "test": split_of("c", yt, np.char.add("t", np.arange(48).astype(str))),
    }
    features = {"train": x, "validation": xv, "test": xt}
    found = {a.method: a for a in official_split(features, images_of(**splits), OPTIONS)}
    assert list(found) == ["linear", "knn", "few-shot-1", "few-shot-2"]
    linear = found["linear"]
    both = fit_linear(np.concatenate([x, xv]), np.concatenate([y, yv]), linear.details["c"])
    np.testing.assert_allclose(linear.probabilities[:, :2], both.probabilities(xt), atol=1e-4)
    assert linear.details["fitted_on"] == 180
    assert found["few-shot-2"].probabilities.shape == (3, 48, 3)
    assert all((answer.probabilities[..., 2] == 0).all() for answer in found.values())
    np.testing.assert_array_equal(found["knn"].ids, splits["test"].ids)


def test_official_split_without_validation_holds_groups_out() -> None:
    (x, y, g), (xt, yt, _) = patients(120), patients(48, seed=2)
    splits = {"train": split_of("a", y, g), "test": split_of("c", yt, None)}
    [linear] = official_split(
        {"train": x, "test": xt},
        images_of(**splits),
        dataclasses.replace(OPTIONS, methods=("linear",)),
    )
    assert linear.details["c_chosen_on"].startswith("24 of 120")  # 4 of 20 patients
    assert linear.details["fitted_on"] == 120


def test_validation_rows_take_whole_groups_and_leave_every_class() -> None:
    labels = np.array([0] * 30 + [1] * 30 + [2] * 2)
    groups = np.array([f"p{i // 3}" for i in range(60)] + ["q", "r"])
    for seed in range(20):
        held = validation_rows(labels, groups, 0.5, seed)
        assert len(set(groups[held])) == 11
        assert not set(groups[held]) & set(groups[~held])
        assert set(labels[~held]) == {0, 1, 2}


def test_cross_validation_pools_splits_and_covers_every_row_and_method() -> None:
    x, y, g = patients(120)
    images = images_of(left=split_of("a", y[:50], g[:50]), right=split_of("b", y[50:], g[50:]))
    answers = cross_validated({"left": x[:50], "right": x[50:]}, images, OPTIONS)
    assert [a.method for a in answers] == ["linear", "knn", "few-shot-1", "few-shot-2"]
    for answer in answers:
        assert answer.probabilities.shape == ((3 if "shot" in answer.method else 2), 120, 3)
        np.testing.assert_allclose(answer.probabilities.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(answer.groups, g)
        assert answer.ids[50] == "b0"


def test_bad_official_splits_are_named() -> None:
    x, y, g = patients(24)
    train, test = split_of("a", y, g), split_of("b", y, np.char.add("t", g))
    features = {"train": x, "test": x}
    cases = [
        ({"train": train}, "needs train and test"),
        ({"train": train, "test": dataclasses.replace(test, groups=g)}, "4 groups.*'p0'"),
        ({"train": train, "test": dataclasses.replace(test, labels=None)}, "--label-column"),
        ({"train": train, "test": dataclasses.replace(test, labels=y + 1)}, "'never seen'"),
    ]
    for splits, words in cases:
        with pytest.raises(ProbeError, match=words):
            official_split(features, images_of(**splits), OPTIONS)


X, Y, G = patients(30)


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "words"),
    [
        (Y, G, 6, "--folds=6: only 5 groups"),
        (Y * 0, G, 2, "needs two"),
        (np.arange(30) // 29, None, 2, "class 'malignant'.*one group"),
        ((G == "p0").astype(int), G, 2, "class 'malignant'.*one group"),
    ],
)
def test_folds_that_cannot_be_made_are_named(labels, groups, folds: int, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        grouped_cv(X, labels, groups, folds=folds, classes=("benign", "malignant"))


def test_a_fold_that_takes_a_class_from_training_is_named() -> None:
    """Three groups of two classes each: two of them share a fold, and with it a whole class."""
    groups = np.repeat(["p", "q", "r"], 10)
    labels = np.array([0, 1] * 5 + [0, 2] * 5 + [1, 2] * 5)
    with pytest.raises(ProbeError, match="more --folds"):
        grouped_cv(X, labels, groups, folds=2, classes=("a", "b", "c"))


@pytest.mark.slow
def test_two_numbers_measured_outside_this_project(shared_data) -> None:
    """GlaS, EfficientNet-Lite0: mean AUC 0.981 at 0.5 um/px and 0.964 at 2.0, within 0.005."""
    import csv

    import torch
    from PIL import Image

    from xmag_hf.encoders import load_encoder
    from xmag_hf.probing.patches import scaled_squares

    encoder = load_encoder("efficientnet-lite0")
    with (shared_data / "glas" / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    labels = np.array([row["label"] == "malignant" for row in rows]).astype(int)
    groups = np.array([row["patient_id"] for row in rows])
    for mpp, expected in ((2.0, 0.964), (0.5, 0.981)):
        x = []
        for row in rows:
            with Image.open(shared_data / "glas" / row["file"]) as image:
                squares = scaled_squares(
                    image.convert("RGB"), float(row["mpp"]), mpp, max_enlarge=1.25
                )
            x.append(encoder(torch.from_numpy(squares).permute(0, 3, 1, 2)).numpy().mean(axis=0))
        p = grouped_cv(np.stack(x), labels, groups).probabilities
        auc = np.mean([roc_auc_score(labels, repeat[:, 1]) for repeat in p])
        assert auc == pytest.approx(expected, abs=0.005)

"""Scores, comparisons and files, against scikit-learn and SciPy."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, r2_score, roc_auc_score

from xmag_hf.probing import report
from xmag_hf.probing.errors import ProbeError


def _answers(seed: int, repeats: int, n: int = 60, classes: int = 3, skill: float = 1.0):
    """Labels in 15 groups of four, and probabilities that know something of them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    groups = np.repeat([f"g{i}" for i in range(n // 4)], 4)
    logits = np.random.default_rng(seed).normal(size=(repeats, n, classes))
    logits[:, np.arange(n), labels] += skill
    exponentials = np.exp(logits)
    return labels, exponentials / exponentials.sum(axis=2, keepdims=True), groups


@pytest.mark.parametrize("repeats", [0, 3])
def test_estimates_are_means_over_repeats_of_scikit_learns(repeats):
    labels, probabilities, groups = _answers(1, max(repeats, 1))
    given = probabilities if repeats else probabilities[0]
    questions = report.class_questions("row", "linear", labels, given, groups)
    expected = {
        "accuracy": [accuracy_score(labels, p.argmax(1)) for p in probabilities],
        "macro F1": [f1_score(labels, p.argmax(1), average="macro") for p in probabilities],
        "weighted F1": [f1_score(labels, p.argmax(1), average="weighted") for p in probabilities],
        "AUC": [roc_auc_score(labels, p, multi_class="ovr") for p in probabilities],
    }
    assert [question.metric for question in questions] == list(expected)
    for question in questions:
        scores = report.score(question, samples=50, level=0.9, seed=0)
        assert [score.unit for score in scores] == ["image", "group"]
        for score in scores:
            assert score.estimate == pytest.approx(np.mean(expected[score.metric]), abs=1e-9)
            assert score.low <= score.estimate <= score.high and score.level == 0.9
    alone = report.class_questions("row", "linear", labels, given, None)[0]
    assert [score.unit for score in report.score(alone, samples=50, level=0.9, seed=0)] == ["image"]


def test_count_scores_are_means_over_seeds():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 2))
    predictions = truth + rng.normal(size=(3, 40, 2))
    questions = report.count_questions("row", "counts", ["a", "b"], truth, predictions, None)
    found = {q.metric: report.score(q, samples=20, level=0.95, seed=0)[0] for q in questions}
    for k, name in enumerate("ab"):
        rank = np.mean([spearmanr(truth[:, k], p[:, k]).statistic for p in predictions])
        explained = np.mean([r2_score(truth[:, k], p[:, k]) for p in predictions])
        assert found[f"Spearman {name}"].estimate == pytest.approx(rank)
        assert found[f"R2 {name}"].estimate == pytest.approx(explained)


def _rows(groups, repeats):
    labels, better, clusters = _answers(1, 1, skill=4.0)
    _, worse, _ = _answers(2, 1, skill=0.2)
    _, other, _ = _answers(3, 1, skill=4.0)
    rows = []
    for name, p in (("first", better), ("worse", worse), ("like", other)):
        given = np.concatenate([p, p]) if repeats else p[0]
        own = clusters if groups else None
        rows.append(report.class_questions(name, "linear", labels, given, own))
    return rows


@pytest.mark.parametrize(
    "groups, repeats, tests",
    [
        (False, False, {"AUC": "DeLong", "accuracy": "McNemar mid-p", "macro F1": "bootstrap"}),
        (True, False, {"AUC": "bootstrap (clustered)", "accuracy": "bootstrap (clustered)"}),
        (False, True, {"AUC": "bootstrap", "accuracy": "bootstrap"}),
    ],
)
def test_rows_are_compared_with_the_first(groups, repeats, tests):
    found = report.compare(_rows(groups, repeats), samples=200, seed=0)
    assert len(found) == 2 * 4 and {c.reference for c in found} == {"first"}
    for comparison in found:
        assert comparison.test.test == tests.get(comparison.metric, comparison.test.test)
        assert comparison.p_holm >= comparison.test.p_value
        if comparison.row == "worse":  # row minus reference
            assert comparison.test.high < 0 and comparison.p_holm < 0.05
        else:
            assert comparison.test.p_value > 0.05
    halves = report.resolution(found, "AUC")
    own = [(c.test.high - c.test.low) / 2 for c in found if c.metric == "AUC"]
    assert halves == (min(own), max(own)) and report.resolution(found, "kappa") is None


def test_rows_over_other_images_are_not_compared():
    first, second, _ = _rows(False, False)
    labels, p, _ = _answers(1, 1)
    other = report.class_questions("other", "linear", 2 - labels, p[0], None)
    with pytest.raises(ProbeError, match="other and first: linear was done on different images"):
        report.compare([first, second, other], samples=10, seed=0)


def test_predictions_come_back_exactly(tmp_path):
    labels, probabilities, groups = _answers(1, 2)
    probabilities = probabilities.astype(np.float32)
    ids = np.array([f"im,{i}" for i in range(len(labels))])
    path = tmp_path / "p.csv"
    names = ["fat", 'a "b"', "c, d"]
    report.write_class_predictions(path, ids, groups, labels, probabilities, names)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == ids.tolist()
    assert [row["group"] for row in rows] == groups.tolist()
    assert [row["label"] for row in rows] == [names[label] for label in labels]
    back = [[[float(row[f"r{r}:p:{name}"]) for name in names] for row in rows] for r in range(2)]
    np.testing.assert_array_equal(np.array(back, dtype=np.float32), probabilities)


def test_report_replaces_a_report_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    first = report.open_report(out)
    (first / "predictions" / "old.csv").write_text("x")
    report.close_report(first, out, {"value": float("nan"), "array": np.arange(2)})
    assert json.loads((out / "results.json").read_text()) == {"value": None, "array": [0, 1]}
    second = report.open_report(out)
    assert (out / "predictions" / "old.csv").exists()  # until the new one is complete
    report.close_report(second, out, {})
    assert not (out / "predictions" / "old.csv").exists() and not second.exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(ProbeError, match="exists and is no report"):
        report.open_report(mine)
    assert (mine / "thesis.txt").exists()

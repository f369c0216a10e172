"""Scores, comparisons and files, against scikit-learn and SciPy."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, roc_auc_score

from xmag_hf.probing import report, scoring
from xmag_hf.probing.errors import ProbeError
from xmag_hf.reporting.records import plain


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
    questions = scoring.class_questions("row", "linear", labels, given, groups)
    expected = {
        "accuracy": [accuracy_score(labels, p.argmax(1)) for p in probabilities],
        "macro F1": [f1_score(labels, p.argmax(1), average="macro") for p in probabilities],
        "weighted F1": [f1_score(labels, p.argmax(1), average="weighted") for p in probabilities],
        "AUC": [roc_auc_score(labels, p, multi_class="ovr") for p in probabilities],
    }
    assert [question.metric for question in questions] == list(expected)
    for question in questions:
        scores = scoring.score(question, samples=50, level=0.9, seed=0)
        assert [score.unit for score in scores] == ["image", "group"]
        for score in scores:
            assert score.estimate == pytest.approx(np.mean(expected[score.metric]), abs=1e-9)
            assert score.low <= score.estimate <= score.high and score.level == 0.9
    alone = scoring.class_questions("row", "linear", labels, given, None)[0]
    assert [score.unit for score in scoring.score(alone, samples=50, level=0.9, seed=0)] == [
        "image"
    ]


def test_count_scores_are_means_over_seeds():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 2))
    predictions = truth + rng.normal(size=(3, 40, 2))
    questions = scoring.count_questions("row", "counts", ["a", "b"], truth, predictions, None)
    found = {q.metric: scoring.score(q, samples=20, level=0.95, seed=0)[0] for q in questions}
    for k, name in enumerate("ab"):
        rank = np.mean([spearmanr(truth[:, k], p[:, k]).statistic for p in predictions])
        wrong = np.mean([mean_absolute_error(truth[:, k], p[:, k]) for p in predictions])
        assert found[f"Spearman {name}"].estimate == pytest.approx(rank)
        assert found[f"MAE {name}"].estimate == pytest.approx(wrong)


def _holm(p_values):
    """By the definition: the i-th smallest of m, times m - i, and never below a smaller one's."""
    m, ordered = len(p_values), sorted(p_values)
    return [
        min(1, max((m - j) * ordered[j] for j in range(ordered.index(p) + 1))) for p in p_values
    ]


def _rows(groups, repeats):
    labels, better, clusters = _answers(1, 1, skill=4.0)
    _, worse, _ = _answers(2, 1, skill=0.2)
    _, other, _ = _answers(3, 1, skill=4.0)
    rows = []
    for name, p in (("first", better), ("worse", worse), ("like", other)):
        given = np.concatenate([p, p]) if repeats else p[0]
        own = clusters if groups else None
        rows.append(scoring.class_questions(name, "linear", labels, given, own))
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
    found = scoring.compare(_rows(groups, repeats), samples=200, level=0.9, seed=0)
    assert len(found) == 2 * 4 and {c.reference for c in found} == {"first"}
    for comparison in found:
        assert comparison.test.test == tests.get(comparison.metric, comparison.test.test)
        assert comparison.test.level == 0.9 and comparison.reason == ""
        if comparison.row == "worse":  # row minus reference
            assert comparison.test.high < 0 and comparison.test.p_value < 0.05
        else:
            assert comparison.test.p_value > 0.05
    adjusted = [c for c in found if c.family]
    assert {c.metric for c in adjusted} == {"AUC"}  # one metric speaks for the method
    assert adjusted[0].family == "2 of AUC, linear"
    assert [c.p_holm for c in adjusted] == pytest.approx(_holm([c.test.p_value for c in adjusted]))
    assert all(np.isnan(c.p_holm) for c in found if not c.family)


def test_types_of_nuclei_share_a_family():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 3))
    rows = [
        scoring.count_questions(
            name, "counts", "abc", truth, truth + spread * rng.normal(size=(2, 40, 3)), None
        )
        for name, spread in (("first", 0.5), ("second", 2.0))
    ]
    found = scoring.compare(rows, samples=100, level=0.95, seed=0)
    adjusted = [c for c in found if c.family]
    assert [c.metric for c in adjusted] == ["Spearman a", "Spearman b", "Spearman c"]
    assert [c.p_holm for c in adjusted] == pytest.approx(_holm([c.test.p_value for c in adjusted]))


def test_one_group_only_costs_tests_and_not_the_report():
    rows = _rows(False, False)
    rows = [[dataclasses.replace(q, groups=np.full(60, "g")) for q in row] for row in rows]
    found = scoring.compare(rows, samples=20, level=0.95, seed=0)
    assert len(found) == 8
    for comparison in found:
        assert "one cluster only" in comparison.reason and np.isnan(comparison.test.p_value)
        assert comparison.test.difference == pytest.approx(
            comparison.test.estimate_a - comparison.test.estimate_b
        )
        assert not comparison.family and np.isnan(comparison.p_holm)
    assert plain(found[0])["test"]["p_value"] is None
    by_image, by_group = scoring.score(rows[0][0], samples=20, level=0.95, seed=0)
    assert by_image.reason == "" and "one cluster only" in by_group.reason
    assert by_group.estimate == by_image.estimate and np.isnan(by_group.low)


def test_pairs_can_be_named():
    found = scoring.compare(_rows(True, False), samples=20, level=0.95, seed=0, pairs=[(2, 1)])
    assert {(c.row, c.reference) for c in found} == {("like", "worse")}


def test_few_shot_intervals_are_of_the_draws():
    labels, probabilities, groups = _answers(1, 9)
    questions = scoring.class_questions("row", "few-shot-4", labels, probabilities, groups)
    for question in questions:
        (found,) = scoring.score(question, samples=1000, level=0.5, seed=0)
        assert (found.unit, found.samples) == ("draw", 9)
        if question.metric == "accuracy":
            values = sorted(accuracy_score(labels, p.argmax(1)) for p in probabilities)
            assert found.estimate == pytest.approx(np.mean(values))
            assert [found.low, found.high] == pytest.approx([values[2], values[6]])  # quartiles
    alone = scoring.class_questions("row", "few-shot-4", labels, probabilities[:1], None)[0]
    (found,) = scoring.score(alone, samples=10, level=0.95, seed=0)
    assert np.isnan(found.low) and "one draw" in found.reason


def test_rows_over_other_images_are_not_compared():
    first, second, _ = _rows(False, False)
    labels, p, _ = _answers(1, 1)
    other = scoring.class_questions("other", "linear", 2 - labels, p[0], None)
    with pytest.raises(ProbeError, match="other and first: linear was done on different images"):
        scoring.compare([first, second, other], samples=10, level=0.95, seed=0)


def test_report_replaces_a_report_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    first = report.open_report(out)
    (first / "predictions" / "old.csv").write_text("x")
    report.close_report(first, out, {"value": float("nan"), "array": np.arange(2)})
    assert json.loads((out / "results.json").read_text()) == {
        "format": "xmag-probe", "format_version": 1, "value": None, "array": [0, 1],
        "files": ["predictions/old.csv", "results.json"],
    }  # fmt: skip
    (out / "notes.txt").write_text("mine")
    (out / "predictions" / "mine.csv").write_text("mine")
    second = report.open_report(out)
    (second / "new.png").write_bytes(b"x")
    assert (out / "predictions" / "old.csv").exists()  # until the new one is complete
    report.close_report(second, out, {})
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "out/results.json", "out/new.png", "out/notes.txt", "out/predictions/mine.csv",
    }  # fmt: skip


@pytest.mark.parametrize(
    "held",
    [None, "no JSON", '{"accuracy": 0.9}', '["xmag-probe"]', '{"format": "other-tool"}'],
)
def test_other_folders_are_not_touched(tmp_path, held):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    if held is not None:
        (mine / "results.json").write_text(held)
    with pytest.raises(ProbeError, match="exists and is no report"):
        report.open_report(mine)
    assert (mine / "thesis.txt").exists() and not (tmp_path / "mine.partial").exists()


def test_half_filled_folder_of_someone_else_is_not_removed(tmp_path):
    beside = tmp_path / "out.partial"
    beside.mkdir()
    (beside / "download").write_text("precious")
    with pytest.raises(ProbeError, match="out.partial: is needed .* holds something else"):
        report.check_out(tmp_path / "out")
    assert (beside / "download").exists()
    ours = report.open_report(tmp_path / "other")
    (ours / "predictions" / "half.csv").write_text("x")  # an interrupted run
    assert list((report.open_report(tmp_path / "other") / "predictions").iterdir()) == []


def test_listed_files_outside_the_report_are_left(tmp_path):
    (tmp_path / "victim.csv").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    listed = ["../victim.csv", str(tmp_path / "victim.csv"), "predictions/../../victim.csv"]
    (out / "results.json").write_text(json.dumps({"format": "xmag-probe", "files": listed}))
    report.close_report(report.open_report(out), out, {})
    assert (tmp_path / "victim.csv").exists()

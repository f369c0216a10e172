"""Comparisons of stored predictions: pooling, pairing, tests by name, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from statsmodels.stats.multitest import multipletests

from xmag_hf.cli.main import run_verb
from xmag_hf.evaluation import delong_test
from xmag_hf.mil.compare import CompareOptions, compare_studies
from xmag_hf.mil.compare_report import RESULTS, TABLE, comparison_markdown, write_comparison
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.predictions import read_predictions
from xmag_hf.reporting.predictions import write_class_predictions

CLASSES = ("benign", "malignant", "other")


def table(signal: float, seed: int, *, slides: int = 90, external: int = 40) -> list[list]:
    """Rows of predictions.csv: five folds inside, five models on an external cohort."""
    rows = []
    for cohort, count in (("internal", slides), ("far", external)):
        truth = np.random.default_rng(count)  # the same for every study
        y, shared = truth.integers(0, 3, count), truth.normal(size=(count, 3))
        rng = np.random.default_rng(seed)
        for slide in range(count):
            for fold in [slide % 5] if cohort == "internal" else range(5):
                z = shared[slide] + rng.normal(size=3)
                z[y[slide]] += signal
                p = np.exp(z) / np.exp(z).sum()
                name, patient = f"{cohort}-{slide:03d}", f"patient {cohort} {slide // 2}"
                rows.append([name, patient, cohort, str(fold), CLASSES[y[slide]], *p.tolist()])
    return rows


def write(folder: Path, rows: list[list], classes: tuple[str, ...] = CLASSES) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "predictions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        names = ["slide_id", "patient_id", "cohort", "fold", "label"]
        writer.writerow([*names, *(f"p_{name}" for name in classes)])
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("studies")
    signals = {"strong": (2.2, 1), "middle": (1.4, 2), "weak": (0.7, 3)}
    return [write(root / name, table(*case)) for name, case in signals.items()]


@pytest.fixture(scope="module")
def result(studies):
    return compare_studies(studies, CompareOptions(by_patient=False, samples=200))


def pooled(path: Path, cohort: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels and mean probabilities by slide, read again with a dictionary."""
    sums: dict[str, list] = {}
    with (path / "predictions.csv").open() as stream:
        for row in csv.DictReader(stream):
            if row["cohort"] == cohort:
                p = np.array([float(row[f"p_{name}"]) for name in CLASSES])
                held = sums.setdefault(row["slide_id"], [CLASSES.index(row["label"]), 0.0, 0])
                held[1], held[2] = held[1] + p, held[2] + 1
    ids = sorted(sums)
    return (
        np.array([sums[i][0] for i in ids]),
        np.array([sums[i][1] / sums[i][2] for i in ids]),
        ids,
    )


@pytest.mark.parametrize("cohort", ["internal", "far"])
def test_scores_are_of_the_pooled_predictions(studies, result, cohort: str) -> None:
    y, p, _ = pooled(studies[0], cohort)
    found = {s.metric: s for s in result.scores if (s.cohort, s.study) == (cohort, "strong")}
    areas = [roc_auc_score(y == c, p[:, c]) for c in range(3)]
    assert found["AUC"].interval.estimate == pytest.approx(np.mean(areas), abs=1e-12)
    assert found["accuracy"].interval.estimate == accuracy_score(y, p.argmax(1))
    for name in ("macro", "weighted"):
        expected = f1_score(y, p.argmax(1), average=name)
        assert found[f"{name} F1"].interval.estimate == pytest.approx(expected, abs=1e-12)


def test_folds_stand_beside_the_pool(studies, result) -> None:
    """External: each fold's model on all slides; internal: each fold's own slides."""
    with (studies[1] / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for cohort in ("internal", "far"):
        values = []
        for fold in "01234":
            own = [row for row in rows if (row["cohort"], row["fold"]) == (cohort, fold)]
            p = np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in own])
            y = [CLASSES.index(row["label"]) for row in own]
            values.append(accuracy_score(y, p.argmax(1)))
        (score,) = (
            s
            for s in result.scores
            if (s.cohort, s.study, s.metric) == (cohort, "middle", "accuracy")
        )
        assert score.folds == 5
        assert score.fold_mean == pytest.approx(np.mean(values), abs=1e-12)
        assert score.fold_sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    facts = {fact.name: fact for fact in result.cohorts}
    assert facts["internal"].pooling == "out-of-fold predictions of 5 models, scored together"
    assert facts["far"].pooling == "mean probability of 5 models per slide"
    assert facts["far"].slides == 40  # not 200
    y, _, _ = pooled(studies[0], "far")
    assert facts["far"].majority["accuracy"] == np.bincount(y).max() / 40


def test_every_pair_is_tested_by_name(studies, result) -> None:
    y, a, _ = pooled(studies[0], "far")
    _, b, _ = pooled(studies[2], "far")
    tests = {
        t.test.test: t
        for t in result.tests
        if (t.cohort, t.first, t.second) == ("far", "strong", "weak")
    }
    assert set(tests) == {"DeLong", "McNemar exact", "McNemar mid-p", "F1 bootstrap"}
    assert tests["DeLong"].test.p_value == pytest.approx(delong_test(y, a, b).p_value, rel=1e-9)
    right_a, right_b = a.argmax(1) == y, b.argmax(1) == y
    only = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert tests["McNemar exact"].test.p_value == pytest.approx(
        binomtest(*only[:1], sum(only)).pvalue
    )
    assert len(result.tests) == 2 * 3 * 4  # cohorts, pairs, tests


def test_holm_over_the_pairs_of_each_cohort_and_test(result) -> None:
    for cohort in ("internal", "far"):
        for name in ("DeLong", "McNemar mid-p"):
            own = [t for t in result.tests if (t.cohort, t.test.test) == (cohort, name)]
            expected = multipletests([t.test.p_value for t in own], method="holm")[1]
            assert [t.p_holm for t in own] == pytest.approx(expected, rel=1e-12)


def test_one_pair_is_not_adjusted(studies) -> None:
    result = compare_studies(
        studies[:2], CompareOptions(by_patient=False, samples=50, cohort="far")
    )
    assert len(result.tests) == 4 and all(np.isnan(t.p_holm) for t in result.tests)
    assert "Holm" not in " ".join(result.remarks)


def test_order_of_rows_and_of_columns_does_not_matter(studies, tmp_path: Path) -> None:
    rows = table(1.4, 2)
    np.random.default_rng(0).shuffle(rows)
    turned = [[*row[:5], row[6], row[7], row[5]] for row in rows]
    other = write(tmp_path / "middle", turned, ("malignant", "other", "benign"))
    options = CompareOptions(samples=50)
    straight = compare_studies(studies[:2], options)
    assert compare_studies([studies[0], other], options).tests == straight.tests


def test_patients_are_drawn_whole(studies) -> None:
    """Two slides a patient: tests change their kind, intervals their units, estimates nothing."""
    options = {"samples": 500, "cohort": "internal", "names": ("a", "b")}
    by_slide, by_patient = (
        compare_studies(studies[:2], CompareOptions(by_patient=by, **options))
        for by in (False, True)
    )
    names = {t.test.test for t in by_patient.tests}
    assert names == {"bootstrap (clustered)", "F1 bootstrap (clustered)"}
    assert any("--no-by-patient" in line for line in by_slide.remarks)
    assert not any("--no-by-patient" in line for line in by_patient.remarks)
    assert by_patient.scores[0].interval.estimate == by_slide.scores[0].interval.estimate
    assert by_patient.scores[0].interval != by_slide.scores[0].interval
    # Where patients have several slides they are drawn without being asked for.
    unasked = compare_studies(studies[:2], CompareOptions(**options))
    assert unasked.tests == by_patient.tests and unasked.scores == by_patient.scores
    assert [cohort.drawn for cohort in unasked.cohorts] == ["patients"]
    both = compare_studies(studies[:2], CompareOptions(samples=20))  # of 45 and of 20 patients
    assert [line.split(":")[0] for line in both.remarks if "fewer than 30" in line] == ["far"]
    with pytest.raises(MILError, match="--stratify: patient .* has slides of several classes"):
        compare_studies(studies[:2], CompareOptions(stratify=True, **options))


def test_what_is_drawn_is_settled_by_each_cohort(tmp_path: Path) -> None:
    """Several slides a patient at home, one elsewhere; no patients, or one, cannot be drawn."""

    def compared(patient_of, name: str):
        folders = []
        for number in (1, 2):
            rows = [[r[0], patient_of(r), *r[2:]] for r in table(1.0 + number, number)]
            folders.append(write(tmp_path / f"{name}{number}", rows))
        result = compare_studies(folders, CompareOptions(samples=20))
        kinds = {
            cohort.name: {t.test.test for t in result.tests if t.cohort == cohort.name}
            for cohort in result.cohorts
        }
        return result, kinds

    result, kinds = compared(lambda r: r[0] if r[2] == "far" else r[1], "each")
    assert {cohort.name: cohort.drawn for cohort in result.cohorts} == {
        "internal": "patients",
        "far": "slides",
    }
    assert "DeLong" in kinds["far"] and "DeLong" not in kinds["internal"]
    assert any("patients (internal) and slides (far)" in line for line in result.remarks)
    for patient_of in (lambda r: r[0], lambda r: "", lambda r: "p"):
        result, kinds = compared(patient_of, patient_of("ab"))
        assert {cohort.drawn for cohort in result.cohorts} == {"slides"}
        assert all("DeLong" in names for names in kinds.values())


def test_stratified_draws_keep_class_sizes(tmp_path: Path) -> None:
    """One slide of a class: most resamples lose it, stratified ones cannot."""
    rows = [row for row in table(1.5, 4, external=0) if row[4] != "other"]
    lone = next(row for row in table(1.5, 4, external=0) if row[4] == "other")
    folders = [write(tmp_path / name, [*rows, lone]) for name in ("a", "b")]
    free, kept = (
        compare_studies(folders, CompareOptions(by_patient=False, samples=100, stratify=stratify))
        for stratify in (False, True)
    )
    assert free.scores[0].interval.redrawn > 0
    assert all(score.interval.redrawn == 0 for score in kept.scores)
    # DeLong needs two cases of a class: the bootstrap stands in, and says why.
    (auc,) = (t for t in kept.tests if t.metric == "AUC")
    assert auc.test.test == "bootstrap" and "needs 2 of each" in auc.reason


def test_predictions_of_a_probe(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids, labels = np.array([f"i{n}" for n in range(30)]), rng.integers(0, 2, 30)
    for name in ("one", "two"):
        p = rng.dirichlet([1, 1], size=(3, 30))
        write_class_predictions(tmp_path / f"{name}.csv", ids, None, labels, p, ("no", "yes"))
        if name == "one":
            first = p
    paths = [tmp_path / "one.csv", tmp_path / "two.csv"]
    result = compare_studies(paths, CompareOptions(samples=50))
    expected = roc_auc_score(labels, first.mean(axis=0)[:, 1])
    assert result.scores[0].interval.estimate == pytest.approx(expected, abs=1e-8)
    assert result.cohorts[0].pooling == "mean probability of 3 models per slide"
    with pytest.raises(MILError, match="internal has no patients"):
        compare_studies(paths, CompareOptions(by_patient=True))


def test_report_is_written(studies, result, tmp_path: Path) -> None:
    files = write_comparison(result, studies, tmp_path / "out")
    assert sorted(path.name for path in files) == sorted(
        p.name for p in (tmp_path / "out").iterdir()
    )
    record = json.loads((tmp_path / "out" / RESULTS).read_text(), parse_constant=pytest.fail)
    assert record["inputs"] == ["strong", "middle", "weak"]
    assert record["options"]["samples"] == 200
    assert len(record["tests"]) == 24
    text = (tmp_path / "out" / TABLE).read_text()
    assert str(tmp_path) not in text and str(studies[0].parent) not in text
    row = next(line for line in text.splitlines() if line.startswith("| strong - weak | AUC"))
    (test,) = (
        t for t in result.tests
        if (t.cohort, t.second, t.first, t.metric) == ("internal", "weak", "strong", "AUC")
    )  # fmt: skip
    assert f"| DeLong | {test.test.difference:+.3f} [" in row
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.size[0] > 1000 and np.asarray(picture.convert("L")).std() > 10


def test_paper_stands_beside(tmp_path: Path) -> None:
    classes = ("low", "high", "none")
    rows = table(1.5, 1, external=0)
    named = [[*r[:4], classes[CLASSES.index(r[4])], *r[5:]] for r in rows]
    folders = [write(tmp_path / name, named, classes) for name in ("a", "b")]
    result = compare_studies(folders, CompareOptions(samples=50, preset="brca-odx"))
    assert "| paper: XMAG | 0.845 +- 0.016 | 0.844 +- 0.007 | 0.776 +- 0.006 |" in (
        comparison_markdown(result)
    )
    with pytest.raises(MILError, match="none of nsclc"):
        CompareOptions(preset="lung")


def test_command(studies, tmp_path: Path, capsys) -> None:
    names = [str(path) for path in studies[:2]]
    arguments = [
        *names,
        "--out",
        str(tmp_path / "out"),
        "--samples",
        "50",
        "--names",
        "ours",
        "theirs",
    ]
    assert run_verb("compare", arguments) == 0
    assert "bootstrap (clustered)" in (told := capsys.readouterr().out) and "DeLong" not in told
    assert run_verb("compare", [*arguments, "--no-by-patient"]) == 0
    assert "DeLong" in capsys.readouterr().out
    assert run_verb("compare", [names[0], "--out", str(tmp_path / "one")]) == 1
    assert "one study only" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_verb("compare", [*names, "--out", "x", "--level", "95"])


def changed(rows: list[list], place: int, column: int, value: object) -> list[list]:
    return [
        [*row[:column], value, *row[column + 1 :]] if number == place else row
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "1 slides of internal are in one only"),
        (lambda rows: [r for r in rows if r[2] != "far"], "same cohorts"),
        (
            lambda rows: changed(rows, 0, 4, next(c for c in CLASSES if c != rows[0][4])),
            "labels differ in internal, first at slide internal-000",
        ),
        (lambda rows: changed(rows, 0, 1, "somebody"), "patients differ in internal"),
        (lambda rows: changed(rows, 0, 3, "1"), "cut into other folds"),
        (lambda rows: changed(rows, 3, 5, "nan"), "line 5: probabilities"),
        (lambda rows: changed(rows, 3, 5, "1.7"), "do not sum to 1"),
        (lambda rows: changed(rows, 3, 5, "high"), "line 5: could not convert"),
        (lambda rows: changed(rows, 3, 4, "unheard"), "label 'unheard' has no column"),
        (lambda rows: [*rows, rows[0]], "fold 0 of internal has a slide twice"),
        (lambda rows: changed(rows, 91, 1, "other"), "two labels or patients"),
        (lambda rows: [*rows, rows[0][:3]], "line 292"),
        (lambda rows: [], "a header without rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused(studies, tmp_path: Path, change, message: str) -> None:
    other = write(tmp_path / "other", change(table(1.4, 2)))
    with pytest.raises(MILError, match=message):
        compare_studies([studies[0], other], CompareOptions(samples=50))


def test_other_files_are_refused(studies, tmp_path: Path) -> None:
    with pytest.raises(MILError, match="no predictions"):
        read_predictions(tmp_path)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(MILError, match="columns a, b; expected slide_id"):
        read_predictions(tmp_path / "notes.csv")
    classes = (*CLASSES[:2], "benign neoplasm")
    rows = [row for row in table(1.0, 5) if row[4] != "other"]
    other = write(tmp_path / "x", rows, classes)
    with pytest.raises(MILError, match="different questions"):
        compare_studies([studies[0], other], CompareOptions())
    with pytest.raises(MILError, match="named alike"):
        compare_studies([studies[0], studies[0]], CompareOptions())
    with pytest.raises(MILError, match="3 names for 2"):
        compare_studies(studies[:2], CompareOptions(names=("a", "b", "c")))
    with pytest.raises(MILError, match="--cohort near: strong has internal, far"):
        compare_studies(studies[:2], CompareOptions(cohort="near"))

"""Studies on small made-up bags whose truth is known: labels, folds, training, report, resume."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from xmag_hf.cli.main import main
from xmag_hf.embedding import Bag, BagInfo, read_bag, write_bag
from xmag_hf.mil import HeadOptions, MILError, StudyOptions, load_head, run_study
from xmag_hf.mil.bags import LabelledBags, open_bag, pad_bags, shuffled_batches, spokesman
from xmag_hf.mil.compare import CompareOptions, compare_studies
from xmag_hf.mil.folds import make_folds, read_folds, validation_rows, write_folds
from xmag_hf.mil.labels import Cohort, class_names, join, read_labels
from xmag_hf.mil.train import balanced_weights, build_head, train_head

INFO = BagInfo(
    encoder="made-up", encoder_revision="1", pooling="cls", mpp=2.0, patch_px=224, mpp0=0.5
)
D = 6
FAST = HeadOptions(hidden_dim=8, attention_dim=4, epochs=3, batch_size=2, learning_rate=1e-2)


def make_bags(folder: Path, slides: dict[str, int], dim: int = D, info: BagInfo = INFO) -> Path:
    """Bags of 3 to 12 patches; in a slide of class c, a third of them is shifted along axis c."""
    folder.mkdir()
    for name, label in slides.items():
        rng = np.random.default_rng(abs(hash_of(name)))
        features = rng.normal(size=(int(rng.integers(3, 13)), dim)).astype(np.float32)
        features[: max(1, len(features) // 3), label] += 6
        coords = np.zeros((len(features), 2), np.int64)
        write_bag(folder / f"{name}.h5", Bag(name, features.astype(np.float16), coords, info))
    return folder


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % 2**32


def write_labels(path: Path, lines: list[tuple[str, str, str]]) -> Path:
    rows = ["slide_id,patient_id,label", *(",".join(line) for line in lines)]
    path.write_text("\n".join(rows))
    return path


def cohort_lines(n: int = 30, prefix: str = "s", classes: int = 2) -> list[tuple[str, str, str]]:
    """Slides of n / 2 patients, two each, of one class."""
    return [
        (f"{prefix}{k:02d}", f"{prefix}-p{k // 2}", f"class {(k // 2) % classes}") for k in range(n)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """(folder of bags, label CSV) of 30 slides."""
    folder = tmp_path_factory.mktemp("made")
    lines = cohort_lines()
    slides = {slide: int(label[-1]) for slide, _, label in lines}
    return make_bags(folder / "bags", slides), write_labels(folder / "labels.csv", lines)


def joined(made: tuple[Path, Path]) -> Cohort:
    rows = read_labels(made[1])
    return join("internal", rows, [made[0]], class_names(rows))


def options(made: tuple[Path, Path], out: Path, **more) -> StudyOptions:
    return StudyOptions(labels=str(made[1]), out=str(out), samples=50, jobs=1, **more)


# --- bags ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ours", "float32", "compressed", "leading axis"])
def test_mapped_features_are_the_stored_ones(layout: str, tmp_path):
    features = np.random.default_rng(0).normal(size=(9, D)).astype(np.float16)
    path = tmp_path / "s.h5"
    if layout == "float32":
        features = features.astype(np.float32)
    stored = features[None] if layout == "leading axis" else features
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "features", data=stored, compression="gzip" if layout == "compressed" else None
        )
        file.create_dataset("coords", data=np.zeros((9, 2), np.int64))
    bag = open_bag(path)
    assert (bag.offset is None) == (layout == "compressed")
    np.testing.assert_array_equal(bag.features(), features)
    assert bag.features().dtype == features.dtype
    assert (bag.patches, bag.embed_dim, bag.slide_id) == (9, D, "s")


def test_our_own_bags_are_mapped(made):
    path = made[0] / "s00.h5"
    bag = open_bag(path)
    assert bag.offset is not None and bag.identity == read_bag(path).identity
    np.testing.assert_array_equal(bag.features(), read_bag(path).features)


def test_padding_and_batches():
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, D)).astype(np.float16) for n in (2, 5, 3)]
    features, mask = pad_bags(bags, torch.float32)
    assert features.shape == (3, 5, D) and mask is not None
    for row, own, bag in zip(features, mask, bags, strict=True):
        np.testing.assert_array_equal(row[own].numpy(), bag.astype(np.float32))
        assert not row[~own].any() and own.sum() == len(bag)
    assert pad_bags([bags[0], bags[0]], torch.float32)[1] is None
    lengths = rng.integers(1, 2000, 333)
    batches = shuffled_batches(lengths, 4, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(333))
    assert max(map(len, batches)) == 4
    again = shuffled_batches(lengths, 4, np.random.default_rng(1))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    waste = sum(lengths[b].max() * len(b) for b in batches) / lengths.sum()
    plain = rng.permutation(333)
    plain_waste = sum(
        lengths[plain[i : i + 4]].max() * len(plain[i : i + 4]) for i in range(0, 333, 4)
    )
    assert waste < 1.2 < plain_waste / lengths.sum()


# --- labels ----------------------------------------------------------------------------------


def test_exclusions_are_told(made, tmp_path):
    """A label without a bag, a bag without a label, an empty bag, NaN, damage: all left out."""
    lines = cohort_lines(12)
    bags = make_bags(tmp_path / "bags", {slide: int(label[-1]) for slide, _, label in lines})
    (bags / "s00.h5").unlink()
    write_bag(bags / "extra.h5", read_bag(bags / "s01.h5"))
    with h5py.File(bags / "s02.h5", "r+") as file:
        file["features"][1, 2] = np.nan
    with h5py.File(bags / "s03.h5", "r+") as file:
        for name in ("features", "coords"):
            empty = file[name][:0]
            del file[name]
            file.create_dataset(name, data=empty)
    (bags / "s04.h5").write_bytes((bags / "s04.h5").read_bytes()[:100])
    rows = read_labels(write_labels(tmp_path / "labels.csv", lines))
    cohort = join("internal", rows, [bags], class_names(rows))
    told = {exclusion.slide_id: exclusion.reason for exclusion in cohort.exclusions}
    assert "a label, and no bag in bags" in told["s00"]
    assert "a bag in bags, and no label" in told["extra"]
    assert "NaN or infinite" in told["s02"] and "row 1" in told["s02"]
    assert "empty bag" in told["s03"] and "no complete HDF5" in told["s04"]
    assert cohort.slide_ids.tolist() == ["s01", *(f"s{k:02d}" for k in range(5, 12))]


def test_several_encoders_share_their_slides(made, tmp_path):
    other = make_bags(tmp_path / "other", {f"s{k:02d}": 0 for k in range(1, 30)}, dim=4)
    rows = read_labels(made[1])
    cohort = join("internal", rows, [made[0], other], class_names(rows))
    assert len(cohort) == 29 and cohort.exclusions[0].slide_id == "s00"
    assert [files[3].path.parent.name for files in cohort.bags] == ["bags", "other"]
    assert [files[3].slide_id for files in cohort.bags] == ["s04", "s04"]


def test_one_bag_that_does_not_say_what_was_done_to_pixels_hides_no_other(made, tmp_path):
    bags = make_bags(tmp_path / "bags", {"a": 0, "b": 1, "c": 0})
    for name, mean in (("b", 0.5), ("c", 0.7)):
        bag = read_bag(bags / f"{name}.h5")
        info = dataclasses.replace(bag.info, normalisation=f"mean {mean}")
        write_bag(bags / f"{name}.h5", dataclasses.replace(bag, info=info))
    lines = [(name, name, label) for name, label in (("a", "0"), ("b", "1"))]
    rows = read_labels(write_labels(tmp_path / "two.csv", lines))
    cohort = join("internal", rows, [bags], ("0", "1"))
    head = build_head("mean-pool", spokesman(cohort.bags[0]), ("0", "1"), None, HeadOptions())
    assert head.config.normalisation == "mean 0.5"
    rows = read_labels(write_labels(tmp_path / "three.csv", [*lines, ("c", "c", "0")]))
    with pytest.raises(MILError, match="b and c are not of one encoder: normalisation 'mean 0.5'"):
        join("internal", rows, [bags], ("0", "1"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"encoder_revision": "2"}, "encoder_revision '1' and '2'"),
        ({"mpp": 0.5}, "mpp 2.0 and 0.5"),
        ({"pooling": "mean"}, "pooling 'cls' and 'mean'"),
        ({"patch_px": 256}, "patch_px 224 and 256"),
    ],
)
def test_mixed_encoders(made, tmp_path, change, words):
    bags = make_bags(tmp_path / "bags", {"a": 0, "b": 1})
    bag = read_bag(bags / "b.h5")
    info = BagInfo(**{**vars(INFO), **change})
    write_bag(bags / "b.h5", Bag("b", bag.features, bag.coords, info))
    rows = read_labels(write_labels(tmp_path / "l.csv", [("a", "a", "0"), ("b", "b", "1")]))
    with pytest.raises(MILError, match=f"a and b are not of one encoder: {words}"):
        join("internal", rows, [bags], ("0", "1"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("slide_id,label\ns1,a", "no column patient_id; it has slide_id, label"),
        ("slide_id,patient_id,label\ns1,p1,a\ns1,p1,b", "'s1' stands in rows 1 and 2"),
        ("slide_id,patient_id,label\ns1,,a", "line 2: no patient_id"),
        ("slide_id,patient_id,label\ns1,p1,NA", "line 2: no label"),  # as R writes it
        ("slide_id,patient_id,label\ns1,nan,a", "line 2: no patient_id"),
        ("slide_id,patient_id,label\ns1,p1", "line 2: not as many fields"),
        ("slide_id,patient_id,label", "a header without lines"),
        ("", "it has nothing"),
        ("slide_id,patient_id,label,label \ns1,p1,a,b", "column label stands there twice"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(MILError, match=words):
        read_labels(path)


def test_headings_that_nobody_reads_may_stand_twice(tmp_path):
    """A spreadsheet leaves empty columns behind."""
    path = tmp_path / "labels.csv"
    path.write_text("slide_id,patient_id,label,note,note,,\ns1,p1,a,x,y,,\n")
    assert [row.label for row in read_labels(path)] == ["a"]


def test_classes_in_order(tmp_path):
    def names(*labels: str, **more) -> tuple[str, ...]:
        lines = [(f"s{k}", f"p{k}", label) for k, label in enumerate(labels)]
        return class_names(read_labels(write_labels(tmp_path / "l.csv", lines), **more))

    assert names("10", "2", "0") == ("0", "2", "10")
    assert names("b", "a", "c") == ("a", "b", "c")
    assert names("b", "a", "c", against_rest="a") == ("rest", "a")
    with pytest.raises(MILError, match="all 2 slides are 'a'"):
        names("a", "a")
    with pytest.raises(MILError, match="has the classes a, b"):
        names("a", "b", against_rest="c")


# --- folds -----------------------------------------------------------------------------------


def test_folds_keep_patients_together_and_classes_apart(made, tmp_path):
    cohort = joined(made)
    folds = make_folds(cohort, 5, seed=0)
    assert sorted(set(folds)) == [0, 1, 2, 3, 4]
    for patient in set(cohort.patient_ids):
        assert len(set(folds[cohort.patient_ids == patient])) == 1
    for fold in range(5):
        counts = np.bincount(cohort.labels[folds == fold], minlength=2)
        assert counts.min() >= 2 and counts.sum() == 6
    # Another order of lines in the CSV gives the same folds.
    turned = write_labels(tmp_path / "turned.csv", cohort_lines()[::-1])
    np.testing.assert_array_equal(make_folds(joined((made[0], turned)), 5, seed=0), folds)
    assert (make_folds(cohort, 5, seed=1) != folds).any()
    training = folds != 2
    validation = validation_rows(cohort, training, 0.2, seed=0)
    assert not (validation & ~training).any() and 4 <= validation.sum() <= 6
    assert not set(cohort.patient_ids[validation]) & set(cohort.patient_ids[training & ~validation])
    assert set(cohort.labels[validation]) == set(cohort.labels[training & ~validation]) == {0, 1}


def test_folds_written_and_read(made, tmp_path):
    cohort = joined(made)
    folds = make_folds(cohort, 3, seed=0)
    path = tmp_path / "folds.csv"
    write_folds(path, cohort, folds)
    same, again = read_folds(path, cohort)
    np.testing.assert_array_equal(again, folds)
    assert len(same) == 30
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    fewer, _ = read_folds(path, cohort)
    assert fewer.exclusions[0].slide_id == "s29" and "folds.csv" in fewer.exclusions[0].reason
    assert len(fewer) == len(fewer.bags[0]) == 29


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[0].__setitem__("fold", "1" if rows[0]["fold"] == "0" else "0"),
         "patient 's-p0' is in folds"),
        (lambda rows: [r.__setitem__("fold", str(int(r["label"] == "class 0"))) for r in rows],
         "are all 'class"),
        (lambda rows: rows[3].__setitem__("patient_id", "other"), "the labels say 's-p1'"),
        (lambda rows: rows[3].__setitem__("label", "class 0"), "s03 has label 'class 0'"),
        (lambda rows: rows[3].__setitem__("fold", "x"), "fold 'x' is no number"),
        (lambda rows: rows[3].__setitem__("slide_id", "s00"), "'s00' again"),
        (lambda rows: [row.__setitem__("fold", "0") for row in rows], "one fold only"),
        (lambda rows: [row.__setitem__("slide_id", "x" + row["slide_id"]) for row in rows],
         "names none of the 30 slides"),
        (lambda rows: [row.__setitem__("fold ", "0") for row in rows],
         "folds.csv: column fold stands there twice"),
    ],
)  # fmt: skip
def test_given_folds_that_cannot_be_used(made, tmp_path, change, words):
    cohort = joined(made)
    path = tmp_path / "folds.csv"
    write_folds(path, cohort, make_folds(cohort, 3, seed=0))
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    change(rows)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(MILError, match=words):
        read_folds(path, cohort)


def test_too_few_patients(made, tmp_path):
    lines = [("s00", "p", "class 0"), ("s02", "q", "class 1"), ("s03", "r", "class 0")]
    few = joined((made[0], write_labels(tmp_path / "few.csv", lines)))
    with pytest.raises(MILError, match="3 patients for 5 folds"):
        make_folds(few, 5, seed=0)
    lines = [(s, p, "class 1" if p == "s-p0" else "class 0") for s, p, _ in cohort_lines()]
    rare = joined((made[0], write_labels(tmp_path / "rare.csv", lines)))
    with pytest.raises(MILError, match="are all 'class 0'|'class 1' is only in fold"):
        make_folds(rare, 5, seed=0)
    lines = [(s, p, "class 1" if p in ("s-p0", "s-p1") else "class 0") for s, p, _ in lines]
    two = joined((made[0], write_labels(tmp_path / "two.csv", lines)))
    with pytest.raises(MILError, match="class [01]: so few patients"):
        validation_rows(two, np.isin(two.patient_ids, ["s-p1", "s-p2"]), 0.5, seed=0)
    with pytest.raises(MILError, match="2 training patients, of which 0.2"):
        validation_rows(two, np.isin(two.patient_ids, ["s-p1", "s-p2"]), 0.2, seed=0)
    lines = [(f"s{k:02d}", f"p{k}", f"class {k % 2}") for k in range(0, 6)]
    even = joined((made[0], write_labels(tmp_path / "even.csv", lines)))
    with pytest.raises(MILError, match="6 slides, .* more than 3, .* 5 parts. Lower --folds"):
        make_folds(even, 5, seed=0)
    with pytest.raises(MILError, match="5 parts. Raise --validation-share"):
        validation_rows(even, np.full(6, True), 0.2, seed=0)


# --- training --------------------------------------------------------------------------------


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 0, 0, 1, 2, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_weights(labels, 3) == pytest.approx(expected.tolist())


def test_training_learns_keeps_the_best_epoch_and_stops(made):
    cohort = joined(made)
    bags = cohort.labelled(0)
    rows = np.arange(30)
    training, validation = bags.rows(rows < 20), bags.rows(rows >= 20)
    before = torch.random.get_rng_state()
    longer = HeadOptions(**{**vars(FAST), "epochs": 40, "patience": 3, "learning_rate": 0.05})
    told: list[int] = []
    model, trained = train_head(
        "abmil", cohort.classes, training, validation, longer,
        device=torch.device("cpu"), seed=3, advance=told.append,
    )  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)
    losses = [epoch.validation_loss for epoch in trained.history]
    assert trained.best_epoch == int(np.argmin(losses)) + 1
    assert len(losses) == trained.best_epoch + 3 < 40 and sum(told) == 40
    # The weights are those of the best epoch: the loss, computed here, is that epoch's.
    weights = torch.tensor(balanced_weights(training.labels, 2))
    total = 0.0
    right = 0
    with torch.inference_mode():
        for file, label in zip(validation.files, validation.labels, strict=True):
            logits = model(torch.from_numpy(read_bag(file.path).features).float()[None]).logits[0]
            total -= float(weights[label] * logits.log_softmax(0)[label])
            right += int(logits.argmax()) == label
    assert total / 10 == pytest.approx(min(losses), rel=1e-4)
    assert right == 10
    again, _ = train_head(
        "abmil", cohort.classes, training, validation, longer, device=torch.device("cpu"), seed=3
    )
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# --- studies ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(made, tmp_path_factory) -> Path:
    """A finished study with an external cohort of 10 slides."""
    folder = tmp_path_factory.mktemp("study")
    lines = cohort_lines(10, "e")
    bags = make_bags(folder / "ext", {slide: int(label[-1]) for slide, _, label in lines})
    labels = write_labels(folder / "ext.csv", lines)
    run_study(
        [made[0]],
        options(made, folder / "out", external_labels=str(labels), external_bags=(str(bags),),
                external_name="other"),
        FAST,
    )  # fmt: skip
    return folder / "out"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_predictions_are_out_of_fold(study, made):
    rows = table(study / "predictions.csv")
    internal = [row for row in rows if row["cohort"] == "internal"]
    folds = {row["slide_id"]: row["fold"] for row in table(study / "folds.csv")}
    assert {row["slide_id"]: row["fold"] for row in internal} == folds and len(folds) == 30
    other = [row for row in rows if row["cohort"] == "other"]
    assert len(other) == 50 and {row["fold"] for row in other} == set("01234")
    # Each answer is that of its fold's head, as anyone can load it.
    for row in (*internal[:3], other[0], other[-1]):
        head = load_head(study / "heads" / f"fold-{row['fold']}")
        folder = made[0] if row["cohort"] == "internal" else study.parent / "ext"
        features = torch.from_numpy(read_bag(folder / f"{row['slide_id']}.h5").features).float()
        with torch.inference_mode():
            expected = head(features[None]).logits[0].softmax(0)
        told = [float(row["p_class 0"]), float(row["p_class 1"])]
        assert told == pytest.approx(expected.tolist(), abs=1e-5)


def test_scores_can_be_computed_again(study):
    results = json.loads((study / "results.json").read_text())
    rows = [row for row in table(study / "predictions.csv") if row["cohort"] == "internal"]
    truth = np.array([row["label"] == "class 1" for row in rows])
    p = np.array([float(row["p_class 1"]) for row in rows])
    fold = np.array([row["fold"] for row in rows])
    expected = {
        "AUC": roc_auc_score,
        "accuracy": lambda y, q: accuracy_score(y, q > 0.5),
        "macro F1": lambda y, q: f1_score(y, q > 0.5, average="macro"),
        "weighted F1": lambda y, q: f1_score(y, q > 0.5, average="weighted"),
    }
    scores = {s["metric"]: s for s in results["scores"] if s["cohort"] == "internal"}
    assert scores.keys() == expected.keys()
    for name, metric in expected.items():
        each = [metric(truth[fold == k], p[fold == k]) for k in sorted(set(fold))]
        assert scores[name]["fold_mean"] == pytest.approx(np.mean(each), abs=1e-9)
        assert scores[name]["fold_sd"] == pytest.approx(np.std(each, ddof=1), abs=1e-9)
        assert scores[name]["interval"]["estimate"] == pytest.approx(metric(truth, p), abs=1e-9)
    counts = results["cohorts"][0]
    assert counts["patients"] == 15 and counts["majority"]["accuracy"] == pytest.approx(16 / 30)
    text = (study / "table.md").read_text()
    assert "always the commonest class" in text and "| other" not in text.split("##")[1]


def test_study_folder_is_whole(study):
    names = {str(p.relative_to(study)) for p in study.rglob("*") if p.is_file()}
    for name in ("roc.png", "confusion.png", "confusion-other.png", "head/model.safetensors",
                 "head/README.md", "heads/fold-4/modeling_xmag_abmil.py"):  # fmt: skip
        assert name in names
    assert not study.with_name("out.partial").exists() and not any("work" in n for n in names)
    results = json.loads((study / "results.json").read_text())
    losses = [f["history"][f["best_epoch"] - 1]["validation_loss"] for f in results["folds"]]
    best = int(np.argmin(losses))
    assert results["published_fold"] == best
    head, chosen = load_head(study / "head"), load_head(study / "heads" / f"fold-{best}")
    for one, other in zip(head.parameters(), chosen.parameters(), strict=True):
        assert torch.equal(one, other)
    assert str(study.parent) not in (study / "results.json").read_text()
    card = (study / "head" / "README.md").read_text()
    assert "xmag" in (ModelCard(card).data.tags or [])
    assert "Not a medical device" in card and "`made-up`" in card
    assert "| internal | 15 |" in card and "| other | 5 |" in card


def test_done_is_not_done_again_and_other_things_are_kept(study, made, tmp_path, monkeypatch):
    again = options(made, study, external_labels=str(study.parent / "ext.csv"),
                    external_bags=(str(study.parent / "ext"),), external_name="other")  # fmt: skip
    monkeypatch.setattr("xmag_hf.mil.study.train_fold", None)  # nothing may be trained
    result = run_study([made[0]], again, FAST)
    stored = json.loads((study / "results.json").read_text())["scores"]
    assert [s.interval.estimate for s in result.scores] == [
        s["interval"]["estimate"] for s in stored
    ]
    with pytest.raises(MILError, match="holds something else"):
        run_study([made[0]], options(made, study), FAST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(MILError, match="holds something else"):
        run_study([made[0]], options(made, tmp_path / "mine"), FAST)


def test_resumed_after_a_crash_gives_the_same(made, tmp_path, monkeypatch):
    from xmag_hf.mil import study as module

    run_study([made[0]], options(made, tmp_path / "whole", folds=3), FAST)
    trained: list[int] = []
    train = module.train_fold

    def dies(task, advance):
        if task.fold == 2 and not trained.count(-1):
            trained.append(-1)
            raise KeyboardInterrupt
        trained.append(task.fold)
        train(task, advance)

    monkeypatch.setattr(module, "train_fold", dies)
    halted = options(made, tmp_path / "halted", folds=3)
    with pytest.raises(KeyboardInterrupt):
        run_study([made[0]], halted, FAST)
    assert not (tmp_path / "halted").exists()
    with pytest.raises(MILError, match="work of another study"):
        run_study([made[0]], options(made, tmp_path / "halted", folds=2), FAST)
    run_study([made[0]], halted, FAST)
    assert trained == [0, 1, -1, 2]
    for name in ("predictions.csv", "folds.csv", "table.md"):
        one, other = (tmp_path / part / name for part in ("whole", "halted"))
        assert one.read_bytes().replace(b"whole", b"") == other.read_bytes().replace(b"halted", b"")


def test_encoders_and_heads_on_the_same_folds_in_processes(made, study, tmp_path, capsys):
    """One command, two encoders, two heads, several folds at once, folds of an earlier study."""
    lines = cohort_lines()
    other = make_bags(tmp_path / "wide", {s: int(label[-1]) for s, _, label in lines}, dim=9,
                      info=BagInfo(**{**vars(INFO), "encoder": "other"}))  # fmt: skip
    out = tmp_path / "out"
    code = main([
        "mil", str(made[0]), str(other), "--labels", str(made[1]), "--out", str(out),
        "--folds-csv", str(study / "folds.csv"), "--head", "abmil", "mean-pool", "--jobs", "2",
        "--epochs", "2", "--hidden-dim", "8", "--attention-dim", "4", "--samples", "20", "--quiet",
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    names = ["bags-abmil", "bags-mean-pool", "wide-abmil", "wide-mean-pool"]
    for name in names:
        assert name in printed.out
        assert (out / name / "folds.csv").read_text() == (study / "folds.csv").read_text()
        config = load_head(out / name / "head").config
        assert config.encoder == ("made-up" if name.startswith("bags") else "other")
        assert config.model_type == ("xmag_abmil" if "abmil" in name else "xmag_mean_pool")
    assert json.loads((out / "results.json").read_text())["studies"] == names
    assert "DeLong" not in printed.out  # two slides a patient: the bootstrap draws patients


def test_slides_of_patients_with_one_each_are_tested_by_delong(tmp_path):
    """What `xmag compare` says of the same studies, docs/reproduction.md."""
    lines = [(name, name, label) for name, _, label in cohort_lines()]
    slides = {name: int(label[-1]) for name, _, label in lines}
    labels = write_labels(tmp_path / "labels.csv", lines)
    folders = [make_bags(tmp_path / name, slides, dim) for name, dim in (("a", D), ("b", 9))]
    out = tmp_path / "out"
    chosen = StudyOptions(labels=str(labels), out=str(out), folds=2, samples=20, jobs=1)
    result = run_study(folders, chosen, FAST)
    again = compare_studies([out / "a", out / "b"], CompareOptions(samples=20))
    assert any("DeLong" in one.test.test for one in result.tests)
    told, expected = (
        [(one.metric, one.test.test, one.test.p_value) for one in made.tests]
        for made in (result, again)
    )
    told, expected = ([t for t in part if "bootstrap" not in t[1]] for part in (told, expected))
    assert told == expected


def test_a_study_begun_on_a_gpu_does_not_go_on_without_one(made, tmp_path, monkeypatch):
    """A GPU trains in bf16, a CPU in fp32: folds of both would be averaged."""
    from xmag_hf.mil import study as module

    train = module.train_fold

    def dies(task, advance):
        if task.fold:
            raise KeyboardInterrupt
        train(task, advance)

    chosen = options(made, tmp_path / "study", folds=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_fold", dies)
        patch.setattr(module, "precision_of", lambda device: "bf16")
        with pytest.raises(KeyboardInterrupt):
            run_study([made[0]], chosen, FAST)
    with pytest.raises(MILError, match="work of another study"):
        run_study([made[0]], chosen, FAST)


def test_bags_of_two_nominal_scales_are_not_mixed(tmp_path):
    """TRIDENT's files say no um/px: their magnification is all there is to compare."""
    slides = {name: int(label[-1]) for name, _, label in cohort_lines()}
    folder = make_bags(tmp_path / "bags", slides, info=BagInfo(patch_px=256))
    for number, path in enumerate(sorted(folder.glob("*.h5"))):
        with h5py.File(path, "r+") as file:
            file.attrs.clear()
            file["coords"].attrs["level0_magnification"] = 40
            file["coords"].attrs["target_magnification"] = 5 if number == 3 else 20
    labels = write_labels(tmp_path / "labels.csv", cohort_lines())
    chosen = StudyOptions(labels=str(labels), out=str(tmp_path / "o"), folds=2, samples=20)
    with pytest.raises(MILError, match="target_magnification 20.0 and 5.0"):
        run_study([folder], chosen, FAST)


@pytest.mark.parametrize(
    "change, words",
    [
        ("patient", "patient 's-p0' is in the labels of both cohorts"),
        ("encoder", "encoder 'made-up' and 'else'"),
        ("class", "labels class 9 are none of the classes"),
        ("folders", "0 folders for 1 of BAGS|2 folders for 1 of BAGS"),
    ],
)
def test_external_cohorts_that_cannot_be_used(made, tmp_path, change, words):
    lines = [(s, "s-p0" if change == "patient" else p, "class 9" if change == "class" else label)
             for s, p, label in cohort_lines(6, "e")]  # fmt: skip
    info = BagInfo(**{**vars(INFO), "encoder": "else"}) if change == "encoder" else INFO
    bags = make_bags(tmp_path / "ext", {slide: 0 for slide, _, _ in lines}, info=info)
    labels = write_labels(tmp_path / "ext.csv", lines)
    folders = (str(bags), str(bags)) if change == "folders" else (str(bags),)
    wrong = options(made, tmp_path / "o", external_labels=str(labels), external_bags=folders)
    with pytest.raises(MILError, match=words):
        run_study([made[0]], wrong, FAST)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (("--head", "clam"), "--head clam"),
        (("--folds", "1"), "--folds=1"),
        (("--validation-share", "0"), "--validation-share=0"),
        (("--external-labels", "x.csv"), "give both, or neither"),
        (("--external-name", "internal"), "choose another"),
        (("--jobs", "0"), "--jobs=0"),
        (("--dropout", "1"), "--dropout=1"),
        (("--learning-rate", "0"), "--learning-rate=0"),
        (("--epochs", "0"), "--epochs=0"),
    ],
)
def test_wrong_usage(made, tmp_path, capsys, more, words):
    arguments = ["mil", str(made[0]), "--labels", str(made[1]), "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *more])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--folds-csv", "no.csv"), "no.csv"),
        (("--against-rest", "class 7"), "has the classes class 0, class 1"),
    ],
)
def test_refused_with_one_line(made, tmp_path, capsys, more, words):
    arguments = ["mil", str(made[0]), "--labels", str(made[1]), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--quiet", *more]) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list(tmp_path.glob("o*"))


def test_bags_that_lack_patches_are_told_once(tmp_path, caplog):
    lines = cohort_lines(20)
    bags = make_bags(tmp_path / "bags", {slide: int(label[-1]) for slide, _, label in lines})
    for name in ("s00", "s02", "s04", "s05"):
        bag = read_bag(bags / f"{name}.h5")
        info = dataclasses.replace(bag.info, unreadable_patches=3)
        write_bag(bags / f"{name}.h5", dataclasses.replace(bag, info=info))
    other = Path(shutil.copytree(bags, tmp_path / "other"))
    labels = write_labels(tmp_path / "labels.csv", lines)
    few = StudyOptions(labels=str(labels), out=str(tmp_path / "out"), samples=5, jobs=1, folds=2)
    run_study([bags, other], few, dataclasses.replace(FAST, epochs=1))
    (told,) = [text for text in caplog.messages if "could not be decoded" in text]
    assert "4 slides" in told and "s00, s02, s04, ..." in told


def test_bags_named_alike_and_none(made, tmp_path):
    make_bags(tmp_path / "bags", {"s00": 0})
    with pytest.raises(MILError, match="two folders of bags named 'bags'"):
        run_study([made[0], tmp_path / "bags"], options(made, tmp_path / "o"), FAST)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MILError, match="no folder of bags"):
        run_study([tmp_path / "empty"], options(made, tmp_path / "o"), FAST)


def test_labelled_rows():
    bags = LabelledBags(["a", "b", "c"], np.array([0, 1, 2]))  # type: ignore[list-item]
    assert bags.rows(np.array([True, False, True])).files == ["a", "c"]
    assert bags.rows(np.array([2, 0])).labels.tolist() == [2, 0]


def test_killed_after_its_last_result_a_study_is_not_lost(made, tmp_path, monkeypatch):
    out = tmp_path / "o"

    real = os.replace

    def killed(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as context:
        context.setattr("xmag_hf.mil.study.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study([made[0]], options(made, out), FAST)
    assert (tmp_path / "o.partial" / "results.json").is_file()
    done = run_study([made[0]], options(made, out), FAST)
    assert done.scores and (out / "results.json").is_file()
    assert not (tmp_path / "o.partial").exists()
    left = {path.name for path in out.iterdir()}
    again = run_study([made[0]], options(made, out), FAST)
    assert again.scores == done.scores and {path.name for path in out.iterdir()} == left


def test_a_loss_that_is_not_finite_is_named(made, tmp_path):
    wild = HeadOptions(hidden_dim=8, attention_dim=4, epochs=2, batch_size=2, learning_rate=1e30)
    with pytest.raises(MILError, match="lower --learning-rate"):
        run_study([made[0]], options(made, tmp_path / "o"), wild)


# --- presets ---------------------------------------------------------------------------------


def test_a_preset_makes_its_labels_and_shows_the_paper_beside_ours(tmp_path):
    """PANDA's own table instead of a label CSV; the same study as with the CSV made by hand."""
    grades = {f"{k:032x}": k % 6 for k in range(1, 73)}
    table = tmp_path / "train.csv"
    lines = [f"{name},karolinska,{grade},0+0" for name, grade in grades.items()]
    table.write_text("\n".join(["image_id,data_provider,isup_grade,gleason_score", *lines]))
    bags = make_bags(tmp_path / "bags", grades)
    out = tmp_path / "study"
    more = {"folds": 2, "samples": 20, "jobs": 1}
    preset = StudyOptions(out=str(out), preset="panda-isup", preset_files=(str(table),), **more)
    run_study([bags], preset, FAST)
    text = (out / "table.md").read_text()
    assert "0.910" in text and "0.923" in text  # XMAG's and Phikon's AUC, table S3
    by_hand = write_labels(
        tmp_path / "labels.csv", [(name, name, f"ISUP-{grade}") for name, grade in grades.items()]
    )
    plain = StudyOptions(out=str(tmp_path / "plain"), labels=str(by_hand), **more)
    run_study([bags], plain, FAST)
    assert (out / "predictions.csv").read_text() == (
        tmp_path / "plain" / "predictions.csv"
    ).read_text()


def test_a_presets_classes_keep_their_order(tmp_path):
    """By letter, high would come before low, and be the class of index 0."""
    scores = {f"TCGA-AA-{k:04d}": 40 if k % 2 else 10 for k in range(24)}
    lines = [f"{patient},{score}" for patient, score in scores.items()]
    table, sheet = tmp_path / "scores.csv", tmp_path / "sheet.tsv"
    table.write_text("\n".join(["patient_id,recurrence_score", *lines]))
    names = [f"{patient}-01Z-00-DX1.{k:08d}" for k, patient in enumerate(scores)]
    lines = [f"{n}.svs\tTCGA-BRCA\t{p}" for n, p in zip(names, scores, strict=True)]
    sheet.write_text("\n".join(["File Name\tProject ID\tCase ID", *lines]))
    slides = {name: int(s > 25) for name, s in zip(names, scores.values(), strict=True)}
    bags = make_bags(tmp_path / "bags", slides)
    chosen = StudyOptions(out=str(tmp_path / "study"), preset="brca-odx", folds=2, samples=20,
                          preset_files=(str(table), str(sheet)), jobs=1)  # fmt: skip
    run_study([bags], chosen, FAST)
    assert load_head(tmp_path / "study" / "head").config.id2label == {0: "low", 1: "high"}


def test_preset_options_that_contradict(tmp_path):
    with pytest.raises(MILError, match="--labels, or --preset with --preset-files"):
        StudyOptions(out="o")
    with pytest.raises(MILError, match="--labels, or --preset with --preset-files"):
        StudyOptions(out="o", preset="nsclc")
    both = StudyOptions(out=str(tmp_path / "o"), labels="l", preset="nsclc", preset_files=("f",))
    with pytest.raises(MILError, match="--preset makes them"):
        run_study([tmp_path], both, FAST)
    with pytest.raises(MILError, match="--against-rest ISUP-0: --preset panda-isup"):
        StudyOptions(out="o", preset="panda-isup", preset_files=("f",), against_rest="ISUP-0")
    table = tmp_path / "train.csv"
    table.write_text("image_id,data_provider,isup_grade,gleason_score\nab,karolinska,1,3+3\n")
    asked = StudyOptions(
        out=str(tmp_path / "o"), preset="panda-isup", preset_files=(str(table),),
        external_bags=("b",),
    )  # fmt: skip
    with pytest.raises(MILError, match="no cohort to test on"):
        run_study([tmp_path], asked, FAST)


def test_a_class_too_rare_for_every_fold_costs_one_shuffle(monkeypatch):
    """No shuffle can put two patients into three folds, so none is tried after the first."""
    shuffles = []
    real = StratifiedGroupKFold.split

    def counted(self, *given):
        shuffles.append(self.random_state)
        return real(self, *given)

    monkeypatch.setattr(StratifiedGroupKFold, "split", counted)
    names = np.array([f"s{k:02d}" for k in range(20)])
    labels = np.array([0] * 9 + [1] * 9 + [2] * 2)
    cohort = Cohort("internal", names, names, labels, ("a", "b", "c"), (), ())
    folds = make_folds(cohort, 3, seed=0)
    assert len(shuffles) == 1
    assert sorted(np.bincount(folds).tolist()) == [6, 7, 7]
    assert [len(set(folds[labels == c])) for c in range(3)] == [3, 3, 2]

"""Who trains, validates and tests each head: told truly, kept for `xmag e2e`, never by chance."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xmag_hf.embedding import Bag, BagInfo, EmbedOptions, SlideSource, embed_slide, write_bag
from xmag_hf.mil import HeadOptions, MILError, StudyOptions, end_to_end, run_study, study
from xmag_hf.mil.e2e_options import E2EOptions
from xmag_hf.mil.folds import make_folds, validation_rows
from xmag_hf.mil.labels import Cohort
from xmag_hf.mil.study import FoldTask
from xmag_hf.modeling import XMAGConfig, XMAGImageProcessor, XMAGModel

INFO = BagInfo(
    encoder="made-up", encoder_revision="1", pooling="cls", mpp=2.0, patch_px=224, mpp0=0.5
)
FAST = HeadOptions(hidden_dim=8, attention_dim=4, epochs=2, batch_size=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """(folder of bags, label CSV) of 24 slides, two of each of 12 patients, two classes."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "bags").mkdir()
    lines, rng = ["slide_id,patient_id,label"], np.random.default_rng(0)
    for number in range(24):
        name = f"s{number:02d}"
        lines.append(f"{name},p{number // 2},class {number // 2 % 2}")
        features = rng.normal(size=(5, 6)).astype(np.float16)
        coords = np.zeros((5, 2), np.int64)
        write_bag(folder / "bags" / f"{name}.h5", Bag(name, features, coords, INFO))
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder / "bags", folder / "labels.csv"


def options(made: tuple[Path, Path], out: Path, **more) -> StudyOptions:
    values = {"samples": 20, "jobs": 1, **more}
    return StudyOptions(labels=str(made[1]), out=str(out), **values)


def spied(monkeypatch: pytest.MonkeyPatch, before: Callable[[FoldTask], None] | None = None):
    """The folds that are trained from now on; `before` is called ahead of each."""
    tasks: list[FoldTask] = []
    train = study.train_fold

    def told(task, advance=None):
        if before is not None:
            before(task)
        tasks.append(task)
        train(task, advance)

    monkeypatch.setattr(study, "train_fold", told)
    return tasks


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def names(bags) -> set[str]:
    return {file.slide_id for file in bags.files}


def test_a_study_tells_who_validated_and_how_many(made, tmp_path, monkeypatch) -> None:
    tasks = spied(monkeypatch)
    run_study([made[0]], options(made, tmp_path / "o", folds=3, validation_share=0.4), FAST)
    rows = table(tmp_path / "o" / "folds.csv")
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    patient = {row["slide_id"]: row["patient_id"] for row in rows}
    for task, told in zip(tasks, results["folds"], strict=True):
        validating = {row["slide_id"] for row in rows if str(task.fold) in row["validates"].split()}
        assert validating == names(task.validation) and validating
        assert not validating & (names(task.training) | names(task.tested[0]))
        patients = {patient[name] for name in names(task.training) | validating}
        share = len({patient[name] for name in validating}) / len(patients)
        assert told["validation_share"] == pytest.approx(share)
        assert share == pytest.approx(0.5)  # 1 / 0.4 is rounded to two parts


def test_the_number_of_folds_is_that_of_the_file(made, tmp_path) -> None:
    run_study([made[0]], options(made, tmp_path / "three", folds=3), FAST)
    given = str(tmp_path / "three" / "folds.csv")
    with pytest.raises(MILError, match=r"folds\.csv: 3 folds, and --folds 5"):
        run_study([made[0]], options(made, tmp_path / "no", folds=5, folds_csv=given), FAST)
    assert not (tmp_path / "no.partial").exists()
    run_study([made[0]], options(made, tmp_path / "again", folds_csv=given), FAST)
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["options"]["folds"] == 3
    run_study([made[0]], options(made, tmp_path / "five"), FAST)
    results = json.loads((tmp_path / "five" / "results.json").read_text())
    assert results["options"]["folds"] == len(results["folds"]) == 5


# --- rare classes ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_rare_class_does_not_end_a_study_by_chance(seed: int) -> None:
    """Two patients of class c: outside a test fold that has one, the other must train."""
    slides = np.array([f"s{number:03d}" for number in range(80)])
    labels = np.array([number % 2 for number in range(78)] + [2, 2])
    cohort = Cohort("internal", slides, slides, labels, ("a", "b", "c"), (), ())
    folds = make_folds(cohort, 5, seed)
    for fold in range(5):
        validation = validation_rows(cohort, folds != fold, 0.2, seed)
        assert set(labels[(folds != fold) & ~validation]) == {0, 1, 2}
        assert 12 <= validation.sum() <= 14  # a fifth of the 64 others


def test_folds_of_few_patients_are_not_refused_by_chance() -> None:
    """With 3 of class b and 2 of c, five folds of two classes each are there to be found."""
    slides = np.array([f"s{number:02d}" for number in range(12)])
    labels = np.repeat([0, 1, 2], [7, 3, 2])
    cohort = Cohort("internal", slides, slides, labels, ("a", "b", "c"), (), ())
    for seed in range(20):
        folds = make_folds(cohort, 5, seed)
        assert all(len(set(labels[folds == fold])) > 1 for fold in range(5))
        assert len(set(folds[labels == 2])) > 1  # else its own head would never see class c


# --- workers that die ------------------------------------------------------------------------


def test_a_gpu_without_memory_names_what_is_left(made, tmp_path, monkeypatch) -> None:
    def full(task: FoldTask) -> None:
        if task.fold == 1 and full_still:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    full_still = True
    chosen = options(made, tmp_path / "o", folds=3)
    with monkeypatch.context() as patch:
        spied(patch, full)
        with pytest.raises(MILError, match="bags fold 1, bags fold 2: .*memory.*same command"):
            run_study([made[0]], chosen, FAST)
    full_still = False
    tasks = spied(monkeypatch)
    run_study([made[0]], chosen, FAST)
    assert [task.fold for task in tasks] == [1, 2]


def test_a_killed_worker_names_what_is_left(made, tmp_path, monkeypatch) -> None:
    """As the kernel does where memory ends."""
    wait = concurrent.futures.wait

    def kill(pending, timeout):
        for child in multiprocessing.active_children():
            child.kill()
        return wait(pending, timeout)

    monkeypatch.setattr(concurrent.futures, "wait", kill)
    with pytest.raises(MILError, match=r"fold 0, bags fold 1: .*killed.*--jobs \(2\).* goes on"):
        run_study([made[0]], options(made, tmp_path / "o", folds=2, jobs=2), FAST)


# --- end to end ------------------------------------------------------------------------------


def twelve() -> Cohort:
    """Two slides of each of six patients, one of each class."""
    slides = np.array([f"s{number:02d}" for number in range(12)])
    patients = np.array([f"p{number // 2}" for number in range(12)])
    return Cohort("internal", slides, patients, np.arange(12) % 2, ("a", "b"), (), ())


def study_folder(folder: Path, validates: bool = True) -> Path:
    """Three folds of two patients; the first patient of the next fold validates each."""
    lines = ["slide_id,patient_id,label,fold" + ",validates" * validates]
    for number, slide in enumerate(twelve().slide_ids):
        patient = number // 2
        told = f",{(patient // 2 - 1) % 3 if patient % 2 == 0 else ''}" * validates
        lines.append(f"{slide},p{patient},{'ab'[number % 2]},{patient // 2}{told}")
    for fold in range(3):
        (folder / "heads" / f"fold-{fold}").mkdir(parents=True)
    (folder / "folds.csv").write_text("\n".join(lines))
    return folder


def asked(head: Path, **more) -> E2EOptions:
    values = {"folds": 3, **more}
    return E2EOptions(encoder="e", labels="l", out="o", head=str(head), **values)


def test_those_that_validated_a_head_validate_what_goes_on_from_it(tmp_path, caplog) -> None:
    """Another seed, another share and fewer slides change nothing about who has been learnt."""
    head = study_folder(tmp_path / "study")
    whole, some = twelve(), twelve().rows(np.arange(12) != 4, "lost")
    for cohort in (whole, some):
        kept, folds = end_to_end._folds(cohort, asked(head))
        chosen = asked(head, seed=9, validation_share=0.5)
        made = end_to_end._validation(kept, folds, range(3), chosen)
        for fold, patients in enumerate(({"p2"}, {"p4"}, {"p0"})):
            assert set(kept.patient_ids[made[fold]]) == patients
            assert set(made[fold].tolist()) == {True, False}
    # One training goes on from one head, by the slides that stopped that one.
    (single,) = end_to_end._validation(
        whole, np.full(12, -1), [0], asked(head / "heads" / "fold-1", folds=1)
    ).values()
    assert set(whole.patient_ids[single]) == {"p4"}


def test_slides_a_head_has_learnt_from_do_not_validate(tmp_path) -> None:
    old = study_folder(tmp_path / "old", validates=False)
    kept, folds = end_to_end._folds(twelve(), asked(old))
    with pytest.raises(MILError, match="fold-0: has learnt from 8 of the slides here.*xmag mil"):
        end_to_end._validation(kept, folds, range(3), asked(old))
    head = study_folder(tmp_path / "study")
    lost = twelve().rows(~np.isin(twelve().patient_ids, ["p2"]), "lost")
    with pytest.raises(MILError, match="fold-0: has learnt from 6 of the slides here"):
        end_to_end._validation(lost, np.repeat([0, 1, 2], [4, 2, 4]), [0], asked(head))
    # Slides of other people: whichever of them validate, the head has seen none.
    other = dataclasses.replace(twelve(), slide_ids=np.array([f"t{n:02d}" for n in range(12)]))
    one = asked(head / "heads" / "fold-1", folds=1, validation_share=0.5)
    (single,) = end_to_end._validation(other, np.full(12, -1), [0], one).values()
    assert single.sum() == 6
    # Nothing left of a class to train on.
    few = twelve().rows(np.isin(np.arange(12), [0, 1, 4, 5, 6]), "lost")
    with pytest.raises(MILError, match="'b'.*all its slides .*validat"):
        end_to_end._validation(few, np.array([0, 0, 1, 1, 1]), [0], asked(head))


def test_end_to_end_goes_on_from_a_study(tmp_path, cmu_pixels, monkeypatch) -> None:
    """The whole way, with one slide fewer and another seed than the heads have had."""
    torch.manual_seed(0)
    encoder = tmp_path / "xmag"
    XMAGModel(
        XMAGConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=3)
    ).save_pretrained(encoder)
    XMAGImageProcessor().save_pretrained(encoder)
    reading = EmbedOptions(slide_mpp=2.0, tissue=0.0, threads=1)
    lines, sources = ["slide_id,patient_id,label"], []
    (tmp_path / "bags").mkdir()
    for number in range(16):
        x, y = 600 + 60 * number, 300 + 110 * number
        part = cmu_pixels[y : y + 224, x : x + 448]
        path = tmp_path / f"s{number:02d}.png"
        Image.fromarray(np.ascontiguousarray(part)).save(path)
        sources.append(SlideSource(path))
        lines.append(f"{path.stem},p{number // 2},{'ab'[number % 2]}")
        bag = embed_slide(path, str(encoder), reading)
        write_bag(tmp_path / "bags" / f"{path.stem}.h5", bag)
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    made = (tmp_path / "bags", tmp_path / "labels.csv")
    tasks = spied(monkeypatch)
    run_study([made[0]], options(made, tmp_path / "study", folds=2, validation_share=0.25), FAST)
    learnt = {task.fold: names(task.training) for task in tasks}
    stopped = {task.fold: names(task.validation) for task in tasks}
    chosen = E2EOptions(
        encoder=str(encoder), labels=str(made[1]), out=str(tmp_path / "e2e"), folds=2, epochs=1,
        head=str(tmp_path / "study"), seed=5, kept_type="float32", samples=20,
    )  # fmt: skip
    lost = sorted(learnt[0])[0]
    sources = [source for source in sources if source.slide_id != lost]
    validating: list[set[str]] = []
    train = end_to_end.train_fold

    def told(*given, **more):
        validating.append({slide.slide_id for slide in given[4]})
        return train(*given, **more)

    monkeypatch.setattr(end_to_end, "train_fold", told)
    end_to_end.end_to_end(sources, chosen, reading)
    for fold, seen in enumerate(validating):
        assert seen and seen <= stopped[fold] and not seen & learnt[fold]
        record = json.loads((tmp_path / "e2e" / "heads" / f"fold-{fold}" / "fold.json").read_text())
        assert set(record["validation"]) == seen

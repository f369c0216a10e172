"""What the studies refuse to put into one table, and the units that they resample."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, project_root: Path):
    """Import one of the scripts."""
    monkeypatch.syspath_prepend(str(project_root / "studies"))

    def named(name: str) -> ModuleType:
        module = importlib.import_module(name)
        if hasattr(module, "keep_freed_memory"):
            monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
        return module

    return named


RUN = {
    "options": {"epochs": 6.0, "local_weight": 1.0, "learning_rate": 1e-3, "seed": 0}
    | {"teacher": "efficientnet-lite0", "student": "lite", "holdout": []},
    "corpus_fingerprint": "c",
    "teacher_revision": "t",
}


def finished(folder: Path, changed: dict, **facts: object) -> None:
    folder.mkdir(parents=True)
    run = RUN | facts | {"options": RUN["options"] | changed}
    lines = [
        {"part": "p", "level": level, "student": student, "n_pairs": 9, "n_disjoint": 5}
        | {"centred_cosine": 0.5, "cosine": 0.5, "retrieval": 0.5}
        for level in ("global", "local")
        for student in ("start", "distilled")
    ]
    (folder / "distillation.json").write_text(json.dumps({"run": run, "alignment": lines}))


OTHERS = [
    ({"learning_rate": 5e-4}, {}, "learning_rate 0.0005, but 0.001"),
    ({"local_weight": 0.5}, {}, "local_weight 0.5, but 1.0"),
    ({}, {"teacher_revision": "u"}, "teacher_revision 'u', but 't'"),
    ({}, {"split": "two"}, "split 'two', but 'one'"),
]
# Their own options, another seed, what an older version did not record, where it was written.
SAME = [({}, {}), ({"stain_jitter": 0.0, "num_workers": 3}, {"split": "one"})]


@pytest.mark.parametrize(("changed", "facts", "said"), OTHERS)
def test_magnification_refuses_students_of_other_runs(
    tmp_path, study, monkeypatch, changed, facts, said
):
    magnification = study("magnification")
    # Scoring needs the labelled sets: what it would write stands for it.
    monkeypatch.setattr(magnification, "score", lambda *args: {})
    monkeypatch.setattr(magnification, "summarise", lambda *args: {})
    monkeypatch.setattr(magnification, "as_table", lambda results: "table")
    monkeypatch.setattr(magnification, "draw", lambda *args: None)
    out = tmp_path / "out"
    command = ["x", "--glas", "g", "--crchisto", "c", "--out", str(out), "--score-only"]
    monkeypatch.setattr("sys.argv", command)
    students = out / "students"
    for seed, (more, same) in enumerate(SAME):
        finished(students / f"distilled-seed{seed}", {"seed": seed} | more, **same)
    finished(students / "global-only-seed0", {"local_weight": 0.0})
    magnification.main()
    (out / "table.md").unlink()
    finished(students / "distilled-seed2", {"seed": 2} | changed, **facts)
    with pytest.raises(SystemExit, match=said):
        magnification.main()
    assert not (out / "table.md").exists()


@pytest.mark.parametrize(("changed", "facts", "said"), [*OTHERS, ({"seed": 2}, {}, "seed 2, but")])
def test_screening_refuses_rows_of_other_runs(tmp_path, study, monkeypatch, changed, facts, said):
    screening = study("screening")
    monkeypatch.setattr(screening, "draw", lambda *args: None)
    command = ["x", "--corpus", "c", "--holdout", "h", "--out", str(tmp_path), "--score-only"]
    monkeypatch.setattr("sys.argv", command)
    rows = ("plain recipe", "relational loss")
    for row, (more, same) in zip(rows, SAME, strict=True):
        finished(tmp_path / screening.folder_name(row), more, **same)
    finished(tmp_path / screening.folder_name(screening.AGAIN), {"seed": 1})
    wider = {"split": "with a margin around held-out bands"}
    finished(tmp_path / screening.folder_name("um/px jitter 0.2"), {"mpp_jitter": 0.2}, **wider)
    screening.main()
    (tmp_path / "table.md").unlink()
    finished(tmp_path / screening.folder_name("centred targets"), changed, **facts)
    with pytest.raises(SystemExit, match=said):
        screening.main()
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize("block", [1, 2])
def test_nuclei_are_folded_and_resampled_by_blocks_of_fields(tmp_path, study, monkeypatch, block):
    yardsticks = study("nuclei_yardsticks")
    ids = np.array(["img1.png", "img1.png", "img2.png", "img3.png"])
    units = ids.tolist() if block == 1 else [0, 0, 0, 1]
    seen: dict[str, list] = {"groups": [], "clusters": []}

    def count_probe(x: np.ndarray, counts: np.ndarray, *, groups: np.ndarray) -> np.ndarray:
        seen["groups"].append(groups.tolist())
        return np.arange(20.0).reshape(5, 4, 1)

    def bootstrap_test(*args: object, clusters: np.ndarray, samples: int) -> Namespace:
        seen["clusters"].append(clusters.tolist())
        return Namespace(difference=0.0, low=0.0, high=0.0, p_value=1.0)

    args = Namespace(field_block=block, out=tmp_path, samples=9, teacher="t", student="lite")
    monkeypatch.setattr(yardsticks.magnification, "parse", lambda: args)
    monkeypatch.setattr(yardsticks.magnification, "yardsticks", lambda *args: (None, None))
    truth = {"crowded": np.array([1, 2, 3, 4])}
    monkeypatch.setattr(yardsticks, "measured_cells", lambda args: (ids, truth))
    monkeypatch.setattr(yardsticks, "load_encoder", lambda name: None)
    embedded = {"all": (np.zeros((4, 3)), None)}
    monkeypatch.setattr(yardsticks, "embed_cells", lambda *args, **options: embedded)
    monkeypatch.setattr(yardsticks, "count_probe", count_probe)
    monkeypatch.setattr(yardsticks, "bootstrap_test", bootstrap_test)
    yardsticks.main()
    assert seen == {"groups": [units] * 3, "clusters": [units]}


def test_known_bags_go_on_with_their_own_draws_only(tmp_path, study, monkeypatch):
    known_bags = study("known_bags")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    squares = np.zeros((4, 8, 8, 3), np.uint8)
    glas = (squares, np.array([True, False, True, False]), np.array(["a", "a", "b", "b"]))
    bags = known_bags.Bags(*(np.zeros((1, 1), int),) * 4)
    trained: list[int] = []

    def run_draw(args, encoder, record, *rest) -> None:
        trained.append(rest[-1])
        record["models"] |= dict.fromkeys(known_bags.MODELS)

    model = Namespace(frozen=None, trained=None)
    for name, answer in {
        "read_glas": lambda folder: glas,
        "draw_bags": lambda *args: (bags, bags),
        "slide_model": lambda *args: model,
        "in_chunks": lambda function, rows: rows,
        "run_draw": run_draw,
        "summarise": lambda *args: None,
    }.items():
        monkeypatch.setattr(known_bags, name, answer)
    command = ["x", "--glas", "g", "--encoder", "random:lite", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--draws", "2"])
    known_bags.main()
    assert trained == [0, 1]
    path = tmp_path / "draws" / "draw-1.json"
    record = json.loads(path.read_text())
    for name in ("encoder_revision", "images", "options"):
        path.write_text(json.dumps(record | {name: "another"}))
        with pytest.raises(SystemExit, match=rf"draw-1\.json: {name} 'another', and now"):
            known_bags.main()
    record.pop("images")  # older versions did not write it
    path.write_text(json.dumps(record))
    known_bags.main()
    assert trained == [0, 1]

"""Checkpoint folders and the metrics file; how runs go on is tested with each training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xmag_hf.training.checkpoints import RUN_FILE, Metrics, checkpoint_folder, newest_checkpoint


def test_metrics_are_json_even_where_gradients_overflow(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "grad_norm": float("inf"), "loss": -0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "grad_norm": None,
        "loss": -0.5,
    }


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (2, 4, 6)]
    path.write_text("\n".join([*lines, '{"ste']))  # the last one cut short by a kill
    Metrics(path, 4).write({"step": 5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 5]
    Metrics(path, 0)
    assert path.read_text() == ""


def test_the_newest_is_the_last_complete_one(tmp_path: Path) -> None:
    """By number, not by name; what a kill cut short, or another program left, is none."""
    assert newest_checkpoint(tmp_path) is None
    folder = checkpoint_folder(tmp_path)
    for name, complete in (("step-9", True), ("step-10", True), ("step-11", False),
                           ("step-12.tmp", True), ("step-last", True)):  # fmt: skip
        (folder / name).mkdir(parents=True)
        if complete:
            (folder / name / RUN_FILE).write_text(json.dumps({"name": name}))
    assert newest_checkpoint(tmp_path) == (10, folder / "step-10", {"name": "step-10"})

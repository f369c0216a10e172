from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xmag_hf.distillation import checkpoints, trainer
from xmag_hf.distillation.options import DistillationError, DistillOptions
from xmag_hf.distillation.trainer import distill
from xmag_hf.modeling.convert import build_student


def _lines(options: DistillOptions) -> list[dict]:
    path = Path(options.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


CURVE = ("step", "loss", "loss_global", "loss_local", "learning_rate", "grad_norm")


def _curve(options: DistillOptions) -> list[tuple]:
    return [tuple(line[name] for name in CURVE) for line in _lines(options)]


@pytest.mark.parametrize("student", ["lite", "tiny"])
def test_a_run_learns_and_its_average_is_what_it_returns(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch, student: str
) -> None:
    monkeypatch.setattr(trainer, "build_student", build_student)  # the real ones
    chosen = options(
        student=student,
        init="random" if student == "tiny" else None,
        max_steps=8,
        learning_rate=1e-3,
        cache_teacher=True,
        holdout=("lower",),
        batch_size=6,
    )
    result = distill(chosen, quiet=True)
    assert result is not None
    losses = [line["loss"] for line in _lines(chosen)]
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) < 0.5
    assert len(losses) == 8
    for line in _lines(chosen):
        assert line["loss"] == pytest.approx(line["loss_global"] + 0.5 * line["loss_local"], 1e-4)
        assert 0 <= line["data_wait_share"] <= 1 and line["pairs_per_second"] > 0
        assert -1 <= line["student_cosine"] <= 1 + 1e-5
    assert not result.student.training
    assert result.student.config.teacher == "mean-colour"
    assert result.student.config.teacher_dim == 3
    assert {row["student"] for row in result.alignment} == {"constant", "start", "distilled"}
    assert all(row["n_pairs"] == 12 for row in result.alignment)
    assert use_teacher.seen == 2 * 7 * 6  # cached: each sub-patch once, never again


def test_schedule_is_warmup_then_cosine(options, use_teacher) -> None:
    chosen = options(max_steps=10, warmup_ratio=0.2, learning_rate=1e-3)
    distill(chosen, quiet=True)
    rates = [line["learning_rate"] for line in _lines(chosen)]
    # Logged after step n: the rate of step n + 1; two of ten steps are warm-up.
    expected = [
        n / 2 if n < 2 else 0.5 * (1 + math.cos(math.pi * (n - 2) / 8)) for n in range(1, 11)
    ]
    assert rates == pytest.approx([1e-3 * share for share in expected], abs=1e-12)


def test_warmup_as_long_as_the_run_is_refused(options, use_teacher) -> None:
    with pytest.raises(DistillationError, match="the rate would never fall"):
        distill(options(max_steps=10, warmup_ratio=0.95), quiet=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(
    options, use_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    same = {
        "max_steps": 7,
        "checkpoint_steps": 2,
        "streaming": streaming,
        "drop_path_rate": 0.2,  # random numbers on the device are part of the state
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
    }
    whole = options(output_dir=str(tmp_path / "whole"), **same)
    expected = distill(whole, quiet=True)

    cut = options(output_dir=str(tmp_path / "cut"), **same)
    real = trainer._step
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:  # step 6: after the checkpoint of step 4 and the line of step 5
            raise RuntimeError("power cut")
        return real(*args)

    monkeypatch.setattr(trainer, "_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        distill(cut, quiet=True)
    monkeypatch.setattr(trainer, "_step", real)
    assert [line["step"] for line in _lines(cut)] == [1, 2, 3, 4, 5]
    resumed = distill(cut, quiet=True)
    assert _curve(cut) == _curve(whole)
    assert expected is not None and resumed is not None
    for name, value in expected.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    chosen = options(max_steps=5)
    real = trainer._step

    def asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(trainer, "_step", asked)
    with pytest.raises(DistillationError, match="SIGTERM after step 1 of 5"):
        distill(chosen, quiet=True)
    folder = checkpoints.checkpoint_folder(chosen.output_dir)
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    monkeypatch.setattr(trainer, "_step", real)
    assert distill(chosen, quiet=True) is not None
    assert [line["step"] for line in _lines(chosen)] == [1, 2, 3, 4, 5]


def test_another_run_is_not_continued(options, use_teacher) -> None:
    distill(options(max_steps=2), quiet=True)
    with pytest.raises(DistillationError, match="learning_rate: 0.0005 then, 0.1 now"):
        distill(options(max_steps=2, learning_rate=0.1), quiet=True)
    distill(options(max_steps=2, learning_rate=0.1, resume=False), quiet=True)


def test_a_finished_folder_is_neither_redone_nor_overwritten(
    options, use_teacher, tmp_path: Path
) -> None:
    chosen = options(max_steps=2)
    result = distill(chosen, quiet=True)
    assert result is not None
    folder = Path(chosen.output_dir)
    (folder / "config.json").write_text("{}")
    with pytest.raises(DistillationError, match="no distillation run made"):
        distill(chosen, quiet=True)
    (folder / checkpoints.RESULT_FILE).write_text(json.dumps({"run": result.run}))
    assert distill(chosen, quiet=True) is None
    with pytest.raises(DistillationError, match="seed: 0 then, 1 now"):
        distill(options(max_steps=2, seed=1), quiet=True)


def test_nan_stops_and_names_slides(options, use_teacher) -> None:
    use_teacher.scale.data *= float("nan")
    with pytest.raises(DistillationError, match=r"loss is nan on pairs \[.*of lower"):
        distill(options(), quiet=True)


def test_the_teacher_is_checked_before_any_data(options, monkeypatch) -> None:
    def gated(name: str) -> None:
        raise DistillationError(f"{name} is gated")

    monkeypatch.setattr(trainer, "check_encoder", gated)
    with pytest.raises(DistillationError, match="is gated"):
        distill(options(data="/nowhere/at/all"), quiet=True)


def test_a_complete_cache_needs_no_teacher(options, use_teacher, monkeypatch) -> None:
    distill(options(cache_teacher=True, max_steps=1), quiet=True)

    def unavailable(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("xmag_hf.distillation.teacher.load_encoder", unavailable)
    again = options(cache_teacher=True, max_steps=1, output_dir=options().output_dir + "2")
    assert distill(again, quiet=True) is not None


def test_live_and_cached_teacher_give_one_loss_curve(options, use_teacher, tmp_path) -> None:
    """The fake teacher is blind to the view, so both must agree up to float16."""
    same = {"color_jitter": False, "max_steps": 4}
    live = options(output_dir=str(tmp_path / "live"), **same)
    cached = options(output_dir=str(tmp_path / "cached"), cache_teacher=True, **same)
    distill(live, quiet=True)
    distill(cached, quiet=True)
    a, b = ([line["loss"] for line in _lines(o)] for o in (live, cached))
    assert a == pytest.approx(b, abs=5e-3)


def test_weight_decay_spares_vectors() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    decayed, spared = trainer._parameter_groups(module, 0.05)
    assert [p.shape for p in decayed["params"]] == [(2, 3)]
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0.0
    assert len(spared["params"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "at least 2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: must be in \[0, 1\)"),
        ({"global_weight": 0.0, "local_weight": 0.0}, "no loss left"),
        ({"push_to_hub": True}, "needs --hub_model_id"),
    ],
)
def test_contradictions_are_refused_at_construction(options, change, message) -> None:
    with pytest.raises(DistillationError, match=message):
        options(**change)

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import LoggerType

from xmag_hf.training import processes
from xmag_hf.training.processes import TrainingError, open_accelerator


def test_accelerate_s_own_accumulation_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(TrainingError, match="say 3 gradient accumulation steps, the options 8"):
        open_accelerator("no", 8, cpu=True)
    assert open_accelerator("no", 3, cpu=True).gradient_accumulation_steps == 3


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What accelerate is opened with, on a machine whose GPU has bf16."""
    found: dict[str, object] = {}

    def accelerator(**given: object) -> SimpleNamespace:
        found.update(given)
        return SimpleNamespace(gradient_accumulation_steps=1, log_with=[])

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("asked", "launcher", "expected"),
    [
        ("auto", None, "bf16"),
        ("auto", "no", "bf16"),  # what `accelerate launch` says when nobody told it anything
        ("auto", "fp16", None),  # accelerate reads it itself
        ("auto", "bf16", None),
        ("no", "no", "no"),
        ("no", "bf16", "no"),
        ("fp16", "no", "fp16"),
    ],
)
def test_auto_takes_what_the_launcher_was_told_else_bf16(
    opened, monkeypatch: pytest.MonkeyPatch, asked: str, launcher: str | None, expected: str | None
) -> None:
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    open_accelerator(asked, 1, cpu=False)
    assert opened["mixed_precision"] == expected


def test_auto_is_no_without_bf16_units(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, said here or by `accelerate launch --cpu`; and on a GPU that only emulates it."""
    open_accelerator("auto", 1, cpu=True)
    assert opened["mixed_precision"] == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation)  # fmt: skip
    open_accelerator("auto", 1, cpu=False)
    assert opened["mixed_precision"] == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    open_accelerator("auto", 1, cpu=False)
    assert opened["mixed_precision"] == "no"


def test_accelerate_launch_says_no_by_itself(tmp_path: Path) -> None:
    """Hence `no` in its variable is nobody's word, and must not switch bf16 off."""
    (tmp_path / "script.py").write_text(
        "import os; print(os.environ.get('ACCELERATE_MIXED_PRECISION'))"
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu",
         "script.py"],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path)},  # where no configuration lies
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["no"], done.stderr[-2000:]


def test_trackers_that_would_record_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opened(*names: str) -> list:
        folder = str(tmp_path)
        opened = open_accelerator("no", 1, cpu=True, trackers=names, project_dir=folder)
        return [tracker.value for tracker in opened.log_with]

    there = [LoggerType.WANDB]
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: there)
    assert opened("wandb") == opened("all") == ["wandb"]
    told = "--report-to tensorboard: not .*pip install tensorboard"
    with pytest.raises(TrainingError, match=told):
        opened("wandb", "tensorboard")
    with pytest.raises(TrainingError, match="--report-to tensorbord.*Choose between.*tensorboard"):
        opened("tensorbord")
    there.clear()
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match="--report-to all"):
        opened("all")

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xmag_hf.cli.main import main
from xmag_hf.distillation.trainer import distill


def _flags(options, **more: object) -> list[str]:
    values = {"data": options.data, "teacher": options.teacher, "cache_dir": options.cache_dir}
    return [f"--{name}={value}" for name, value in (values | more).items()]


@pytest.fixture(autouse=True)
def _fake_teacher(use_teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmag_hf.distillation.cache_run.load_encoder", lambda *a, **k: use_teacher)


def test_two_unlinked_processes_fill_what_training_finds(
    options, use_teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(cache_teacher=True, max_steps=1, teacher_view="5x", cache_views=2)
    flags = _flags(chosen, teacher_view="5x", cache_views=2, world=2)
    assert main(["cache", *flags, "--rank=1", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "1 shards are left" in said and "12 pairs in" in said
    (partial,) = Path(chosen.cache_dir).iterdir()
    (shard,) = partial.iterdir()
    # Extrapolation by hand: a million times the bytes of a pair.
    assert f"{1e6 * shard.stat().st_size / 12 / 1e9:.1f} GB" in said
    assert main(["cache", *flags, "--rank=0", "--quiet"]) == 0
    assert "is complete" in capsys.readouterr().out
    seen = use_teacher.seen
    assert seen == 2 * 2 * 7 * 6
    assert main(["cache", *flags, "--rank=0", "--quiet"]) == 0
    assert "Nothing was left to do" in capsys.readouterr().out
    assert distill(chosen, quiet=True) is not None
    assert use_teacher.seen == seen


def test_each_process_has_the_gpu_that_it_is_told(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is taken to have two; what is computed stays on the CPU."""
    taken = []

    def load(name: str, *, device: torch.device, precision: str) -> object:
        taken.append(device)
        return use_teacher

    monkeypatch.setattr("xmag_hf.distillation.cache_run.load_encoder", load)
    monkeypatch.setattr("xmag_hf.embedding.run.checked_device", lambda name: name)
    for rank in range(2):
        flags = _flags(options(), rank=rank, world=2, device=f"cuda:{rank}")
        assert main(["cache", *flags, "--quiet"]) == 0
    assert taken == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_a_device_that_is_not_there_is_refused(options, capsys) -> None:
    for name, reason in (("cuda:97", "--device cuda:97: "), ("gpu", "--device gpu: ")):
        with pytest.raises(SystemExit) as ended:
            main(["cache", *_flags(options(), device=name), "--quiet"])
        assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_a_rank_outside_the_world_is_refused(options, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *_flags(options(), rank=2, world=2), "--quiet"]) == 1
    assert "--rank=2: must be at least 0 and below --world=2" in capsys.readouterr().err

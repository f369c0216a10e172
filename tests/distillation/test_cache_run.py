from __future__ import annotations

from pathlib import Path

import pytest

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


def test_a_rank_outside_the_world_is_refused(options, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *_flags(options(), rank=2, world=2), "--quiet"]) == 1
    assert "--rank=2: must be at least 0 and below --world=2" in capsys.readouterr().err

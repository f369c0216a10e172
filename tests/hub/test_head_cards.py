"""Cards of heads: what they tell a user to run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from xmag_hf.embedding import Bag, BagInfo, write_bag
from xmag_hf.hub import HeadCardFacts, render_head_card
from xmag_hf.mil import MILError
from xmag_hf.modeling import XMAGABMILConfig, XMAGABMILModel

IDENTITY = {
    "encoder": "made-up", "encoder_revision": "1", "pooling": "cls", "mpp": 2.0, "patch_px": 224,
}  # fmt: skip


def _bag(folder: Path, **other: object) -> None:
    features = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    info = BagInfo(**{**IDENTITY, "mpp0": 0.5, **other})  # type: ignore[arg-type]
    write_bag(folder / "SLIDE.h5", Bag("SLIDE", features, np.zeros((5, 2), np.int64), info))


def test_the_python_of_the_card_refuses_a_bag_of_another_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = XMAGABMILConfig(embed_dim=6, hidden_dim=8, attention_dim=4, num_labels=2, **IDENTITY)
    head = XMAGABMILModel(config).eval()
    head.save_pretrained("THIS_FOLDER")
    facts = HeadCardFacts(
        model_type="xmag_abmil", classes=["a", "b"], identity=IDENTITY, encoder_licence="MIT",
        cohorts={"c": {"a": 1, "b": 1}}, patients={"c": 2}, origin="", results="", options={},
        versions={},
    )  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", render_head_card(facts), re.DOTALL)
    _bag(tmp_path)
    seen: dict = {}
    exec(code, seen)  # noqa: S102
    with torch.no_grad():
        expected = head(torch.from_numpy(seen["bag"].features)[None]).logits.softmax(-1)
    torch.testing.assert_close(seen["probabilities"], expected)
    assert seen["attention"].shape == (1, 5)
    for other in ({"encoder": "other"}, {"mpp": 0.5}):
        _bag(tmp_path, **other)
        with pytest.raises(MILError, match="not a bag for this head"):
            exec(code, {})  # noqa: S102

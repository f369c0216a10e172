"""The student in examples/xmag-lite: complete, small, and beside code that has not moved on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from xmag_hf.encoders import load_encoder
from xmag_hf.modeling import XMAGImageProcessor, XMAGLiteModel
from xmag_hf.modeling.convert import build_student
from xmag_hf.slides import open_slide


@pytest.fixture
def folder(project_root):
    return project_root / "examples" / "xmag-lite"


def test_its_code_is_the_package_s(folder, project_root):
    copies = sorted(folder.glob("*.py"))
    assert {path.name for path in copies} >= {"modeling_xmag_lite.py", "image_processing_xmag.py"}
    for copy in copies:
        original = project_root / "xmag_hf" / "modeling" / copy.name
        assert copy.read_bytes() == original.read_bytes(), f"copy {original} to {copy}"


def test_it_is_small_and_says_where_it_is_from(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000
    card = (folder / "README.md").read_text()
    assert (
        "Pathology Atlas" in card
        and "Apache-2.0" in card
        and "not a medical device" in card.lower()
    )
    run = json.loads((folder / "distillation.json").read_text())["run"]["options"]
    assert run["data_licence"] == "MIT"


def test_it_differs_from_its_start_and_embeds_tissue(folder, cmu_slide):
    trained = load_file(folder / "model.safetensors")
    start = build_student("lite").state_dict()
    assert trained.keys() == start.keys()
    moved = [name for name in trained if not torch.equal(trained[name], start[name])]
    assert len(moved) > 0.9 * sum(value.is_floating_point() for value in start.values())

    model = XMAGLiteModel.from_pretrained(folder).eval()
    processor = XMAGImageProcessor.from_pretrained(folder)
    with open_slide(cmu_slide) as slide:
        patches = [slide.read_region((x, 400.0), 224, mpp=2.0) for x in (200.0, 900.0)]
    with torch.no_grad():
        ours = model(**processor(patches, return_tensors="pt")).pooler_output.numpy()
    # The other way in, which `xmag embed` takes: same pixels, same numbers.
    encoder = load_encoder(str(folder))
    with torch.no_grad():
        theirs = encoder(torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2))
    np.testing.assert_allclose(theirs.float().numpy(), ours, atol=1e-4)

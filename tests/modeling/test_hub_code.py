"""The code that travels with the weights, in processes of its own: no xmag_hf, no prompt."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xmag_hf.modeling import (
    XMAGConfig,
    XMAGForImageClassification,
    XMAGLiteConfig,
    XMAGLiteForImageClassification,
)
from xmag_hf.modeling.convert import image_processor_for

# A finder in front of all others: whoever asks for xmag_hf gets the error that an environment
# without the package would give, however it is installed here.
WITHOUT_XMAG = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "xmag_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

REMOTE = """
import json
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
)
import torch

folder, image = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoImageProcessor.from_pretrained(folder, **trust)
pixels = processor(__import__("PIL.Image", fromlist=["open"]).open(image), return_tensors="pt")
with torch.inference_mode():
    encoder = AutoModel.from_pretrained(folder, **trust).eval()
    output = encoder(**pixels)
    classifier = AutoModelForImageClassification.from_pretrained(folder, **trust).eval()
    logits = classifier(**pixels).logits
features = pipeline("image-feature-extraction", model=folder, **trust)(image)
labels = pipeline("image-classification", model=folder, top_k=3, **trust)(image)
assert "xmag_hf" not in sys.modules
encoder.save_pretrained(folder + "/again")
print(json.dumps({
    "module": type(encoder).__module__,
    "pooled": output.pooler_output[0, :8].tolist(),
    "spatial": encoder.spatial_features(output.last_hidden_state).shape,
    "logits": logits[0].tolist(),
    "features": features[0][0][:8],
    "labels": labels,
    "again": json.load(open(folder + "/again/config.json"))["auto_map"],
}))
"""

REGISTERED = """
import sys
import json
import xmag_hf
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoImageProcessor, AutoModel, pipeline
folder, image = sys.argv[1:]
model = AutoModel.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
assert type(model).__module__.startswith("xmag_hf.modeling."), type(model)
assert type(processor).__module__.startswith("xmag_hf.modeling."), type(processor)
features = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)(image)
labels = pipeline("image-classification", model=folder, trust_remote_code=True)(image)
print(json.dumps({"features": features[0][0][:8], "labels": labels}))
"""


def run(code: str, *arguments: str, tmp_path: Path) -> dict:
    """Run `code` with stdin closed, offline, with an empty cache for remote code."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "y/N" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["vit", "lite"])
def saved(request, tmp_path_factory, cmu_pixels):
    """(folder, image, classifier, its logits and pooled vector computed here)."""
    folder = tmp_path_factory.mktemp(request.param) / "xmag"
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    if request.param == "vit":
        config = XMAGConfig(hidden_size=192, num_attention_heads=3, num_hidden_layers=2, **labels)
        model = XMAGForImageClassification(config).eval()
    else:
        model = XMAGLiteForImageClassification(XMAGLiteConfig(**labels)).eval()
    model.save_pretrained(folder)
    processor = image_processor_for(model)
    processor.save_pretrained(folder)
    image = folder.parent / "tissue.png"
    Image.fromarray(np.ascontiguousarray(cmu_pixels[800:1024, 700:924])).save(image)
    with torch.inference_mode():
        pixels = processor(Image.open(image), return_tensors="pt").pixel_values
        body = getattr(model, model.base_model_prefix)(pixels)
        logits = model(pixels).logits[0]
    return folder, image, body, logits


def test_without_the_package(saved, tmp_path):
    folder, image, body, logits = saved
    seen = run(WITHOUT_XMAG + REMOTE, str(folder), str(image), tmp_path=tmp_path)
    assert seen["module"].startswith("transformers_modules")
    width = body.pooler_output.shape[1]
    assert seen["spatial"] == [1, 16, width]
    np.testing.assert_allclose(seen["pooled"], body.pooler_output[0, :8], atol=1e-5)
    np.testing.assert_allclose(seen["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(seen["features"], body.last_hidden_state[0, 0, :8], atol=1e-5)
    scores = {entry["label"]: entry["score"] for entry in seen["labels"]}
    expected = logits.softmax(0).tolist()
    assert scores == pytest.approx(dict(zip("abc", expected, strict=True)), abs=1e-5)
    assert set(seen["again"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}


def test_after_import_xmag_hf(saved, tmp_path):
    folder, image, body, logits = saved
    seen = run(REGISTERED, str(folder), str(image), tmp_path=tmp_path)
    np.testing.assert_allclose(seen["features"], body.last_hidden_state[0, 0, :8], atol=1e-5)
    assert seen["labels"][0]["label"] == "abc"[int(logits.argmax())]


ORDERS = {
    "transformers first": "import transformers.models.auto.modeling_auto, xmag_hf",
    "model first": "from xmag_hf.modeling import XMAGLiteModel, register_auto_classes as register\n"
    "register(); register()",
}


@pytest.mark.parametrize("first", ORDERS.values(), ids=ORDERS.keys())
def test_registered_whatever_is_imported_first(first: str, tmp_path):
    code = f"""
{first}
import json
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
seen = []
for name in ("xmag", "xmag_lite"):
    config = type(AutoConfig.for_model(name))
    for mapping in (AutoModel._model_mapping, AutoModelForImageClassification._model_mapping):
        seen.append(mapping[config].__name__)
    seen.append(IMAGE_PROCESSOR_MAPPING[config]["pil"].__name__)
print(json.dumps(seen))
"""
    assert run(code, tmp_path=tmp_path) == [
        "XMAGModel",
        "XMAGForImageClassification",
        "XMAGImageProcessor",
        "XMAGLiteModel",
        "XMAGLiteForImageClassification",
        "XMAGImageProcessor",
    ]


def test_travelling_files_import_siblings_only(project_root):
    """What is copied to the Hub names neither the package nor a module outside its folder."""
    folder = project_root / "xmag_hf" / "modeling"
    stays = {"__init__.py", "convert.py", "registration.py"}
    for path in folder.glob("*.py"):
        if path.name not in stays:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not _leaves_the_folder(node), f"{path.name}, line {node.lineno}"


def _leaves_the_folder(node: ast.AST) -> bool:
    """Whether it imports the package by name, or relatively anything but a sibling file."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return node.level > 1 or node.module is None or "." in node.module
        names = [node.module or ""]
    return any(name.partition(".")[0] == "xmag_hf" for name in names)


@pytest.mark.parametrize(
    ("line", "leaves"),
    [
        ("import torch, xmag_hf.slides", True),
        ("from xmag_hf import encoders", True),
        ("from ..encoders import x", True),
        ("from . import convert", True),
        ("from .configuration_xmag import XMAGConfig", False),
        ("import xmag_hferry; from transformers import AutoModel", False),
    ],
)
def test_what_leaves_the_folder(line: str, leaves: bool):
    """The rule itself, of which the travelling files show one side only."""
    assert any(map(_leaves_the_folder, ast.walk(ast.parse(line)))) is leaves


IMPORTABLE = ["xmag_hf", "xmag_hf.modeling", "xmag_hf.modeling.modeling_xmag"]
IMPORTABLE += ["xmag_hf.modeling.modeling_xmag_lite", "xmag_hf.modeling.image_processing_xmag"]
IMPORTABLE += ["xmag_hf.modeling.convert", "xmag_hf.encoders", "xmag_hf.distillation"]
IMPORTABLE += ["xmag_hf.distillation.trainer"]


def test_imports_need_no_openslide_datasets_evaluate(tmp_path):
    """One process imports them all; transformers itself is told that they are not there."""
    code = f"""
import sys, json, importlib
for name in ("openslide", "datasets", "evaluate"):
    sys.modules[name] = None
for name in {IMPORTABLE!r}:
    importlib.import_module(name)
import xmag_hf.modeling as modeling
print(json.dumps(sorted(name for name in modeling.__all__ if getattr(modeling, name))))
"""
    assert "XMAGLiteModel" in run(code, tmp_path=tmp_path)

"""Encoder and head as one model: the memory-saving paths compute what the plain one does."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGConfig,
    XMAGForSlideClassification,
    XMAGLiteConfig,
    XMAGMeanPoolConfig,
    XMAGSlideConfig,
)
from xmag_hf.modeling.convert import image_processor_for

LABELS = {
    "id2label": {0: "no", 1: "yes", 2: "unsure"},
    "label2id": {"no": 0, "yes": 1, "unsure": 2},
}
ENCODERS = {
    "tiny": XMAGConfig(hidden_size=192, num_attention_heads=3, num_hidden_layers=4),
    "lite": XMAGLiteConfig(),
}


def model_of(kind: str, *, mean_pool: bool = False, **options) -> XMAGForSlideClassification:
    """In float64, with running statistics and layer scales away from where they start."""
    encoder = ENCODERS[kind]
    torch.manual_seed(0)
    widths = {"embed_dim": encoder.hidden_size, "hidden_dim": 16, "dropout": 0.0, **LABELS}
    head = XMAGMeanPoolConfig(**widths) if mean_pool else XMAGABMILConfig(attention_dim=8, **widths)
    model = XMAGForSlideClassification(
        XMAGSlideConfig(encoder_config=encoder, head_config=head, **options)
    )
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += torch.rand(buffer.shape, generator=generator) / 4
    return model.double()


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, 3, 224, 224, generator=generator, dtype=torch.float64)


def gradients(model: XMAGForSlideClassification, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ENCODERS)
def test_chunked_checkpointed_and_cached_gradients_are_the_plain_ones(kind: str):
    """Float64, training mode; the plain path is the encoder's own forward on all patches at once.

    The mean-pool head keeps float64 throughout; attention weights are float32 by design.
    """
    model = model_of(kind, mean_pool=True, chunk_size=2).train()
    x, weights = pixels(1, 5), torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)

    features = model.encoder(x[0]).pooler_output[None]
    plain = model.head(features)
    expected = gradients(model, (plain.logits * weights).sum())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert expected.keys() == dict(model.named_parameters()).keys() - frozen
    assert any(n.startswith("encoder.") for n in expected) and frozen

    kept = model.frozen(x[0])
    assert not kept.requires_grad
    for output in (model(x), model(frozen_states=kept[None])):
        torch.testing.assert_close(output.logits, plain.logits, rtol=1e-12, atol=1e-12)
        actual = gradients(model, (output.logits * weights).sum())
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (actual[name] - gradient).abs().max() <= 1e-10 * scale, name


@pytest.mark.parametrize("kind", ENCODERS)
def test_training_leaves_frozen_stages_and_statistics_alone(kind: str):
    model = model_of(kind, chunk_size=2).float().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pixels(1, 3).float(), labels=torch.tensor([2])).loss.backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    frozen = {id(p) for module in model.frozen_modules() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.") and parameter.ndim >= 2:
            assert (name in changed) == (id(parameter) not in frozen), name
    assert not any("running_" in name or "num_batches" in name for name in changed)


def test_a_slide_does_not_depend_on_its_neighbours_padding():
    model = model_of("tiny", chunk_size=2).eval()
    x = pixels(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    together = model(x, mask)
    alone = model(x[1:, :1])
    torch.testing.assert_close(together.logits[1], alone.logits[0], rtol=1e-6, atol=1e-7)
    assert together.attentions[1].tolist() == [1.0, 0.0, 0.0]
    x[1, 1:] = torch.nan
    assert torch.equal(model(x, mask).logits, together.logits)


@pytest.mark.parametrize(
    ("kind", "frozen_stages", "trained"),
    [("tiny", None, 2), ("tiny", 0, 4), ("tiny", 4, 0), ("lite", None, 2), ("lite", 0, 7)],
)
def test_frozen_stages_count_from_the_input(kind: str, frozen_stages: int | None, trained: int):
    model = model_of(kind, frozen_stages=frozen_stages)
    encoder = model.encoder
    stages = encoder.backbone.blocks if kind == "lite" else encoder.encoder.layer
    first = encoder.backbone.conv_stem if kind == "lite" else encoder.embeddings
    last = encoder.backbone.conv_head if kind == "lite" else encoder.layernorm
    learns = [all(p.requires_grad for p in stage.parameters()) for stage in stages]
    assert learns == [False] * (len(stages) - trained) + [True] * trained
    assert all(p.requires_grad == (frozen_stages == 0) for p in first.parameters())
    assert all(p.requires_grad for p in last.parameters())


def test_bad_parts_and_inputs_are_named():
    tiny = ENCODERS["tiny"]
    with pytest.raises(ValueError, match="embed_dim=64.*hidden_size=192"):
        XMAGSlideConfig(encoder_config=tiny, head_config=XMAGABMILConfig(embed_dim=64))
    with pytest.raises(ValueError, match="frozen_stages=5 .* 0 to 4"):
        XMAGSlideConfig(encoder_config=tiny, frozen_stages=5)
    with pytest.raises(ValueError, match="model_type='vit'"):
        XMAGSlideConfig(encoder_config={"model_type": "vit"})
    model = model_of("tiny")
    with pytest.raises(ValueError, match="one of the two"):
        model()
    with pytest.raises(ValueError, match=r"expected \(B, M, 3, H, W\)"):
        model(pixels(2))
    with pytest.raises(ValueError, match="112 x 112 px"):
        model(pixels(1, 1)[..., :112, :112])


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_saved_folder_holds_all_of_it(kind: str, tmp_path: Path):
    model = model_of(kind, frozen_stages=1).float().eval()
    model.config.head_config.encoder_revision = "sha256:0"
    model.save_pretrained(tmp_path)
    again = XMAGForSlideClassification.from_pretrained(tmp_path).eval()
    x = pixels(1, 2).float()
    assert torch.equal(again(x).logits, model(x).logits)
    assert again.config.frozen_stages == 1 and again.config.id2label == LABELS["id2label"]
    assert again.config.encoder_revision == "sha256:0"  # the head's, for who checks a bag
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_xmag_slide.XMAGSlideConfig",
        "AutoModel": "modeling_xmag_slide.XMAGForSlideClassification",
    }


@pytest.mark.parametrize("placed", [{}, {"device_map": "auto"}])
@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_frozen_is_frozen_after_loading(kind: str, placed: dict, tmp_path: Path):
    model = model_of(kind, frozen_stages=1).float()
    model.save_pretrained(tmp_path)
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert set(learns.values()) == {False, True}
    for loader in (XMAGForSlideClassification, AutoModel):
        again = loader.from_pretrained(tmp_path, **placed)
        assert {name: p.requires_grad for name, p in again.named_parameters()} == learns
        assert all(torch.equal(p.cpu(), model.state_dict()[n]) for n, p in again.named_parameters())


@pytest.mark.parametrize("wanted", ["eager", "sdpa"])
def test_the_attention_asked_for_is_the_encoders(wanted: str, tmp_path: Path, monkeypatch):
    """Counted where torch computes it: eager attention takes no fused kernel."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    plain = model_of("tiny").float().eval()
    plain.save_pretrained(tmp_path)
    x = pixels(1, 2).float()
    expected = plain(x).logits
    assert len(calls) == 4  # one a block: without a word, the fused kernel
    loaded = XMAGForSlideClassification.from_pretrained(tmp_path, attn_implementation=wanted)
    turned = XMAGForSlideClassification.from_pretrained(tmp_path)
    turned.set_attn_implementation("eager" if wanted == "sdpa" else "sdpa")
    turned.set_attn_implementation(wanted)
    for model in (loaded, turned):
        calls.clear()
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-4)
        assert len(calls) == (4 if wanted == "sdpa" else 0)


def test_an_encoder_keeps_its_own_attention_where_none_is_asked_for():
    encoder = XMAGConfig(hidden_size=192, num_attention_heads=3, num_hidden_layers=1)
    encoder._attn_implementation = "eager"
    model = XMAGForSlideClassification(XMAGSlideConfig(encoder_config=encoder))
    assert model.encoder.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ENCODERS)
def test_layers_that_checkpoint_too_leave_gradients_as_they_are(kind: str):
    x, results = pixels(1, 3), []
    for enabled in (False, True):
        model = model_of(kind, mean_pool=True, chunk_size=2).train()
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        results.append(gradients(model, model(x).logits.square().sum()))
    assert results[0].keys() == results[1].keys() and any("encoder" in n for n in results[0])
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-10, atol=1e-14, msg=name)


REMOTE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "xmag_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
pixels = processor(torch.load(sys.argv[2]), return_tensors="pt").pixel_values
with torch.no_grad():
    torch.save(dict(model(pixel_values=pixels[None])), sys.argv[3])
"""


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_folder_loads_without_the_package(kind: str, tmp_path: Path):
    folder, given, made = (tmp_path / name for name in ("model", "given.pt", "made.pt"))
    model = model_of(kind).float().eval()
    processor = image_processor_for(model.encoder)
    for part in (model, processor):
        part.save_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (2, 3, 224, 224), generator=generator, dtype=torch.uint8)
    torch.save(images, given)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", REMOTE, str(folder), str(given), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = model(pixel_values=processor(images, return_tensors="pt").pixel_values[None])
    there = torch.load(made)
    torch.testing.assert_close(there["logits"], here.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(there["attentions"], here.attentions, atol=1e-5, rtol=1e-5)

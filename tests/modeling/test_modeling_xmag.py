"""XMAG against timm's ViT and transformers' DINOv2, and what it returns."""

import copy

import pytest
import timm
import torch
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Config, Dinov2Model

from xmag_hf.modeling import (
    XMAGConfig,
    XMAGForImageClassification,
    XMAGLiteConfig,
    XMAGLiteModel,
    XMAGModel,
)
from xmag_hf.modeling.convert import convert_checkpoint

SIZES = ["tiny", "small", pytest.param("base", marks=pytest.mark.slow)]
HEADS = {"base": (768, 12), "small": (384, 6), "tiny": (192, 3)}


def shaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its start: zeros and ones would hide a swapped tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def small_config(**fields) -> XMAGConfig:
    shape = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 2}
    return XMAGConfig(**shape, **fields)


def images(count: int = 1, side: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def tiny() -> XMAGModel:
    return shaken(XMAGModel(XMAGConfig("tiny")))


@pytest.mark.parametrize("size", SIZES)
def test_parity_with_timm(size: str, tmp_path):
    width, heads = HEADS[size]
    reference = shaken(
        timm.create_model(
            "vit_small_patch14_dinov2",
            pretrained=False,
            img_size=224,
            embed_dim=width,
            num_heads=heads,
        )
    )
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    model = convert_checkpoint(tmp_path / "timm.pth", size)
    with torch.inference_mode():
        expected = reference.forward_features(images())
        output = model(images())
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.pooler_output, expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_parity_with_transformers(size: str, tmp_path):
    width, heads = HEADS[size]
    config = Dinov2Config(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=12, image_size=224
    )
    config._attn_implementation = "eager"
    reference = shaken(Dinov2Model(config))
    reference.save_pretrained(tmp_path)
    model = convert_checkpoint(tmp_path, size)
    model.set_attn_implementation("eager")
    ask = {"output_hidden_states": True, "output_attentions": True}
    with torch.inference_mode():
        expected = reference(images(), **ask)
        output = model(images(), **ask)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, **close)
    assert len(output.hidden_states) == len(expected.hidden_states) == 13
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    assert output.attentions[0].shape == (1, heads, 257, 257)
    for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_parameter_counts():
    with torch.device("meta"):
        counts = {
            size: sum(p.numel() for p in XMAGModel(XMAGConfig(size)).parameters()) / 1e6
            for size in HEADS
        }
        counts["lite"] = sum(p.numel() for p in XMAGLiteModel(XMAGLiteConfig()).parameters()) / 1e6
    table = {"base": 85.7, "small": 21.6, "tiny": 5.5, "lite": 3.4}
    assert counts == pytest.approx(table, abs=0.1)


def test_spatial_features_follow_the_image(tiny: XMAGModel):
    """Sixteen cells of 56 px, each with its own grey: cell i must see sub-patch i, row-major.

    With blocks that add nothing and a patch embedding that is the mean colour, token = grey.
    """
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.layer_scale1.lambda1.zero_()
            layer.layer_scale2.lambda1.zero_()
        model.embeddings.position_embeddings.zero_()
        projection = model.embeddings.patch_embeddings.projection
        projection.weight.fill_(1 / projection.weight[0].numel())
        projection.bias.zero_()
    model.layernorm = torch.nn.Identity()
    image = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(1, 3, 1, 1)
    image = image.repeat_interleave(56, 2).repeat_interleave(56, 3)
    spatial = model.spatial_features(model(image).last_hidden_state)
    assert spatial.shape == (1, 16, 192)
    expected = torch.arange(16.0)[None, :, None].expand(1, 16, 192)
    torch.testing.assert_close(spatial, expected, atol=1e-4, rtol=0)


def test_spatial_features_average_four_by_four_tokens(tiny: XMAGModel):
    tokens = torch.randn(2, 257, 192)
    spatial = tiny.spatial_features(tokens)
    for row in range(4):
        for column in range(4):
            members = [
                1 + 16 * y + x
                for y in range(4 * row, 4 * row + 4)
                for x in range(4 * column, 4 * column + 4)
            ]
            expected = tokens[:, members].mean(1)
            torch.testing.assert_close(spatial[:, 4 * row + column], expected)
    with pytest.raises(ValueError, match="255 patch tokens"):
        tiny.spatial_features(tokens[:, :256])


def test_other_inputs_are_refused_unless_asked_for(tiny: XMAGModel):
    with pytest.raises(ValueError, match="252 x 252 px.*224.*interpolate_pos_encoding"):
        tiny(images(side=252))
    with pytest.raises(ValueError, match="250 x 250 px are not multiples of 14"):
        tiny(images(side=250), interpolate_pos_encoding=True)
    oblong = torch.zeros(1, 3, 448, 112)  # 32 x 8 tokens: as many as a square of 16 x 16
    with pytest.raises(ValueError, match="448 x 112 px are not square"):
        tiny(oblong, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        tiny(images()[0])
    config = Dinov2Config(hidden_size=192, num_attention_heads=3, image_size=224)
    reference = Dinov2Model(config).eval()
    embeddings = copy.deepcopy(tiny.embeddings.state_dict())
    reference.embeddings.load_state_dict(embeddings, strict=False)
    ours = tiny.embeddings(images(side=252))
    output = tiny(images(side=252), interpolate_pos_encoding=True)
    assert output.last_hidden_state.shape == (1, 1 + 18 * 18, 192)
    torch.testing.assert_close(ours, reference.embeddings(images(side=252)))


def test_attention_implementations_agree(tiny: XMAGModel):
    model = copy.deepcopy(tiny)
    states = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.encoder.layer[0].attention.config._attn_implementation == name
        states[name] = model(images()).last_hidden_state
    torch.testing.assert_close(states["sdpa"], states["eager"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'sdpa' attention keeps no weights.*eager"):
        model(images(), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_full(tiny: XMAGModel, dtype: torch.dtype):
    full = tiny(images()).pooler_output
    half = copy.deepcopy(tiny).to(dtype)(images().to(dtype)).pooler_output
    assert half.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(full, half.float())
    assert cosine.item() > 0.999


def test_gradient_checkpointing_changes_nothing(tiny: XMAGModel):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(tiny).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.encoder.layer)
        model(images(2)).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def test_drop_path_acts_in_training_only():
    model = shaken(XMAGModel(small_config(drop_path_rate=0.5)))
    assert torch.equal(model(images()).pooler_output, model(images()).pooler_output)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        passes = {model(images()).pooler_output[0, 0].item() for _ in range(8)}
    assert len(passes) > 1


@pytest.mark.parametrize("config", [XMAGConfig("tiny"), XMAGLiteConfig()], ids=["vit", "lite"])
def test_auto_classes_round_trip(config, tmp_path):
    model = shaken(AutoModel.from_config(config))
    model.save_pretrained(tmp_path / "encoder")
    loaded, report = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[name], read[name]) for name in saved)

    labels = {0: "stroma", 1: "tumour", 2: "fat"}
    classifier = AutoModelForImageClassification.from_pretrained(
        tmp_path / "encoder", id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    assert again.config.id2label == labels
    body = AutoModel.from_pretrained(tmp_path / "classifier").eval()
    pixels = images(2)
    logits = again(pixels).logits
    expected = body(pixels).pooler_output @ again.classifier.weight.T + again.classifier.bias
    torch.testing.assert_close(logits, expected)


def test_classification_loss_is_cross_entropy():
    model = XMAGForImageClassification(small_config(num_labels=3)).eval()
    labels = torch.tensor([2, 0])
    output = model(images(2), labels=labels)
    probabilities = output.logits.double().softmax(1)
    expected = -probabilities[torch.arange(2), labels].log().mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(images(2), return_dict=False)[0].shape == (2, 3)

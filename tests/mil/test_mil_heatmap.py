"""Heatmaps on the small CMU slide: means over overlapping patches, QuPath's fields, pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from scipy.stats import percentileofscore
from shapely.geometry import shape
from shapely.ops import unary_union
from tiled_tiff import write_tiff

from xmag_hf.cli.main import main
from xmag_hf.embedding import Bag, BagInfo, read_bag, write_bag
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.heatmap import HeatmapOptions, draw_heatmap, spread_top
from xmag_hf.mil.heatmap_pictures import (
    OPACITY,
    colour_scale,
    draw_overlay,
    pixel_means,
)
from xmag_hf.mil.qupath import qupath_geojson
from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGABMILModel,
    XMAGConfig,
    XMAGForSlideClassification,
    XMAGMeanPoolConfig,
    XMAGMeanPoolModel,
    XMAGSlideConfig,
)
from xmag_hf.reporting.scale_bar import length_text, scale_bar_um
from xmag_hf.slides import open_slide

MPP0 = 0.499  # of the CMU slide


@dataclass(frozen=True)
class Prediction:
    probabilities: np.ndarray
    attentions: np.ndarray
    label: str = "malignant"


def overlapping_grid(stride: int, width: float, size: tuple[int, int]) -> np.ndarray:
    xs, ys = (np.arange(0, n - width + 1, stride) for n in size)
    return np.array([(x, y) for y in ys for x in xs], dtype=np.int64)


def test_pixel_means_agree_with_counting_level0_pixels() -> None:
    """Level-0 pixels: sum and number of covering patches; picture pixels: sums over 5 x 5."""
    rng = np.random.default_rng(0)
    size, width, pixel = (300, 200), 64, 5
    coords = overlapping_grid(27, width, size)
    values = rng.random(len(coords))
    total, count = np.zeros(size[::-1]), np.zeros(size[::-1])
    for (x, y), value in zip(coords, values, strict=True):
        total[y : y + width, x : x + width] += value
        count[y : y + width, x : x + width] += 1
    assert count.max() >= 9  # 64 / 27: up to three each way
    blocks = [a.reshape(40, 5, 60, 5).sum(axis=(1, 3)) for a in (total, count)]
    means, covered = pixel_means(coords, width, values, pixel, (40, 60))
    seen = blocks[1] > 0
    assert (np.isnan(means) == ~seen).all()
    assert means[seen] == pytest.approx(blocks[0][seen] / blocks[1][seen], rel=1e-12)
    assert covered == pytest.approx(np.minimum(blocks[1] / 25, 1), abs=1e-12)


def test_neighbours_of_fractional_width_leave_no_seam() -> None:
    """A grid rounded to level-0 pixels at a scale where no edge falls on a picture pixel."""
    width = 896 / 1.0088
    starts = np.rint(np.arange(4) * width).astype(np.int64)
    coords = np.array([(x, y) for y in starts for x in starts])
    means, covered = pixel_means(coords, width, np.full(16, 7.0), 12.3, (288, 288))
    inside = covered[1:-1, 1:-1]
    assert means[1:-1, 1:-1] == pytest.approx(7, rel=1e-12)
    # Rounded starts part neighbours by less than a level-0 pixel each way.
    assert inside.min() > (1 - 1 / 12.3) ** 2


def test_geojson_is_what_qupath_reads() -> None:
    """Fields as QuPath reads them since v0.4, and areas by shapely.

    qupath-core/src/main/java/qupath/lib/io/PathObjectTypeAdapters.java (github.com/qupath/qupath):
    `id` must parse as a UUID; `properties` with objectType one of annotation, detection, tile,
    cell, tmaCore, root; name a string; color an array of three integers; isLocked a boolean;
    measurements an object of numbers. Coordinates are pixels of the full image, origin top left
    (qupath.readthedocs.io, "Exporting annotations").
    """
    coords = overlapping_grid(100, 150, (460, 330))
    attention = np.random.default_rng(0).dirichlet(np.ones(len(coords)))
    colours = np.arange(3 * len(coords), dtype=np.uint8).reshape(-1, 3)
    size = (340, 330)  # the last column of tiles reaches past it
    text = qupath_geojson(
        "s", coords, 150.4, attention, colours, size_level0=size, about={"head": "h"}
    )
    collection = json.loads(text)
    assert collection["type"] == "FeatureCollection"
    features = collection["features"]
    assert len(features) == len(coords) == len({f["id"] for f in features})
    for number, feature in enumerate(features):
        assert feature["type"] == "Feature"
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        properties = feature["properties"]
        assert properties["objectType"] == "tile" and properties["isLocked"] is True
        assert properties["name"] == f"patch {number}"
        assert properties["color"] == colours[number].tolist()
        measured = properties["measurements"]
        assert measured["Attention"] == attention[number]
        assert measured["Attention x patches"] == pytest.approx(attention[number] * len(coords))
        share = percentileofscore(attention, attention[number], kind="mean")
        assert measured["Attention percentile"] == pytest.approx(share)
        polygon = shape(feature["geometry"])
        x, y = coords[number]
        expected = (x, y, min(x + 150.4, 340), min(y + 150.4, 330))
        assert polygon.is_valid and polygon.bounds == pytest.approx(expected)
        assert polygon.area == pytest.approx((expected[2] - x) * (expected[3] - y))
        assert feature["geometry"]["coordinates"][0][0] == feature["geometry"]["coordinates"][0][-1]
    whole = unary_union([shape(feature["geometry"]) for feature in features])
    assert whole.bounds == pytest.approx((0, 0, 340, 250.4))
    assert whole.area == pytest.approx(340 * 250.4)
    neighbours = [shape(features[n]["geometry"]) for n in (0, 1)]
    assert neighbours[0].intersection(neighbours[1]).area == pytest.approx(50.4 * 150.4)


def test_geojson_counts_from_the_scanned_areas_corner(bag: Bag, cmu_slide: Path) -> None:
    """QuPath's OpenSlideImageServer reads tile (x, y) at (x + bounds-x, y + bounds-y)."""
    prediction = Prediction(np.array([0.5, 0.5]), np.arange(1, 8) / 28)
    with open_slide(cmu_slide) as slide:
        slide.origin_xy = (40, 300)
        made = draw_heatmap(slide, bag, prediction, HeatmapOptions(top=0))
    collection = json.loads(made[".geojson"])
    assert collection["xmag"]["origin_level0"] == [40, 300]
    for (x, y), feature in zip(bag.coords.tolist(), collection["features"], strict=True):
        left, top = shape(feature["geometry"]).bounds[:2]
        assert (left + 40, top + 300) == (x, y)


@pytest.fixture
def bag() -> Bag:
    """Six patches of 448 um beside each other on the CMU slide, and one half over another."""
    side = 224 * 2.0 / MPP0
    starts = np.rint(np.array([(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]) * side)
    coords = np.concatenate([starts, [[449, 0]]]).astype(np.int64)
    info = BagInfo(encoder="e", mpp=2.0, patch_px=224, mpp0=MPP0, overlap=0)
    return Bag("cmu", np.zeros((7, 4), np.float32), coords, info)


def test_files_of_a_slide(bag: Bag, cmu_slide: Path) -> None:
    attention = np.array([0.05, 0.05, 0.1, 0.1, 0.1, 0.2, 0.4])
    prediction = Prediction(np.array([0.25, 0.75]), attention)
    with open_slide(cmu_slide) as slide:
        made = draw_heatmap(slide, bag, prediction, HeatmapOptions(top=3), {"head": "h"})
        overview, _ = slide.thumbnail(2.0)
    assert list(made) == [".png", ".geojson", "-top.png"]
    collection = json.loads(made[".geojson"])
    assert len(collection["features"]) == 7
    assert collection["xmag"] == {"head": "h", "label": "malignant"}
    # Colours follow attention: patch 6 has the brightest of viridis.
    brightest = [round(255 * part) for part in colormaps["viridis"](1.0)[:3]]
    assert collection["features"][6]["properties"]["color"] == pytest.approx(brightest, abs=1)
    with Image.open(io.BytesIO(made[".png"])) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert picture.text["head"] == "h"  # type: ignore[attr-defined]
    height, width = overview.shape[:2]
    left, bottom = 15, pixels.shape[0] - 15
    shown = pixels[bottom - height : bottom, left : left + width].astype(int)
    # Right of the patches there is nothing but the slide.
    bare = np.s_[100:300, width - 80 : width - 10]
    assert np.abs(shown[bare] - overview[bare]).max() <= 1
    # In patch 5 alone (away from numbers and outlines): half colour, half slide.
    inside = np.s_[520:600, 280:400]
    colour = 255 * np.array(colormaps["viridis"](0.2 / 0.4)[:3])
    expected = overview[inside] * (1 - OPACITY) + colour * OPACITY
    assert np.abs(shown[inside] - expected).max() <= 2


def test_contact_sheet_shows_each_place_once() -> None:
    coords = np.array([[0, 0], [30, 0], [100, 0], [160, 0], [300, 300]])
    attention = np.array([0.3, 0.35, 0.2, 0.1, 0.05])
    # 0 shares 70% with 1; 3 shares 40% with 2; 2 shares 30% with 1.
    assert spread_top(coords, 100, attention, 5).tolist() == [1, 3, 4]
    assert spread_top(coords, 100, attention, 1).tolist() == [1]
    # Side by side, nothing is shared.
    assert spread_top(coords[[0, 2, 4]], 100, attention[:3], 5).tolist() == [1, 0, 2]


def test_scale_bar_is_as_long_as_it_says() -> None:
    for width_um, length in ((5160, 1000), (900, 200), (41, 10), (8000, 2000), (199, 20)):
        assert scale_bar_um(width_um) == length
    assert [length_text(um) for um in (200, 1000, 5000)] == ["200 \u00b5m", "1 mm", "5 mm"]
    white = np.full((400, 600, 3), 255, np.uint8)
    values = np.full((400, 600), np.nan)
    scale = colour_scale(np.array([0.0, 1.0]), "attention")
    png = draw_overlay(white, values, np.zeros((400, 600)), scale, pixel_um=2.5, title="t")
    with Image.open(io.BytesIO(png)) as picture:
        grey = np.asarray(picture.convert("L"))[-15 - 400 : -15, 15:615]
    black = (grey < 60).sum(axis=1)
    assert black[-25:].max() == pytest.approx(200 / 2.5, abs=2)  # a quarter of 1500 um: 200 um


def test_one_outlier_does_not_hide_the_rest() -> None:
    few, many = np.append(np.ones(50), 900.0), np.append(np.ones(500), 900.0)
    assert colour_scale(few, "").high == 900 and not colour_scale(few, "").cut
    assert colour_scale(many, "").high == 1 and colour_scale(many, "").cut
    lone = np.append(np.zeros(500), 1.0)
    assert colour_scale(lone, "").high == 1


def test_what_cannot_be_drawn_is_refused(bag: Bag, cmu_slide: Path) -> None:
    even = Prediction(np.array([0.5, 0.5]), np.full(7, 1 / 7))
    uneven = Prediction(np.array([0.5, 0.5]), np.arange(7) / 21)
    far = Bag("cmu", bag.features, bag.coords + 5000, bag.info)
    unsized = Bag("cmu", bag.features, bag.coords)
    with open_slide(cmu_slide) as slide:
        for given, prediction, message in (
            (bag, even, "attention is the same on all 7 patches"),
            (far, uneven, "7 patches start outside the slide of 2220 x 2967 px"),
            (unsized, uneven, "does not say how large"),
        ):
            with pytest.raises(MILError, match=message):
                draw_heatmap(slide, given, prediction, HeatmapOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("top", -1), ("scale", "log"), ("longest_px", 10)])
def test_options_out_of_range_are_named(option: str, value) -> None:
    with pytest.raises(MILError, match=f"{option}={value!r}"):
        HeatmapOptions(**{option: value})


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, cmu_pixels: np.ndarray) -> Path:
    """A folder of a slide, its bag by a random encoder, and a head for such bags."""
    tmp_path = tmp_path_factory.mktemp("embedded")
    slides = tmp_path / "slides"
    slides.mkdir()
    write_tiff(slides / "tissue.tif", [cmu_pixels[200:2100, 300:2100]], mpp=0.5)
    names = [str(slides / "tissue.tif"), "--model", "random:tiny"]
    assert (
        main(["embed", *names, "--out", str(tmp_path / "bags"), "--overlap", "112", "--quiet"]) == 0
    )
    bag = read_bag(tmp_path / "bags" / "tissue.h5")
    torch.manual_seed(0)
    config = XMAGABMILConfig(
        embed_dim=192, hidden_dim=8, attention_dim=4, **bag.identity,
        id2label={0: "benign", 1: "malignant"}, label2id={"benign": 0, "malignant": 1},
    )  # fmt: skip
    XMAGABMILModel(config).save_pretrained(tmp_path / "head")
    return tmp_path


@pytest.fixture
def embedded(made_once: Path, tmp_path: Path) -> Path:
    """A copy to work in."""
    return Path(shutil.copytree(made_once, tmp_path / "copy"))


def run_heatmap(folder: Path, *more: str) -> int:
    slides = str(folder / "slides")
    head, out = str(folder / "head"), str(folder / "maps")
    return main(["heatmap", slides, "--head", head, "--out", out, "--top", "2", "--quiet", *more])


def test_command_on_a_stored_bag(embedded: Path, capsys, monkeypatch) -> None:
    """Nothing is encoded again, and the attention is the head's."""
    monkeypatch.setattr("xmag_hf.embedding.embed.embed_slides", pytest.fail)
    assert run_heatmap(embedded, "--bags", str(embedded / "bags")) == 0
    bag = read_bag(embedded / "bags" / "tissue.h5")
    model = XMAGABMILModel.from_pretrained(embedded / "head").eval()
    with torch.no_grad():
        output = model(torch.from_numpy(bag.features.astype(np.float32))[None])
    collection = json.loads((embedded / "maps" / "tissue.geojson").read_text())
    found = [f["properties"]["measurements"]["Attention"] for f in collection["features"]]
    assert len(found) > 5
    assert found == pytest.approx(output.attentions[0].numpy(), rel=1e-5)
    share, label = output.logits[0].softmax(0).max(0)
    name = ["benign", "malignant"][int(label)]
    assert f"tissue: {name} {share:.3f}, {len(found)} patches" in capsys.readouterr().out
    with Image.open(embedded / "maps" / "tissue-top.png") as sheet:
        assert sheet.width > 2 * 200


def test_a_map_of_what_is_left_of_a_slide_says_so(embedded: Path, capsys) -> None:
    path = embedded / "bags" / "tissue.h5"
    bag = read_bag(path)
    write_bag(
        path, dataclasses.replace(bag, info=dataclasses.replace(bag.info, unreadable_patches=4))
    )
    assert run_heatmap(embedded, "--bags", str(embedded / "bags")) == 1
    printed = capsys.readouterr().out
    assert "tissue: 4 patches could not be decoded" in printed
    assert str(embedded / "maps" / "tissue.png") in printed
    assert (embedded / "maps" / "tissue.png").is_file()


@pytest.mark.parametrize("kind", ["head", "end to end"])
def test_a_head_without_attention_is_refused_before_anything_is_embedded(
    embedded: Path, kind: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("xmag_hf.embedding.embed_slides", pytest.fail)
    config = XMAGMeanPoolConfig(embed_dim=192)
    shutil.rmtree(embedded / "head")
    if kind == "head":
        XMAGMeanPoolModel(config).save_pretrained(embedded / "head")
    else:
        slide_config = XMAGSlideConfig(encoder_config=XMAGConfig(size="tiny"), head_config=config)
        XMAGForSlideClassification(slide_config).save_pretrained(embedded / "head")
    assert run_heatmap(embedded, "--model", "random:tiny") == 1
    told = capsys.readouterr().err
    assert f"--head {embedded / 'head'}: a mean-pool head" in told and "ABMIL" in told
    assert not (embedded / "maps").exists()


def test_command_embeds_what_has_no_bag(embedded: Path, capsys) -> None:
    """What has no bag needs the head's encoder; without --bags bags are kept beside the maps."""
    assert run_heatmap(embedded, "--bags", str(embedded / "bagz")) == 1
    told = capsys.readouterr().err
    assert f"tissue: no bag in {embedded / 'bagz'}, which is not there" in told
    assert "--model" in told
    glass = np.full((1000, 1000, 3), 242, np.uint8)
    write_tiff(embedded / "slides" / "glass.tif", [glass], mpp=0.5)
    assert run_heatmap(embedded, "--model", "random:tiny", "--overlap", "112") == 0
    printed = capsys.readouterr().out
    assert "no_tissue: glass" in printed and "tissue: " in printed
    made, kept = (read_bag(embedded / n / "tissue.h5") for n in ("maps/bags", "bags"))
    assert (made.coords == kept.coords).all()
    assert not (embedded / "maps" / "glass.png").exists()


def test_command_embeds_a_plain_image_as_told(embedded: Path, cmu_pixels, capsys) -> None:
    """What `xmag embed` needs to know of a slide, a slide without a bag can be given here."""
    image = embedded / "image.png"
    Image.fromarray(cmu_pixels[200:1700, 300:1800]).save(image)
    command = ["heatmap", str(image), "--head", str(embedded / "head"), "--model", "random:tiny"]
    command += ["--out", str(embedded / "maps"), "--quiet"]
    assert main(command) == 1
    assert "--slide-mpp" in capsys.readouterr().out
    assert main([*command, "--slide-mpp", "0.5", "--device", "cuda:77"]) == 1
    assert "--device cuda:77" in capsys.readouterr().err
    assert main([*command, "--slide-mpp", "0.5", "--device", "cpu", "--batch-size", "2"]) == 0
    assert read_bag(embedded / "maps" / "bags" / "image.h5").info.mpp0 == 0.5
    assert (embedded / "maps" / "image.png").is_file()


def test_command_opens_a_plain_image_with_a_bag_from_elsewhere(embedded: Path, capsys) -> None:
    """A bag that knows no um/px of level 0, but its patches' width; the image knows none either."""
    bag = read_bag(embedded / "bags" / "tissue.h5")
    with open_slide(embedded / "slides" / "tissue.tif") as slide:
        width, height = slide.size_level0
        pixels = slide.read_stored(0, (0, 0), (width, height))
    Image.fromarray(pixels).save(embedded / "scan.png")
    side = bag.info.width_level0
    unknown = {"mpp0": None, "slide_sha256_head": None, "patch_size_level0": side}
    info = dataclasses.replace(bag.info, **unknown)
    write_bag(embedded / "bags" / "scan.h5", dataclasses.replace(bag, slide_id="scan", info=info))
    command = ["heatmap", str(embedded / "scan.png"), "--head", str(embedded / "head")]
    command += ["--bags", str(embedded / "bags"), "--out", str(embedded / "maps"), "--quiet"]
    assert main(command) == 1
    assert "--slide-mpp" in capsys.readouterr().out
    assert main([*command, "--slide-mpp", "0.5"]) == 0
    assert run_heatmap(embedded, "--bags", str(embedded / "bags")) == 0
    ours, theirs = (
        json.loads((embedded / "maps" / f"{name}.geojson").read_text())["features"]
        for name in ("scan", "tissue")
    )
    places = [[f["geometry"]["coordinates"] for f in features] for features in (ours, theirs)]
    assert places[0] == places[1]


def test_a_bag_of_another_file_or_encoder_fails_alone(embedded: Path, capsys, cmu_pixels) -> None:
    write_tiff(embedded / "slides" / "twin.tif", [cmu_pixels[100:1100, 700:1800]], mpp=0.5)
    twin = embedded / "bags" / "twin.h5"
    twin.write_bytes((embedded / "bags" / "tissue.h5").read_bytes())
    assert run_heatmap(embedded, "--bags", str(embedded / "bags")) == 1
    printed = capsys.readouterr().out
    assert "failed: twin: the bag was made from another file" in printed
    assert (embedded / "maps" / "tissue.png").is_file()
    assert not (embedded / "maps" / "twin.png").exists()
    bag = read_bag(embedded / "bags" / "tissue.h5")
    other = dataclasses.replace(bag.info, encoder="phikon")
    write_bag(twin, dataclasses.replace(bag, slide_id="twin", info=other))
    assert run_heatmap(embedded, "--bags", str(embedded / "bags")) == 1
    assert "'phikon'" in capsys.readouterr().out

"""Geometry of patches, plans against a brute-force count, and annotations."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from tiled_tiff import write_tiff

from xmag_hf.embedding.annotation import AnnotationError, annotated_tissue
from xmag_hf.embedding.options import EmbedError, EmbedOptions
from xmag_hf.embedding.plan import Overview, no_tissue_reason, patch_geometry, plan_slide
from xmag_hf.embedding.preview import (
    GRID,
    LINE_PX,
    OUTLINE,
    PADDED,
    UNREADABLE,
    draw_preview,
)
from xmag_hf.embedding.sources import SlideSource
from xmag_hf.encoders import ENCODERS
from xmag_hf.slides import TissueMask, open_slide


@pytest.mark.parametrize(
    ("name", "options", "patch_px", "mpp", "input_mpp", "inset"),
    [
        ("uni", {}, 224, 0.5, 0.5, 0),
        ("uni2-h", {}, 256, 0.5, 128 / 224, 0),
        ("phikon", {"mpp": 1.0}, 256, 1.0, 256 / 224, 0),
        ("gigapath", {}, 256, 0.5, 0.5, 16),
        ("gigapath", {"patch_px": 448}, 448, 0.5, 1.0, 0),
        ("resnet50", {"mpp": 2.0}, 224, 2.0, 2.0, 0),
    ],
)
def test_geometry_is_what_the_field_cuts(name, options, patch_px, mpp, input_mpp, inset):
    geometry = patch_geometry(ENCODERS[name], EmbedOptions(**options))
    assert (geometry.patch_px, geometry.mpp, geometry.input_px) == (patch_px, mpp, 224)
    assert geometry.input_mpp == pytest.approx(input_mpp, rel=1e-12)
    assert geometry.inset_px == inset


def test_no_scale_and_too_much_overlap():
    with pytest.raises(EmbedError, match="resnet50 has no um/px"):
        patch_geometry(ENCODERS["resnet50"], EmbedOptions())
    with pytest.raises(EmbedError, match="256 px"):
        patch_geometry(ENCODERS["phikon"], EmbedOptions(overlap=256))
    for wrong in (
        {"mpp": 0.0},
        {"tissue": 2.0},
        {"mpp": float("inf")},
        {"overlap": -1},
        {"pooling": "max"},
    ):
        with pytest.raises(EmbedError, match=next(iter(wrong))):
            EmbedOptions(**wrong)


@pytest.fixture
def half(tmp_path, tissue):
    """Left half tissue, right half glass; 1,000 x 1,000 px at 0.5 um/px."""
    pixels = np.full((1000, 1000, 3), 243, np.uint8)
    pixels[:, :500] = tissue[:, :500]
    return write_tiff(tmp_path / "half.tif", [pixels], mpp=0.5)


def plan(path, **options):
    chosen = EmbedOptions(**{"mpp": 0.5, "patch_px": 100, "allow_coarse": True, **options})
    geojson = chosen_geojson if (chosen_geojson := path.with_suffix(".geojson")).exists() else None
    source = SlideSource(path, tissue_geojson=geojson)
    return plan_slide(source, patch_geometry(ENCODERS["uni"], chosen), chosen)


def test_plan_keeps_tissue_and_leaves_glass(half):
    made = plan(half)
    assert made.grid_patches == 100
    kept = {tuple(xy) for xy in made.coords.tolist()}
    assert {(x, y) for x, y in kept if x >= 600} == set()
    assert len(kept) >= 45
    assert not made.padded.any()
    assert made.coords.dtype == np.int64
    picture = draw_preview(made)
    assert max(picture.size) <= 2100


def test_a_preview_says_how_long_and_what(half):
    """500 um wide: a bar of 100 um; a legend of the colours that were drawn, and of no others."""
    made = plan(half, pad_edges=True, patch_px=150)
    assert made.padded.any()
    picture = np.asarray(draw_preview(made)).astype(int)
    drawn, legend = picture[: -2 * LINE_PX], picture[-2 * LINE_PX : -LINE_PX]
    assert drawn.shape[1] == drawn.shape[0]
    dark = (drawn[-60:, :300].sum(axis=2) == 0).sum(axis=1)
    assert dark.max() == pytest.approx(drawn.shape[1] * 100 / 500, abs=2)

    def named(sheet, colour):
        return (sheet == colour).all(axis=2).any()

    assert all(named(legend, colour) for colour in (OUTLINE, GRID, PADDED))
    assert not named(legend, UNREADABLE)
    lost = np.asarray(draw_preview(made, unreadable=range(len(made.coords))))
    legend = lost[-2 * LINE_PX : -LINE_PX]
    assert named(legend, UNREADABLE) and not named(legend, GRID)


def test_only_what_the_overview_leaves_open_is_uncertain(half, monkeypatch):
    """Beside a gap of the overview a patch whose decoded part is enough is as good as any."""
    pixel = 10  # level-0 px of a pixel of the mask, of 100 x 100
    mask, gaps = np.ones((2, 100, 100), bool)
    gaps[:, :75] = False  # the last two and a half columns of patches are dark
    found = TissueMask(mask & ~gaps, float(pixel), 5.0, 0.1, gaps)
    picture = np.zeros((100, 100, 3), np.uint8)
    monkeypatch.setattr(
        "xmag_hf.embedding.plan._tissue",
        lambda slide, source: (found, Overview(picture, found.mask, float(pixel))),
    )
    made = plan(half, tissue=0.4)
    assert len(made.coords) == 100
    assert {x for x, _ in made.coords[made.uncertain].tolist()} == {800, 900}


def test_overlap_and_edges(half):
    made = plan(half, tissue=0.0001, overlap=50, pad_edges=True)
    assert sorted({x for x, _ in made.coords.tolist()})[:4] == [0, 50, 100, 150]
    assert made.padded.tolist() == [x + 100 > 1000 or y + 100 > 1000 for x, y in made.coords]
    assert made.padded.any()


def test_a_preview_of_patches_smaller_than_its_pixels(tmp_path, tissue):
    """A sliver past the edge, and patches of 2 px: less than a pixel of the picture."""
    path = write_tiff(tmp_path / "sliver.tif", [tissue[:201, :201]], mpp=0.5)
    options = {"tissue": 1e-6, "pad_edges": True}
    made = plan(path, **options)
    assert [200, 200] in made.coords.tolist()
    draw_preview(made)
    draw_preview(plan(path, patch_px=2, **options))


def test_colours_that_were_left_out_are_told(tmp_path, tissue, caplog):
    """DAB beside H&E has the hue of red ink, Masson's blue that of blue ink."""
    dab = np.concatenate([tissue, np.full_like(tissue, (140, 80, 35))], axis=1)
    half = dab.shape[1] // 2
    masson = np.full((1000, 1000, 3), 243, np.uint8)
    masson[100:900, 100:900] = (120, 150, 200)
    plans = {}
    for name, pixels in (("he", tissue), ("dab", dab), ("masson", masson)):
        with caplog.at_level(logging.WARNING):
            plans[name] = plan(write_tiff(tmp_path / f"{name}.tif", [pixels], mpp=0.5))
    assert plans["dab"].coords[:, 0].max() < half and len(plans["masson"].coords) == 0
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("dab: ") and "--tissue-geojson" in message
    assert "masson: " in (said := no_tissue_reason(plans["masson"])) and "100% of its col" in said
    assert "--tissue-geojson" in said


def test_an_annotation_of_too_little_is_not_taken_for_ink(half):
    annotate(half, {"type": "Polygon", "coordinates": [square(10, 10, 40, 40)]})
    made = plan(half, tissue=0.5)
    assert len(made.coords) == 0
    said = no_tissue_reason(made)
    assert "annotation" in said and "ink" not in said


def square(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def annotate(path, *geometries):
    features = [{"type": "Feature", "properties": {}, "geometry": g} for g in geometries]
    content = json.dumps({"type": "FeatureCollection", "features": features})
    path.with_suffix(".geojson").write_text(content)


def test_annotated_tissue_with_a_hole(half):
    """Right half, where no tissue would be found; the hole takes four patches out."""
    rings = [square(496, 0, 1000, 1000), square(592, 192, 808, 408)]
    annotate(half, {"type": "Polygon", "coordinates": rings}, {"type": "Point", "coordinates": []})
    made = plan(half, tissue=0.5)
    inside = {(x, y) for x in range(500, 1000, 100) for y in range(0, 1000, 100)}
    hole = {(x, y) for x in (600, 700) for y in (200, 300)}
    assert {tuple(xy) for xy in made.coords.tolist()} == inside - hole
    assert made.tissue_method.startswith("geojson:")
    area = ((1000 - 496) * 1000 - 216 * 216) * 0.25 / 1e6
    assert made.tissue_mm2 == pytest.approx(area, rel=0.03)
    drawn, covered = np.zeros((2, 1000, 1000), bool)
    drawn[:, 496:] = True
    drawn[192:408, 592:808] = False
    for x, y in made.coords:
        covered[y : y + 100, x : x + 100] = True
    share = (drawn & covered).sum() / drawn.sum()
    assert 0.9 < share < 1 and made.tissue_share == pytest.approx(share, abs=0.02)


def test_annotations_count_from_the_scanned_areas_corner(half):
    """QuPath shows the scanned area alone, and exports pixels of what it shows."""
    content = json.dumps({"type": "Polygon", "coordinates": [square(100, 0, 300, 200)]})
    half.with_suffix(".geojson").write_text(content)
    with open_slide(half) as slide:
        slide.origin_xy = (200, 400)
        made = annotated_tissue(half.with_suffix(".geojson"), slide, 1.0)
    rows, columns = np.nonzero(made.mask)  # two px of level 0 each
    assert (columns.min() * 2, columns.max() * 2 + 2) == (300, 500)
    assert (rows.min() * 2, rows.max() * 2 + 2) == (400, 600)


def test_crossing_and_empty_polygons(half, caplog):
    caplog.set_level(logging.WARNING)
    eight = [[0, 0], [800, 800], [800, 0], [0, 800], [0, 0]]
    annotate(
        half,
        {"type": "Polygon", "coordinates": [eight]},
        {"type": "Polygon", "coordinates": [[]]},
        {"type": "MultiPolygon", "coordinates": [[[[5, 5], [5, 5], [5, 5]]]]},
    )
    made = plan(half, tissue=0.9)
    kept = {tuple(xy) for xy in made.coords.tolist()}
    assert (0, 300) in kept and (700, 300) in kept  # the two triangles at the sides
    assert (300, 0) not in kept and (300, 700) not in kept
    said = [record.message for record in caplog.records]
    assert sum("crosses itself" in text for text in said) == 1
    assert sum("empty polygon" in text for text in said) == 2


def test_a_simple_polygon_is_not_said_to_cross_itself(half, caplog):
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = np.where(np.arange(60) % 2, 150, 450)  # a star
    star = np.stack([500 + radius * np.cos(angles), 500 + radius * np.sin(angles)], axis=1)
    annotate(half, {"type": "Polygon", "coordinates": [star.tolist()]})
    plan(half)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no GeoJSON"),
        ('{"features": []}', "no GeoJSON"),
        ("[1, 2]", "no GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "none of the 0 polygons"),
        (
            json.dumps({"type": "Polygon", "coordinates": [square(5000, 0, 6000, 100)]}),
            "none of the 1 polygons",
        ),
    ],
)
def test_annotations_that_say_nothing(half, content, said):
    half.with_suffix(".geojson").write_text(content)
    with pytest.raises(AnnotationError, match=said):
        plan(half)

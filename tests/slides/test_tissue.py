"""Tissue masks on real tissue with drawn-on pens and borders, on blank glass, and their shares."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from xmag_hf.slides import TissueMask, find_tissue, open_slide, tissue_mask
from xmag_hf.slides.tissue import otsu

MPP = 8.0


@pytest.fixture(scope="module")
def tissue(cmu_slide) -> np.ndarray:
    """Real H&E on a large glass, as a whole slide looks at 8 um/px."""
    with open_slide(cmu_slide) as slide:
        picture, _ = slide.thumbnail(MPP)
    glass = np.full((600, 600, 3), 243, np.uint8)
    glass += np.random.default_rng(0).integers(-4, 5, glass.shape).astype(np.uint8)
    glass[200 : 200 + picture.shape[0], 250 : 250 + picture.shape[1]] = picture
    return glass


@pytest.mark.parametrize(
    "ink",
    [(20, 60, 160), (30, 30, 140), (10, 120, 70), (20, 20, 25), (200, 20, 40), (60, 160, 190)],
    ids=["blue", "navy", "green", "black", "red", "cyan"],
)
def test_pen_is_no_tissue(tissue, ink):
    picture = Image.fromarray(tissue)
    draw = ImageDraw.Draw(picture)
    draw.line([(40, 60), (180, 110), (120, 420), (200, 560)], fill=ink, width=8)
    # A felt tip fades at its edge.
    soft = ndimage.gaussian_filter(np.asarray(picture).astype(float), (1.5, 1.5, 0))
    clean, _ = tissue_mask(tissue, MPP)
    mask, _ = tissue_mask(soft.astype(np.uint8), MPP)
    stroke = np.abs(soft - tissue).max(axis=2) > 40
    stroke[:, 230:] = False
    assert mask[stroke].mean() < 0.02
    here = np.s_[180:600, 230:500]
    assert (mask[here] & clean[here]).sum() / clean[here].sum() > 0.97


def test_black_border_is_no_tissue(tissue):
    framed = tissue.copy()
    framed[:40] = framed[:, :25] = framed[-30:] = 3
    mask, _ = tissue_mask(framed, MPP)
    assert not mask[:42].any()
    assert not mask[:, :27].any()
    assert mask.any()


def _blank(kind: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[-1:1:400j, -1:1:500j]
    shade = np.full((400, 500, 3), 240.0)
    if kind == "vignette":
        shade -= 50 * (x**2 + y**2)[..., None]
    if kind == "tinted":
        shade *= (1.0, 0.975, 0.95)
    if kind == "dust":
        for cy, cx in rng.integers(10, 390, (60, 2)):
            shade[cy : cy + 6, cx : cx + 5] = (120, 90, 110)
    if kind == "black":
        shade[:] = 0
    noisy = shade + rng.normal(0, 3, shade.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["noise", "vignette", "tinted", "dust", "black"])
def test_blank_glass_has_no_tissue(kind):
    mask, _ = tissue_mask(_blank(kind), MPP)
    assert not mask.any()


def test_full_tissue_is_kept_whole(shared_data):
    """No glass to compare with; Otsu alone would drop the pale half."""
    with open_slide(shared_data / "atlas_10x" / "pdac_adrenal_invasion_he.tif") as slide:
        assert find_tissue(slide).mask.mean() > 0.97


def test_fat_belongs_to_the_tissue_and_glass_does_not(shared_data):
    """Steatotic liver is full of round white holes; the gap between its cores is glass."""
    with open_slide(shared_data / "organs_20x" / "bs3_he.tif") as slide:
        found = find_tissue(slide)
        picture, _ = slide.thumbnail(MPP)
    white = picture.min(axis=2) > 225
    inside = ndimage.binary_erosion(found.mask, iterations=8)
    assert (white & found.mask)[inside].sum() > 200  # fat cells inside the mask
    labels, n = ndimage.label(white)
    largest = np.argmax(np.bincount(labels.ravel())[1:]) + 1
    assert found.mask[ndimage.binary_erosion(labels == largest, iterations=4)].mean() < 0.01
    assert n > 20


def test_otsu_against_all_cuts():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(0.2, 0.05, 700), rng.normal(0.6, 0.1, 300)]).clip(0, 1)

    def between(cut: float) -> float:
        low, high = values[values < cut], values[values >= cut]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(between(cut) for cut in np.arange(30, 200) / 256)
    assert between(otsu(*np.histogram(values, 256, (0, 1)))) > 0.999 * best
    counts, edges = np.histogram(np.full(50, 0.3), 256, (0, 1))
    assert otsu(counts, edges) == edges[1]  # nothing to cut


def test_fractions_against_counting_fine_cells():
    """Each mask pixel cut into 40 x 40 cells, which are counted."""
    rng = np.random.default_rng(4)
    mask = rng.random((12, 15)) > 0.5
    gaps = np.zeros_like(mask)
    found = TissueMask(mask, pixel_level0=16.0, mpp=8.0, threshold=0.1, gaps=gaps)
    fine = np.pad(np.kron(mask, np.ones((40, 40), bool)), 400)
    corners = np.array([(0, 0), (16, 32), (10, 7), (100, 90), (-20, 3), (200, 150)])
    width = 56.0
    for xy, actual in zip(corners, found.fractions(corners, width), strict=True):
        x, y = (int(v * 40 / 16) + 400 for v in xy)
        side = int(width * 40 / 16)
        assert actual == pytest.approx(fine[y : y + side, x : x + side].mean(), abs=0.02)


def test_gaps_count_as_possible_tissue_only_if_asked() -> None:
    mask, gaps = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    mask[:2, :2], gaps[2:, 2:] = True, True
    found = TissueMask(mask, pixel_level0=1.0, mpp=8.0, threshold=0.1, gaps=gaps)
    corner = np.array([(0, 0)])
    assert found.fractions(corner, 4.0).tolist() == [0.25]
    assert found.fractions(corner, 4.0, with_gaps=True).tolist() == [0.5]


def test_memory_is_a_few_bytes_a_pixel(monkeypatch, tissue):
    """A slide of 100,000 px at 0.5 um/px has 39 million pixels here; float copies would be GBs."""
    monkeypatch.setattr("xmag_hf.slides.tissue.STRIP_PX", 1 << 15)
    monkeypatch.setattr("xmag_hf.slides.tissue.GLASS_SAMPLE_PX", 1 << 15)
    picture = np.tile(tissue, (3, 3, 1))
    pixels = picture.shape[0] * picture.shape[1]
    tracemalloc.start()
    try:
        mask, threshold = tissue_mask(picture, MPP)
        found = TissueMask(mask, 16.0, MPP, threshold, np.zeros_like(mask))
        assert tracemalloc.get_traced_memory()[1] < 16 * pixels
        tracemalloc.reset_peak()
        found.fractions(np.zeros((10, 2)), 900.0)
        assert tracemalloc.get_traced_memory()[1] < 12 * pixels
    finally:
        tracemalloc.stop()


def test_strips_leave_no_seam(monkeypatch, tissue):
    """The rule of a picture, whatever the strips in which it is looked at."""
    whole, threshold = tissue_mask(tissue, MPP)
    monkeypatch.setattr("xmag_hf.slides.tissue.STRIP_PX", 7 * tissue.shape[1])
    striped, same = tissue_mask(tissue, MPP)
    assert (striped == whole).all()
    assert same == threshold
    monkeypatch.setattr("xmag_hf.slides.tissue.GLASS_SAMPLE_PX", 10_000)
    sampled, near = tissue_mask(tissue, MPP)
    assert (sampled != whole).mean() < 1e-3
    assert near == pytest.approx(threshold, abs=0.005)

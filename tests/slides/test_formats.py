"""Formats beside the tiled TIFF: what OpenSlide refuses, OME, DICOM, deep and grey pixels."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from dicom_slide import write_dicom
from giant_tiff import write_giant
from lanczos_reference import expected_region
from ndpi_slide import write_ndpi
from PIL import Image

from xmag_hf.slides import (
    SlideOpenError,
    SlideReadError,
    SlideScaleError,
    find_tissue,
    open_slide,
)
from xmag_hf.slides.tiff import ome_mpp

SCALE = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "metadata": None}
TILED = {"tile": (256, 256)}


@pytest.fixture(scope="module")
def pixels(cmu_pixels: np.ndarray) -> np.ndarray:
    """(700, 900, 3) uint8 of tissue, taken as 0.5 um/px."""
    return cmu_pixels[900:1600, 700:1600]


@pytest.mark.parametrize(
    "how",
    [
        {"rowsperstrip": 16},  # mapped
        {"rowsperstrip": 48, "compression": "zlib", "predictor": True},
        {"byteorder": ">", "compression": "lzw", **TILED},
        {"compression": "jpeg2000", **TILED},
        {"planarconfig": "separate", "rowsperstrip": 32, "compression": "zlib"},
    ],
    ids=["strips", "zlib strips", "big-endian", "jpeg2000", "planar"],
)
def test_tiffs_that_openslide_refuses(tmp_path, pixels, how):
    stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in how else pixels
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, photometric="rgb", **SCALE, **how)
    with open_slide(path) as slide:
        assert (slide.vendor, slide.mpp0, slide.mpp_source) == ("tifffile", 0.5, "tiff")
        assert (slide.read_region((0, 0), (900, 700), 0.5) == pixels).all()
        corner = slide.read_region((850, 650), 100, 0.5)
        actual = slide.read_region((311.3, 207.6), (60, 50), 1.7)
    assert (corner[:50, :50] == pixels[650:, 850:]).all()
    assert (corner[50:] == 255).all() and (corner[:, 50:] == 255).all()
    expected = expected_region(pixels, 1, (311.3, 207.6), (60, 50), 1.7, 0.5)
    assert np.abs(actual - expected).max() <= 1


@pytest.fixture(scope="module")
def ycbcr(pixels: np.ndarray) -> np.ndarray:
    """The pixels as JFIF's Y, Cb, Cr; the first 50 rows are neutral grey."""
    stored = np.asarray(Image.fromarray(pixels).convert("YCbCr")).copy()
    stored[:50] = 180, 128, 128
    return stored


def as_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """float64, by ITU-R BT.601 as in TIFF 6.0, section 21."""
    y, cb, cr = np.moveaxis(ycbcr.astype(float), 2, 0) - np.array([0, 128, 128])[:, None, None]
    green = (y - 0.299 * (y + 1.402 * cr) - 0.114 * (y + 1.772 * cb)) / 0.587
    return np.clip(np.stack([y + 1.402 * cr, green, y + 1.772 * cb], axis=2), 0, 255)


@pytest.mark.parametrize(
    "how",
    [
        {"rowsperstrip": 16},  # mapped
        {"rowsperstrip": 48, "compression": "lzw"},
        {"compression": "jpeg2000", **TILED},
        {"planarconfig": "separate", "rowsperstrip": 32, "compression": "zlib"},
    ],
    ids=["strips", "lzw strips", "jpeg2000", "planar"],
)
def test_ycbcr_becomes_rgb(tmp_path, ycbcr, how):
    stored = np.moveaxis(ycbcr, 2, 0) if "planarconfig" in how else ycbcr
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, photometric="ycbcr", **SCALE, **how)
    with open_slide(path) as slide:
        actual = slide.read_region((0, 0), (900, 700), 0.5).astype(float)
    assert (actual[:50] == 180).all()
    assert np.abs(actual - as_rgb(ycbcr)).max() <= 1


def test_ycbcr_of_sixteen_bits(tmp_path, ycbcr):
    path = tmp_path / "deep.tif"
    levels = (0, 1, 65_535, 1, 32_768, 1, 65_535, 1, 32_768, 1, 65_535, 1)
    tifffile.imwrite(path, ycbcr.astype(np.uint16) << 8, photometric="ycbcr", rowsperstrip=16,
                     extratags=[(532, 5, 6, levels, True)], **SCALE)  # fmt: skip
    with open_slide(path) as slide:
        actual = slide.read_region((0, 0), (900, 700), 0.5).astype(float)
    assert np.abs(actual - as_rgb(ycbcr)).max() <= 1


def write_ome(path: Path, pixels: np.ndarray, size: float, unit: str, **how: object) -> Path:
    """An OME-TIFF with a second level, reduced by 4, in a SubIFD."""
    physical = {
        f"PhysicalSize{axis}{n}": v for axis in "XY" for n, v in (("", size), ("Unit", unit))
    }
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, photometric="rgb", subifds=1, metadata={"axes": "YXS"} | physical, **how)
        file.write(pixels[::4, ::4], photometric="rgb", subfiletype=1, **how)
    return path


@pytest.mark.parametrize(("size", "unit"), [(0.5, "µm"), (500.0, "nm"), (5e-4, "mm")])
@pytest.mark.parametrize("how", [TILED, {"compression": "zlib"}], ids=["tiles", "strips"])
def test_ome_tiff_has_its_own_scale(tmp_path, pixels, size, unit, how):
    """Written by tifffile without resolution tags: only the XML knows."""
    path = write_ome(tmp_path / "a.ome.tif", pixels, size, unit, **how)
    with open_slide(path) as slide:
        assert slide.mpp0 == pytest.approx(0.5, rel=1e-9)
        assert slide.mpp_source == "ome"
        assert slide.level_sizes == ((900, 700), (225, 175))  # OpenSlide sees no SubIFDs
        level = pixels[::4, ::4]
        expected = expected_region(level, 4, (101, 203), (40, 30), 2.9, 0.5)
        assert np.abs(slide.read_region((101, 203), (40, 30), 2.9) - expected).max() <= 1


@pytest.mark.parametrize("how", [TILED, {"rowsperstrip": 16}], ids=["tiles", "strips"])
def test_of_several_ome_images_the_largest_is_the_slide(tmp_path, pixels, how):
    """A label comes first; each image has a scale of its own."""
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for image, size in ((pixels[:300, :400], 2.0), (pixels, 0.25)):
            physical = {"PhysicalSizeX": size, "PhysicalSizeY": size}
            file.write(image, photometric="rgb", metadata={"axes": "YXS"} | physical, **how)
    with open_slide(path) as slide:
        assert (slide.size_level0, slide.mpp0, slide.mpp_source) == ((900, 700), 0.25, "ome")
        assert (slide.read_region((0, 0), (900, 700), 0.25) == pixels).all()


def test_levels_of_an_ome_tiff_that_openslide_sees_stay_with_it(tmp_path, pixels):
    """Reduced directories beside the first, as libvips writes them: tifffile would lose them."""
    path = tmp_path / "a.ome.tif"
    xml = OME.format('PhysicalSizeX="0.5" PhysicalSizeY="0.5" SizeX="900" SizeY="700"')
    with tifffile.TiffWriter(path) as file:
        how = {"photometric": "rgb", "metadata": None, **TILED}
        file.write(pixels, description=xml, **how)
        file.write(pixels[::4, ::4], subfiletype=1, **how)
    with open_slide(path) as slide:
        assert slide.level_sizes == ((900, 700), (225, 175))
        assert (slide.mpp0, slide.mpp_source) == (0.5, "ome")


@pytest.mark.parametrize("images", [1, 2])
def test_without_imagecodecs_openslide_reads_what_it_can(
    tmp_path, pixels, monkeypatch, caplog, images
):
    path = write_ome(tmp_path / "a.ome.tif", pixels, 0.5, "\u00b5m", compression="jpeg", **TILED)
    if images == 2:
        with tifffile.TiffWriter(path, ome=True) as file:
            for image in (pixels[:300, :400], pixels):
                file.write(image, photometric="rgb", compression="jpeg", **TILED)
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", {1: None})
    if images == 2:
        with pytest.raises(SlideOpenError, match=r"a.*xmag-hf\[tiff\]"):
            open_slide(path)
        return
    with open_slide(path) as slide:
        assert slide.level_sizes == ((900, 700),)
        assert np.abs(slide.read_region((0, 0), (900, 700), 0.5).astype(int) - pixels).mean() < 8
    assert "xmag-hf[tiff]" in caplog.text


def test_one_ome_image_of_tiles_needs_no_other_reader(tmp_path, pixels):
    path = tmp_path / "a.ome.tif"
    physical = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    tifffile.imwrite(path, pixels, photometric="rgb", ome=True, metadata=physical, **TILED)
    with open_slide(path) as slide:
        assert (slide.vendor, slide.mpp0) == ("generic-tiff", 0.25)


OME = '<OME xmlns="http://www.openmicroscopy.org"><Image><Pixels {}/></Image></OME>'


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (OME.format('PhysicalSizeX="0.25" PhysicalSizeY="0.26"'), (0.25, 0.26)),  # um by default
        (
            OME.format(
                'PhysicalSizeX="250" PhysicalSizeXUnit="n&#109;" PhysicalSizeY="0.25" '
                'PhysicalSizeYUnit="&#181;m"'  # as ElementTree writes it
            ),
            (0.25, 0.25),
        ),
        (OME.format('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"'), None),
        (OME.format('SizeX="20"'), None),
        (OME.format('PhysicalSizeX="0,25" PhysicalSizeY="0,25"'), None),
        ("<OME><Pixels", None),
        ("Aperio Image Library |MPP = 0.25", None),
    ],
)
def test_scale_of_ome_xml(description, expected):
    assert ome_mpp(description, (20, 20)) == (expected and pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("how", [TILED, {"rowsperstrip": 16}], ids=["openslide", "tifffile"])
def test_of_sixteen_bits_the_upper_eight(tmp_path, pixels, how):
    """65,535 is white: what both readers make of it."""
    path = tmp_path / "deep.tif"
    tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric="rgb", **SCALE, **how)
    with open_slide(path) as slide:
        assert (slide.read_region((0, 0), (900, 700), 0.5) == pixels).all()


@pytest.mark.parametrize("how", [TILED, {"rowsperstrip": 16}], ids=["openslide", "tifffile"])
def test_grey_is_read_as_grey_and_has_no_tissue(tmp_path, pixels, how):
    grey = pixels.mean(axis=2).astype(np.uint8)
    path = tmp_path / "grey.tif"
    tifffile.imwrite(path, grey, photometric="minisblack", **SCALE, **how)
    with open_slide(path) as slide:
        assert (slide.read_region((0, 0), (900, 700), 0.5) == grey[..., None]).all()
        assert not find_tissue(slide).mask.any()


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("how", [TILED, {"rowsperstrip": 16}], ids=["openslide", "tifffile"])
def test_transparency_shows_white_glass(tmp_path, pixels, kind, how):
    share = np.zeros((700, 900, 1))
    share[:, 550:600], share[:, 600:] = 100 / 255, 1.0
    colours = pixels * share if kind == "assocalpha" else pixels
    stored = np.rint(np.concatenate([colours, share * 255], axis=2)).astype(np.uint8)
    path = tmp_path / "alpha.tif"
    tifffile.imwrite(path, stored, photometric="rgb", extrasamples=[kind], **SCALE, **how)
    with open_slide(path) as slide:
        actual = slide.read_region((0, 0), (900, 700), 0.5)
        tissue = find_tissue(slide)
    # Premultiplied bytes lose half a level of their 100/255, and both readers round again.
    assert np.abs(actual - (pixels * share + 255 * (1 - share))).max() <= 2
    assert not tissue.mask[:, : int(500 / tissue.pixel_level0)].any()
    assert tissue.mask[:, int(700 / tissue.pixel_level0) :].any()


@pytest.mark.parametrize("byteorder", ["<", ">"], ids=["openslide", "tifffile"])
def test_absent_tiles_are_glass(tmp_path, pixels, byteorder):
    """Offset and length 0: scanners leave out what they did not scan."""
    path = tmp_path / "sparse.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", byteorder=byteorder, **SCALE, **TILED)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            size = tag.dtype.itemsize if hasattr(tag.dtype, "itemsize") else {3: 2, 4: 4}[tag.dtype]
            at = tag.valueoffset + 5 * size  # second row, second column
            content[at : at + size] = bytes(size)
    path.write_bytes(content)
    expected = pixels.copy()
    expected[256:512, 256:512] = 255
    with open_slide(path) as slide:
        assert (slide.read_region((0, 0), (900, 700), 0.5) == expected).all()


def test_a_corrupt_strip_costs_only_its_rows(tmp_path, pixels):
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib", rowsperstrip=100, **SCALE)
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[3], file.pages[0].databytecounts[3]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert (slide.read_region((0, 0), (900, 280), 0.5) == pixels[:280]).all()
        with pytest.raises(SlideReadError, match="damaged: level 0"):
            slide.read_region((10, 320), 40, 0.5)
        assert (slide.read_region((0, 420), (900, 280), 0.5) == pixels[420:]).all()


def test_a_region_does_not_decode_the_slide(tmp_path, pixels):
    big = np.tile(pixels, (6, 6, 1))  # 68 MB
    path = tmp_path / "big.tif"
    tifffile.imwrite(path, big, photometric="rgb", compression="zlib", rowsperstrip=64, **SCALE)
    del big
    tracemalloc.start()
    try:
        with open_slide(path) as slide:
            slide.read_region((3000, 2000), 64, 0.5)
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_what_makes_no_picture_is_refused(tmp_path, pixels, monkeypatch):
    def refused(said: str, stored: np.ndarray, **how: object) -> None:
        path = tmp_path / "odd.tif"
        tifffile.imwrite(path, stored, **(SCALE | how))
        with pytest.raises(SlideOpenError, match=said) as caught:
            open_slide(path)
        assert "odd" in str(caught.value) and "8-bit RGB" in str(caught.value)

    strips = {"rowsperstrip": 16}
    real = (pixels / 255).astype(np.float32)
    refused("3 samples of 32 bits, RGB", real, photometric="rgb", **strips)
    refused("4 samples of 8 bits, SEPARATED", np.repeat(pixels[..., :1], 4, 2),
            photometric="separated", **strips)  # fmt: skip
    channels = np.moveaxis(pixels, 2, 0)
    refused("on 3 pages", channels, photometric="minisblack", **strips,
            metadata={"axes": "CYX"}, ome=True)  # fmt: skip
    refused("on 3 pages", channels, photometric="minisblack", **TILED,
            metadata={"axes": "CYX"}, ome=True)  # fmt: skip
    monkeypatch.setattr("xmag_hf.slides.tiff.MAX_SEGMENT_BYTES", 1_000_000)
    refused("pieces of 1,890,000 bytes", pixels, photometric="rgb", compression="zlib",
            rowsperstrip=700)  # fmt: skip


def test_several_pages_of_one_size_are_refused(tmp_path, pixels):
    """OpenSlide would show the first of them; a smaller one beside it is an overview."""
    path = tmp_path / "planes.tif"
    with tifffile.TiffWriter(path) as file:
        for plane in (pixels, pixels[::-1], pixels[::4, ::4]):
            file.write(plane, photometric="rgb", **SCALE, **TILED)
    with pytest.raises(SlideOpenError, match="planes.tif holds 2 pages of one size"):
        open_slide(path)


@pytest.mark.parametrize("how", [TILED | {"byteorder": ">"}, {"rowsperstrip": 16}])
def test_a_fourth_sample_of_no_stated_meaning_is_not_shown(tmp_path, pixels, how):
    path = tmp_path / "a.tif"
    four = np.dstack([pixels, np.full(pixels.shape[:2], 7, np.uint8)])
    tifffile.imwrite(path, four, photometric="rgb", extrasamples=["unspecified"], **SCALE, **how)
    with tifffile.TiffFile(path) as file:
        at, order = file.pages[0].tags["ExtraSamples"].offset, file.byteorder
    content = bytearray(path.read_bytes())
    content[at : at + 2] = struct.pack(order + "H", 337)  # now some other tag
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert (slide.read_region((0, 0), (900, 700), 0.5) == pixels).all()


def test_without_tifffile_it_says_what_to_install(tmp_path, pixels, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=16, **SCALE)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(SlideOpenError, match=r"xmag-hf\[tiff\]"):
        open_slide(path)


def test_dicom(tmp_path, pixels):
    """Against the pixels that went in; JPEG quality 98 changes them by a few levels."""
    with open_slide(write_dicom(tmp_path / "a.dcm", pixels, 0.5)) as slide:
        assert (slide.vendor, slide.mpp0, slide.objective) == ("dicom", 0.5, "20")
        whole = slide.read_region((0, 0), (900, 700), 0.5).astype(int)
        actual = slide.read_region((123, 45), (50, 60), 1.9)
    assert np.abs(whole - pixels).mean() < 1.5
    expected = expected_region(whole.astype(np.uint8), 1, (123, 45), (50, 60), 1.9, 0.5)
    assert np.abs(actual - expected).max() <= 1
    with pytest.raises(SlideScaleError, match="--slide-mpp"):
        open_slide(write_dicom(tmp_path / "b.dcm", pixels, None))


@pytest.mark.parametrize("start", [12, 5_000_000_000], ids=["small", "above 4 GiB"])
def test_ndpi(tmp_path, pixels, start):
    """Offsets of its directories have 64 bits; their lower halves point into anything.

    Here to a directory without entries that is its own next one.
    """
    path = write_ndpi(tmp_path / "a.ndpi", [pixels, pixels[::4, ::4]], 0.5, start)
    if start > 2**32:
        with path.open("r+b") as file:
            file.seek(4)
            (low,) = struct.unpack("<L", file.read(4))
            file.seek(low)
            file.write(struct.pack("<HL", 0, low))
    with open_slide(path) as slide:
        assert (slide.vendor, slide.mpp0) == ("hamamatsu", 0.5)
        actual = slide.read_region((0, 0), (900, 700), 0.5).astype(int)
    assert np.abs(actual - pixels).mean() < 1.5  # JPEG quality 98


def test_a_slide_larger_than_any_glass_is_refused(tmp_path, pixels):
    """Its overview would take all memory there is."""
    path = write_giant(tmp_path / "vast.tif", 300_000, pixels[:256, :256], mpp=0.5, every=1)
    with pytest.raises(SlideScaleError, match="vast: 300000 x 300000 px .* 150 x 150 mm"):
        open_slide(path)
    with open_slide(path, mpp=0.4) as slide:
        assert slide.size_level0 == (300_000, 300_000)


def changed(path: Path, page: int, tag: str, value: int) -> Path:
    """The file with one number of a directory overwritten."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[page].tags[tag]
        at, size = found.valueoffset, found.valuebytecount // found.count
    content = bytearray(path.read_bytes())
    content[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("how", "tag", "value", "said"),
    [
        # OpenSlide ends the process: GLib cannot allocate 189 GB, or 4 GB.
        (TILED, "TileWidth", 738_029_053, "tiles of 738,029,053 x 256 px"),
        (TILED, "TileByteCounts", 2**32 - 1, "a tile of 4,294,967,295 bytes"),
        # tifffile would look for them all.
        ({"rowsperstrip": 16, "compression": "zlib"}, "ImageLength", 2**24, "1048576 pieces"),
        ({"rowsperstrip": 16}, "ImageLength", 2**24, "1048576 pieces"),
    ],
)
def test_headers_that_promise_too_much(tmp_path, pixels, how, tag, value, said):
    path = tmp_path / "wild.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", **SCALE, **how)
    with pytest.raises(SlideOpenError, match=said):
        open_slide(changed(path, 0, tag, value))


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ((529, 5, 3, (2126, 10_000, 7152, 10_000, 722, 10_000)), "0.2126, 0.7152, 0.0722"),
        ((532, 5, 6, (16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1)), "16, 235, 128, 240"),
    ],
    ids=["BT.709", "studio range"],
)
def test_other_ycbcr_is_refused(tmp_path, ycbcr, tag, said):
    """Of JPEG's kind only is it known what to do."""
    path = tmp_path / "odd.tif"
    tifffile.imwrite(path, ycbcr, photometric="ycbcr", rowsperstrip=16,
                     extratags=[(*tag, True)], **SCALE)  # fmt: skip
    with pytest.raises(SlideOpenError, match=f"odd: .*YCBCR.*{said}.*8-bit RGB"):
        open_slide(path)


def test_subsampled_ycbcr_is_refused_at_once(tmp_path, ycbcr):
    """tifffile decodes none of it: every region would fail."""
    path = tmp_path / "odd.tif"
    tifffile.imwrite(path, ycbcr, photometric="ycbcr", rowsperstrip=16, **SCALE)
    with pytest.raises(SlideOpenError, match="odd: .*YCBCR, with subsampled chroma.*8-bit RGB"):
        open_slide(changed(path, 0, "YCbCrSubSampling", 2))


@pytest.mark.parametrize("how", [TILED, {"rowsperstrip": 16}], ids=["openslide", "tifffile"])
def test_directories_in_a_circle(tmp_path, pixels, how):
    """The first directory names itself as the next."""
    path = tmp_path / "round.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", **SCALE, **how)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        at = page.offset + 2 + 12 * len(page.tags)
        content[at : at + 4] = page.offset.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(SlideOpenError, match="circle"):
        open_slide(path)


def test_directories_of_endless_entries(tmp_path):
    """100 directories of 65,535 entries, laid over one another in a file of 800 kB."""
    behind = 2 + 12 * 65_535  # a directory begins with its count; the next one's offset ends it
    content = bytearray(8 + 6 * 100 + behind + 6)
    content[:8] = struct.pack("<2sHL", b"II", 42, 8)
    for number in range(100):
        at = 8 + 6 * number
        content[at : at + 2] = struct.pack("<H", 65_535)
        content[at + behind : at + behind + 4] = struct.pack("<L", at + 6 if number < 99 else 0)
    path = tmp_path / "long.tif"
    path.write_bytes(content)
    with pytest.raises(SlideOpenError, match="more than 1,000,000 entries"):
        open_slide(path)

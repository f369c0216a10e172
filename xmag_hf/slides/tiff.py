"""TIFFs that OpenSlide refuses (strips, JPEG 2000, big-endian, ...), read through tifffile.

`TiffHandle` offers what `Slide` uses of an OpenSlide handle. A segment (tile or strip) is decoded
when a region touches it; uncompressed images are mapped. tifffile is imported when such a file is
met.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import openslide
from PIL import Image

from .errors import SlideOpenError

VENDOR = "tifffile"
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, TIFF and BigTIFF
CACHE_BYTES = 128_000_000
MAX_SEGMENT_BYTES = 512_000_000  # decoded: larger strips are refused
# By pattern: an XML parser would expand what a hostile header defines.
PIXELS_ELEMENT = re.compile(r"<(?:\w+:)?Pixels\b([^>]*)>")
ATTRIBUTE = re.compile(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']")
RESOLUTION_UNITS = {2: "inch", 3: "centimeter"}
TILE_SIDES, TILE_BYTES, IMAGE_SIDES, SUB_DIRECTORIES = (322, 323), 325, (256, 257), 330  # tags
KIND, REDUCED = 254, 1  # NewSubfileType, and its bit of a reduced image
WANTED_TAGS = (*IMAGE_SIDES, *TILE_SIDES, TILE_BYTES, SUB_DIRECTORIES, KIND)
NUMBERS = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # types of tags: SHORT, LONG, IFD, ...
MAX_TILES = 100_000_000
MAX_TILE_PX = 1 << 26  # 8,192 px a side
MAX_DIRECTORIES = 10_000
MAX_ENTRIES = 1_000_000  # of all directories
NDPI_TAG = 65420
RGB_DECODERS = (6, 7, 33007, 34892, 50001, 50002, 52546)  # JPEG, WebP, JPEG XL: RGB from YCbCr
BT_601 = (0.299, 0.587, 0.114)
FULL_RANGE = ((0, 255, 128, 255, 128, 255), (0, 65_535, 32_768, 65_535, 32_768, 65_535))
UNIT_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4}


class TiffHandle:
    """An open TIFF, as OpenSlide would offer it.

    Attributes:
        dimensions: (width, height) of level 0.
        level_dimensions: Of each level.
        level_downsamples: About level-0 px per px of each level. Whole numbers, so that each pixel
            of a level has its own whole level-0 position and nothing is blended.
        properties: Under OpenSlide's names.

    Args:
        path: The file.

    Raises:
        ImportError: tifffile, or imagecodecs for this compression, is not installed.
        ValueError: No TIFF, or pixels of a kind that makes no colour picture.
    """

    def __init__(self, path: Path):
        import tifffile

        self._file = tifffile.TiffFile(path)
        try:
            series = max(self._file.series, key=_area)
            self._pages = [_checked(level, path) for level in series.levels]
            for page in self._pages:
                _check_codec(page.compression)
        except BaseException:
            self._file.close()
            raise
        self.level_dimensions = tuple((p.imagewidth, p.imagelength) for p in self._pages)
        self.dimensions = self.level_dimensions[0]
        self.level_downsamples = tuple(
            float(max(1, round(max(self.dimensions) / max(size)))) for size in self.level_dimensions
        )
        self.properties = _properties(self._pages[0], self._file.pages.first.description)
        self._cache: OrderedDict[tuple[int, int], np.ndarray | None] = OrderedDict()
        self._cached_bytes = 0

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def read_region(
        self, location: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Pixels of a level; transparent where the file has none.

        Args:
            location: (x, y), level-0 px.
            level: Number.
            size: (width, height), px of the level.

        Returns:
            RGBA image.

        Raises:
            openslide.OpenSlideError: A segment cannot be decoded; what `Slide` expects.
        """
        left, top = (round(v / self.level_downsamples[level]) for v in location)
        out = np.zeros((size[1], size[0], 4), np.uint8)
        try:
            self._fill(out, left, top, level)
        except Exception as error:  # decoders raise whatever they please
            raise openslide.OpenSlideError(f"{type(error).__name__}: {error}") from error
        return Image.fromarray(out)

    def _fill(self, out: np.ndarray, left: int, top: int, level: int) -> None:
        page = self._pages[level]
        height, width = out.shape[:2]
        right, bottom = min(left + width, page.imagewidth), min(top + height, page.imagelength)
        x0, y0 = max(left, 0), max(top, 0)
        if x0 >= right or y0 >= bottom:
            return
        if _mappable(page):
            whole = page.asarray(out="memmap")
            out[y0 - top : bottom - top, x0 - left : right - left] = _rgba(
                whole[y0:bottom, x0:right], page
            )
            return
        rows, columns = _piece(page)
        for row, column in _grid(y0, bottom, rows, x0, right, columns):
            pixels = self._segment(level, row, column, rows, columns)
            if pixels is None:  # never written
                continue
            sy, sx = row * rows, column * columns
            a, b = max(sy, y0), min(sy + pixels.shape[0], bottom)
            c, d = max(sx, x0), min(sx + pixels.shape[1], right)
            out[a - top : b - top, c - left : d - left] = pixels[a - sy : b - sy, c - sx : d - sx]

    def _segment(
        self, level: int, row: int, column: int, rows: int, columns: int
    ) -> np.ndarray | None:
        """(H, W, 4) uint8 of a tile or strip, None if it is absent."""
        page = self._pages[level]
        across = -(-page.imagewidth // columns)
        number = row * across + column
        key = (level, number)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        planes = [number]
        if not _contiguous(page):  # one segment a colour, all of a colour first
            each = across * -(-page.imagelength // rows)
            planes = [number + n * each for n in range(page.samplesperpixel)]
        parts = [self._decoded(page, n) for n in planes]
        found = [part for part in parts if part is not None]
        pixels = _rgba(np.concatenate(found, axis=2), page) if len(found) == len(parts) else None
        self._remember(key, pixels)
        return pixels

    def _decoded(self, page: Any, number: int) -> np.ndarray | None:
        count = page.databytecounts[number]
        if not count:
            return None
        self._file.filehandle.seek(page.dataoffsets[number])
        content = self._file.filehandle.read(count)
        pixels, _, shape = page.decode(content, number, jpegtables=page.jpegtables)
        # decode() pads a last tile to its full size, and says what of it is picture.
        return None if pixels is None else pixels[0, : shape[1], : shape[2]]

    def _remember(self, key: tuple[int, int], pixels: np.ndarray | None) -> None:
        self._cache[key] = pixels
        self._cached_bytes += 0 if pixels is None else pixels.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= 0 if dropped is None else dropped.nbytes


def open_tiff(path: Path, slide_id: str) -> TiffHandle:
    """Open a TIFF that OpenSlide refuses.

    Raises:
        SlideOpenError: Damaged, no colour picture, or what reads it is not installed.
    """
    try:
        return TiffHandle(path)
    except ImportError as error:
        raise SlideOpenError(
            f"{slide_id}: what reads {path} well is not installed ({error}). "
            '`pip install "xmag-hf[tiff]"`, or convert it to a tiled TIFF of 8-bit RGB.'
        ) from error
    except Exception as error:  # noqa: BLE001 - a damaged header can raise anything
        raise SlideOpenError(
            f"{slide_id}: neither OpenSlide nor tifffile reads {path}: {error}. Convert it to a "
            "tiled TIFF of 8-bit RGB, or copy it again if it should be one."
        ) from error


def is_tiff(path: Path) -> bool:
    """Whether a file begins like a TIFF."""
    with path.open("rb") as file:
        return file.read(4) in MAGIC


def check_tiles(path: Path) -> None:
    """Refuse a TIFF whose header names tiles that cannot be, or goes round in a circle.

    OpenSlide believes the sizes of tiles and ends the whole process when the memory cannot be had.
    What else damaged headers say is refused by those who read them.

    Args:
        path: Any file; what is no TIFF passes.

    Raises:
        ValueError: Says how large, or that it is a circle.
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for tags in _directories(file):
            width, height = (int(tags[tag].max(initial=0)) for tag in TILE_SIDES)
            lengths = tags[TILE_BYTES]
            if width * height > MAX_TILE_PX:
                raise ValueError(f"its header names tiles of {width:,} x {height:,} px")
            if lengths.max(initial=0) > size:
                raise ValueError(
                    f"its header names a tile of {lengths.max():,} bytes in a file of {size:,}"
                )


def count_images(path: Path) -> tuple[int, int, int]:
    """Of a TIFF: (images, sub-directories, images as large as the first).

    A directory that says it is a reduced one is no image of its own.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        found = list(_directories(file))
    below = sum(len(tags[SUB_DIRECTORIES]) for tags in found)
    images = [tags for tags in found if not int(tags[KIND].max(initial=0)) & REDUCED]
    sizes = [[tags[tag].tolist() for tag in IMAGE_SIDES] for tags in images]
    return len(images), below, sum(size == sizes[0] for size in sizes)


def _directories(file: BinaryIO) -> Iterator[dict[int, np.ndarray]]:
    """`WANTED_TAGS` of each directory of a TIFF, empty where not given.

    Stops at damage, of which OpenSlide complains itself.

    Raises:
        ValueError: The directories form a circle, in which tifffile would go round for ever, or
            there is no end of them.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    magic = file.read(4)
    if magic not in MAGIC:
        return
    order, big = "<" if magic[:2] == b"II" else ">", b"+" in magic
    ndpi = not big and _is_ndpi(file, order, end)
    offset, count, width = ("Q", "Q", 8) if big else ("Q" if ndpi else "L", "H", 4)
    fields = [("tag", "u2"), ("kind", "u2"), ("n", f"u{width}"), ("field", f"V{width}")]
    entry = np.dtype(fields).newbyteorder(order)
    at, seen, entries = 0, set(), 0

    def read(form: str) -> int:
        return struct.unpack(order + form, file.read(struct.calcsize(order + form)))[0]

    try:
        file.seek(8 if big else 4)
        at = read(offset)
        while at and at not in seen and len(seen) < MAX_DIRECTORIES:
            if at >= end:
                return
            seen.add(at)
            file.seek(at)
            number = read(count)
            entries += number
            if entries > MAX_ENTRIES:
                break
            table = np.frombuffer(file.read(number * entry.itemsize), entry, number)
            behind = file.tell()
            tags = dict.fromkeys(WANTED_TAGS, np.zeros(0, np.uint64))
            for tag, kind, n, field in table[np.isin(table["tag"], list(tags))].tolist():
                if kind not in NUMBERS:
                    continue
                form = np.dtype(order + NUMBERS[kind])
                if n * form.itemsize > width:
                    if ndpi:  # the offset's upper half is elsewhere, and NDPI has no tiles
                        continue
                    place = int.from_bytes(field, "little" if order == "<" else "big")
                    file.seek(min(place, end))
                    field = file.read(min(n, MAX_TILES) * form.itemsize)
                whole = min(n, len(field) // form.itemsize)
                tags[tag] = np.frombuffer(field, form, whole).astype(np.uint64)
            yield tags
            file.seek(behind)
            at = read(offset)
    except (struct.error, ValueError, OverflowError):  # past the end of the file
        return
    if at:
        raise ValueError(
            f"its directories form a circle, or are more than {MAX_DIRECTORIES:,}, or have more "
            f"than {MAX_ENTRIES:,} entries"
        )


def _is_ndpi(file: BinaryIO, order: str, end: int) -> bool:
    """Whether a classic TIFF is Hamamatsu's NDPI, as OpenSlide tells it.

    Its offsets of directories have 64 bits; the first directory names it. Above 4 GiB their lower
    halves point into the pixels.
    """
    file.seek(4)
    try:
        (at,) = struct.unpack(order + "Q", file.read(8))
        file.seek(min(at, end))
        (number,) = struct.unpack(order + "H", file.read(2))
    except struct.error:
        return False
    content = file.read(12 * number)
    words = np.frombuffer(content, order + "u2", len(content) // 2)
    return NDPI_TAG in words[::6]


def ome_mpp(description: str, size: tuple[int, int]) -> tuple[float, float] | None:
    """um/px (x, y) of one image of an OME-XML text; None if it says none.

    PhysicalSizeX and -Y of the Pixels element, in its unit (um if it names none).

    Args:
        description: The first page's.
        size: (width, height) of the image, px. Of several images the first of this size is meant;
            if there is but one, it is.
    """
    found = PIXELS_ELEMENT.findall(description) if is_ome(description) else []
    images = [{k: html.unescape(v) for k, v in ATTRIBUTE.findall(text)} for text in found]
    if len(images) > 1:
        wanted = {"SizeX": str(size[0]), "SizeY": str(size[1])}
        images = [image for image in images if wanted.items() <= image.items()]
    try:
        x, y = (
            float(images[0][f"PhysicalSize{axis}"])
            * UNIT_UM[images[0].get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "XY"
        )
    except (IndexError, KeyError, ValueError):
        return None
    return x, y


def is_ome(description: str) -> bool:
    """Whether a TIFF's description is OME-XML."""
    return "<OME" in description[:2000]


def _area(series: Any) -> int:
    page = series.keyframe
    return page.imagewidth * page.imagelength


def _checked(level: Any, path: Path) -> Any:
    """The page of a level, if its pixels make a picture.

    Raises:
        ValueError: Says which kind they are.
    """
    page = level.keyframe
    kind = f"{page.samplesperpixel} samples of {page.bitspersample} bits, {page.photometric.name}"
    colours = {"RGB": (3, 4), "YCBCR": (3,), "MINISBLACK": (1,)}.get(page.photometric.name, ())
    if (
        page.samplesperpixel not in colours
        or page.dtype not in (np.uint8, np.uint16)
        or page.imagedepth > 1
        or len(level.pages) > 1
    ):
        many = f" on {len(level.pages)} pages" if len(level.pages) > 1 else ""
        raise ValueError(f"{path} holds {kind}{many}, no 8- or 16-bit RGB picture")
    if _is_ycbcr(page) and (odd := _odd_ycbcr(page)):
        raise ValueError(f"{path} holds {kind}, with {odd}")
    rows, columns = _piece(page)
    needed = -(-page.imagewidth // columns) * -(-page.imagelength // rows)
    needed *= 1 if _contiguous(page) else page.samplesperpixel
    if needed != len(page.dataoffsets) and not _mappable(page) or needed > len(page.dataoffsets):
        raise ValueError(
            f"{path} is damaged: {page.imagewidth} x {page.imagelength} px are {needed} pieces, "
            f"and its header lists {len(page.dataoffsets)}"
        )
    if not _mappable(page):
        segment = math.prod(page.chunks) * page.bitspersample // 8
        if segment > MAX_SEGMENT_BYTES:
            raise ValueError(
                f"{path} is compressed in pieces of {segment:,} bytes, so that no region can be "
                "read alone"
            )
    return page


def _check_codec(compression: int) -> None:
    """Raise ImportError where decoding would say only later that imagecodecs is not there."""
    import tifffile

    try:
        tifffile.TIFF.DECOMPRESSORS[compression]
    except KeyError as error:
        raise ImportError(error.args[0]) from error


def _piece(page: Any) -> tuple[int, int]:
    """(height, width) of a tile or strip, px."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def _contiguous(page: Any) -> bool:
    return page.samplesperpixel == 1 or page.planarconfig == 1


def _mappable(page: Any) -> bool:
    return page.is_memmappable and _contiguous(page)


def _is_ycbcr(page: Any) -> bool:
    """Whether decoded pixels are YCbCr, which tifffile makes RGB for JPEG only."""
    made_rgb = page.compression in RGB_DECODERS and _contiguous(page)
    return page.photometric.name == "YCBCR" and not made_rgb


def _odd_ycbcr(page: Any) -> str:
    """What keeps YCbCr from being the JPEG kind that Pillow makes RGB; empty if nothing does."""
    if page.is_subsampled:
        return "subsampled chroma"
    for name, usual in (("YCbCrCoefficients", (BT_601,)), ("ReferenceBlackWhite", FULL_RANGE)):
        said = page.tags.valueof(name)
        numbers = [a / b for a, b in zip(said[::2], said[1::2], strict=True)] if said else usual[0]
        if not any(np.allclose(numbers, one, atol=1e-3) for one in usual):
            return f"{name} {', '.join(f'{number:g}' for number in numbers)}"
    return ""


def _rgba(pixels: np.ndarray, page: Any) -> np.ndarray:
    """(H, W, 4) uint8; of 16 bits the upper eight, as 65,535 is white by the TIFF standard."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if _is_ycbcr(page):
        size = (pixels.shape[1], pixels.shape[0])
        pixels = np.asarray(Image.frombytes("YCbCr", size, pixels.tobytes()).convert("RGB"))
    out = np.full((*pixels.shape[:2], 4), 255, np.uint8)
    # Some writers leave the tag out, and so what the fourth sample is.
    alpha = pixels.shape[2] == 4 and page.extrasamples[:1] in ((1,), (2,))
    colours = pixels.shape[2] if alpha else min(pixels.shape[2], 3)
    out[..., : max(3, colours)] = pixels[..., :colours]
    if alpha and page.extrasamples[0] == 1:  # premultiplied
        share = np.maximum(out[..., 3:], 1).astype(np.float32) / 255
        out[..., :3] = np.minimum(np.rint(out[..., :3] / share), 255)
    return out


def _grid(
    top: int, bottom: int, rows: int, left: int, right: int, columns: int
) -> Iterator[tuple[int, int]]:
    return itertools.product(
        range(top // rows, -(-bottom // rows)), range(left // columns, -(-right // columns))
    )


def _properties(page: Any, description: str) -> dict[str, str]:
    """OpenSlide's, of a page; the description is the first page's, where OME-XML lies."""
    properties = {"openslide.vendor": VENDOR, "tiff.ImageDescription": description}
    unit = RESOLUTION_UNITS.get(int(page.tags.valueof("ResolutionUnit", default=2)))
    if unit is not None:
        properties["tiff.ResolutionUnit"] = unit
    for axis in "XY":
        value = page.tags.valueof(f"{axis}Resolution")
        if value is not None and value[1]:
            properties[f"tiff.{axis}Resolution"] = str(value[0] / value[1])
    return properties

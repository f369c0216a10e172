"""First stage: from a slide to the places of its patches. Plain data comes out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from xmag_hf.slides import Slide, SlideReadError, TissueMask, grid_origins, tissue_mask
from xmag_hf.slides.jpeg_tiles import JpegLevel, TileLayoutError, check_pixels, jpeg_level
from xmag_hf.slides.tissue import MASK_MPP
from xmag_hf.slides.windows import AxisWindow, axis_window, window_shape

from .annotation import annotated_tissue
from .options import EmbedError, EmbedOptions
from .sources import SlideSource, open_source

if TYPE_CHECKING:
    from xmag_hf.encoders import EncoderCard

logger = logging.getLogger(__name__)

CHECKED_PLACES = 5  # at most so many tiles are decoded to compare the fast path with OpenSlide
NEARLY_BLACK = 64  # median grey level of an overview
GREY_TISSUE = 150  # darker than this is no empty glass
DEAD_PROBES = 32  # patches tried where nothing of the overview could be decoded
GREY_CHROMA = 2  # largest difference of an overview's channels, grey levels
CLEAR_COLOUR = 0.2  # HSV saturation that glass, dust and pale stroma do not have
LEFT_OUT = 0.05  # share of the clearly coloured area; of 42 H&E regions the most is 0.014
OTHER_SCALE = 0.05  # farther from the encoder's own um/px is worth a warning


@dataclass(frozen=True)
class PatchGeometry:
    """What a patch is, and what of it the encoder sees.

    Attributes:
        patch_px: Side of a patch, px at `mpp`.
        mpp: um/px of the grid.
        overlap: px at `mpp` that neighbours share.
        input_px: Side of the encoder's input.
        input_mpp: um/px of the input: `mpp` unless the patch is resampled to fit.
        inset_px: Where the input starts within the patch, px at `mpp` (centre crops).
    """

    patch_px: int
    mpp: float
    overlap: int
    input_px: int
    input_mpp: float
    inset_px: float

    @property
    def stride_px(self) -> int:
        """Distance between patches, px at `mpp`."""
        return self.patch_px - self.overlap


@dataclass(frozen=True, eq=False)
class Overview:
    """A small picture of a slide and the tissue found in it.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, tissue.
        pixel_level0: Width of a pixel in level-0 px.
    """

    picture: np.ndarray
    mask: np.ndarray
    pixel_level0: float


@dataclass(frozen=True, eq=False)
class SlidePlan:
    """Everything that reading a slide's patches needs.

    Attributes:
        source: The slide.
        geometry: Of the patches.
        coords: (N, 2) int64, top-left corners (x, y) of the kept patches, level-0 px, by (y, x).
        uncertain: (N,) bool: the overview could not be decoded there; whether there is tissue
            shows when the patch is read.
        padded: (N,) bool: reaches past the slide's edge.
        grid_patches: Patches of the grid, with and without tissue.
        least_tissue: Share of a patch.
        tissue_method: Rule, or the digest of an annotation.
        tissue_mm2: Area of tissue.
        saturation: Above which the overview's pixels count as tissue, 0 to 1; NaN if annotated.
        mpp0: um/px of level 0.
        mpp_source: Where it is from.
        level: That patches are read from.
        level0_size: (width, height), px.
        vendor: Format.
        allow_coarse: Level 0 may be enlarged by more than 10%.
        pad_edges: Patches past the edge were kept.
        columns: Windows across, by x of the patch; there are few.
        lines: Windows down, by y.
        tiles: JPEG tiles of the level, or None: OpenSlide reads everything.
        overview: For the preview.
        seconds: By stage: open, tissue.
    """

    source: SlideSource
    geometry: PatchGeometry
    coords: np.ndarray
    uncertain: np.ndarray
    padded: np.ndarray
    grid_patches: int
    least_tissue: float
    tissue_method: str
    tissue_mm2: float
    saturation: float
    mpp0: float
    mpp_source: str
    level: int
    level0_size: tuple[int, int]
    vendor: str
    allow_coarse: bool
    pad_edges: bool
    columns: dict[int, AxisWindow]
    lines: dict[int, AxisWindow]
    tiles: JpegLevel | None
    overview: Overview
    seconds: dict[str, float]

    @property
    def width_level0(self) -> float:
        """Side of a patch, level-0 px."""
        return self.geometry.patch_px * self.geometry.mpp / self.mpp0

    @cached_property
    def tissue_share(self) -> float:
        """Share of the tissue that lies in patches; NaN without tissue.

        The rest lies at edges, where no whole patch fits, or where there is too little of it.
        """
        mask, pixel = self.overview.mask, self.overview.pixel_level0
        outside = mask.copy()
        begin = np.rint(self.coords / pixel).astype(int)
        end = np.rint((self.coords + self.width_level0) / pixel).astype(int)
        for (left, top), (right, bottom) in zip(begin, end, strict=True):
            outside[max(0, top) : bottom, max(0, left) : right] = False
        return float(1 - outside.sum() / mask.sum()) if mask.any() else float("nan")

    def window(self, row: int) -> tuple[AxisWindow, AxisWindow]:
        """Columns and rows of the level's pixels around a patch."""
        x, y = self.coords[row].tolist()
        return self.columns[x], self.lines[y]

    @property
    def reader(self) -> str:
        """What reads the patches, as bags record it."""
        return "openslide-region-lanczos" if self.tiles is None else "jpeg-tiles-lanczos"


def patch_geometry(card: EncoderCard, options: EmbedOptions) -> PatchGeometry:
    """Patches as the field cuts them for an encoder, unless the options say otherwise.

    A 256 px patch at 0.5 um/px that is resized to 224 px is what 224 px at 0.571 um/px show: it is
    read so, in one resampling.

    Args:
        card: Facts of the encoder.
        options: May give mpp, patch_px and overlap.

    Returns:
        The geometry.

    Raises:
        EmbedError: The encoder has no scale of its own and none is given, or the overlap is not
            smaller than the patch.
    """
    mpp = options.mpp or card.mpp
    if mpp is None:
        raise EmbedError(
            f"{card.name} has no um/px of its own. Say at which to cut patches for it: --mpp 0.5 "
            "(20x) or --mpp 2 (5x)."
        )
    if card.mpp is not None and abs(mpp / card.mpp - 1) > OTHER_SCALE:
        logger.warning("%s reads %g um/px; embedding at %g, as asked.", card.name, card.mpp, mpp)
    patch_px = options.patch_px or card.field_patch_px
    if options.overlap >= patch_px:
        raise EmbedError(
            f"overlap={options.overlap} px: it must be smaller than the patch, {patch_px} px."
        )
    crop = card.field_fit == "centre crop" and patch_px == card.field_patch_px
    return PatchGeometry(
        patch_px=patch_px,
        mpp=mpp,
        overlap=options.overlap,
        input_px=card.input_px,
        input_mpp=mpp if crop else mpp * patch_px / card.input_px,
        inset_px=(patch_px - card.input_px) / 2 if crop else 0.0,
    )


def plan_slide(source: SlideSource, geometry: PatchGeometry, options: EmbedOptions) -> SlidePlan:
    """Open a slide, find its tissue and lay the grid.

    Args:
        source: The slide; its mpp goes before the options'.
        geometry: Of the patches.
        options: Tissue threshold, edges, coarse slides.

    Returns:
        The plan; without tissue its `coords` are empty.

    Raises:
        SlideError: Unreadable, or its scale is missing or too coarse.
        AnnotationError: The slide's GeoJSON is no use.
    """
    started = time.perf_counter()
    with open_row(source, options) as slide:
        level = slide.level_for(geometry.input_mpp, allow_coarse=options.allow_coarse)
        opened = time.perf_counter()
        tissue, overview = _tissue(slide, source)
        found = time.perf_counter()
        origins = grid_origins(
            slide,
            patch_px=geometry.patch_px,
            stride_px=geometry.stride_px,
            mpp=geometry.mpp,
            pad_edges=options.pad_edges,
        )
        width0 = geometry.patch_px * geometry.mpp / slide.mpp0
        sure = tissue.fractions(origins, width0)
        possible = sure
        if tissue.gaps.any():  # there may be tissue: those patches are tried
            possible = tissue.fractions(origins, width0, with_gaps=True)
        kept = np.flatnonzero((possible >= options.tissue) & (possible > 0))
        columns, lines = _windows(slide, geometry, origins[kept], allow_coarse=options.allow_coarse)
        tiles = _tiles(slide, level, origins[kept] + width0 / 2, options.reader)
        if tissue.gaps.all():
            _refuse_dead(slide, origins, geometry, options.allow_coarse)
        past = np.any(origins + width0 > np.asarray(slide.extent_xy) + 1e-6, axis=1)
        return SlidePlan(
            source=source,
            geometry=geometry,
            coords=origins[kept],
            # Not those whose decoded part is enough: their patches are as good as any.
            uncertain=(possible[kept] > sure[kept]) & (sure[kept] < max(options.tissue, 1e-9)),
            padded=past[kept],
            grid_patches=len(origins),
            least_tissue=options.tissue,
            tissue_method=tissue.method,
            tissue_mm2=float(tissue.mask.sum()) * tissue.mpp**2 / 1e6,
            saturation=tissue.threshold,
            mpp0=slide.mpp0,
            mpp_source=slide.mpp_source,
            level=level,
            level0_size=slide.size_level0,
            vendor=slide.vendor,
            allow_coarse=options.allow_coarse,
            pad_edges=options.pad_edges,
            columns=columns,
            lines=lines,
            tiles=tiles,
            overview=overview,
            seconds={"open": opened - started, "tissue": found - opened},
        )


def _windows(
    slide: Slide, geometry: PatchGeometry, coords: np.ndarray, *, allow_coarse: bool
) -> list[dict[int, AxisWindow]]:
    """Windows of one size by the patches' x, and by their y."""
    inset = geometry.inset_px * geometry.mpp / slide.mpp0
    level = slide.level_for(geometry.input_mpp, allow_coarse=allow_coarse)
    tables: list[dict[int, AxisWindow]] = [{}, {}]
    for axis, (table, scale) in enumerate(zip(tables, slide.level_scales[level], strict=True)):
        step = geometry.input_mpp / slide.mpp0 / scale
        side, margin = window_shape(step, geometry.input_px)
        for at in np.unique(coords[:, axis]).tolist():
            _, *reads = slide.plan_read(
                (at + inset, at + inset),
                geometry.input_px,
                geometry.input_mpp,
                allow_coarse=allow_coarse,
            )
            table[at] = axis_window(reads[axis], side, margin)
    return tables


def _tiles(slide: Slide, level: int, centres: np.ndarray, reader: str) -> JpegLevel | None:
    """The level's JPEG tiles, if patches are to be read from them and it is shown that they can."""
    if reader == "openslide" or not len(centres):
        return None
    spread = np.linspace(0, len(centres) - 1, min(CHECKED_PLACES, len(centres)) + 2)[1:-1]
    try:
        tiles = jpeg_level(slide, level)
        places = [(int(x), int(y)) for x, y in centres[spread.round().astype(int)]]
        check_pixels(slide, tiles, places)
    except TileLayoutError as error:
        if reader == "tiles":
            raise
        logger.debug("%s", error)
        return None
    return tiles


def no_tissue_reason(plan: SlidePlan) -> str:
    """Why a slide has no patches, as far as its overview shows it, and what to do."""
    picture = plan.overview.picture
    hint = ""
    if np.median(picture[::4, ::4]) < NEARLY_BLACK:
        hint = " The slide is black: if it stores 16 bits and uses fewer, convert it to 8 bits."
    elif not _coloured(picture) and int(picture.min()) < GREY_TISSUE:
        hint = " The slide is grey, and tissue is found by its colour: give --tissue-geojson."
    elif plan.source.tissue_geojson is not None:
        hint = " Its annotation says where tissue is."
    elif (share := _left_out(picture, plan.overview.mask)) > LEFT_OUT:
        hint = " " + _left_out_hint(share)
    return (
        f"{plan.source.slide_id}: none of {plan.grid_patches} patches has a tissue share of "
        f"{plan.least_tissue:g} or more.{hint} Look at its preview, or lower --tissue."
    )


def _left_out(picture: np.ndarray, mask: np.ndarray) -> float:
    """Share of the clearly coloured pixels (every second each way) that are not in the mask."""
    sample = picture[::2, ::2].astype(np.int16)
    high = sample.max(axis=2)
    coloured = (high - sample.min(axis=2) > CLEAR_COLOUR * high) & (high > NEARLY_BLACK)
    return float((coloured & ~mask[::2, ::2]).sum() / max(1, coloured.sum()))


def _left_out_hint(share: float) -> str:
    return (
        f"{share:.0%} of its coloured area was taken for pen ink or specks. Tissue is found by the "
        "colours of haematoxylin and eosin: if this is another stain (DAB, trichrome, ...), give "
        "--tissue-geojson."
    )


def _coloured(picture: np.ndarray) -> bool:
    return int((picture.max(axis=2) - picture.min(axis=2)).max()) > GREY_CHROMA


def _refuse_dead(slide: Slide, origins: np.ndarray, geometry: PatchGeometry, coarse: bool) -> None:
    """Fail a slide of which nothing can be decoded before each of its patches is tried in vain.

    Raises:
        SlideReadError: Not one of some patches, spread over the slide, could be.
    """
    first: SlideReadError | None = None
    probes = origins[np.linspace(0, len(origins) - 1, DEAD_PROBES).astype(int)]
    for x, y in probes:
        try:
            slide.read_region((x, y), geometry.input_px, geometry.input_mpp, allow_coarse=coarse)
            return
        except SlideReadError as error:
            first = first or error
    raise SlideReadError(
        f"{slide.slide_id}: nothing of its overview and none of {DEAD_PROBES} patches could be "
        f"decoded; first: {first}"
    )


def open_row(source: SlideSource, options: EmbedOptions) -> Slide:
    """Open a slide of a list; its own mpp goes before the options', that before the file's."""
    mpp = options.slide_mpp if source.mpp is None else source.mpp
    return open_source(source.path, mpp, slide_id=source.slide_id)


def _tissue(slide: Slide, source: SlideSource) -> tuple[TissueMask, Overview]:
    """The tissue, and the picture it was found in (read once for both)."""
    picture, gaps, used = slide.thumbnail_with_gaps(MASK_MPP)
    if source.tissue_geojson is None:
        mask, threshold = tissue_mask(picture, used)
        tissue = TissueMask(mask & ~gaps, used / slide.mpp0, used, threshold, gaps)
        share = _left_out(picture, mask | gaps)
        if mask.any() and share > LEFT_OUT:  # without any tissue `no_tissue_reason` says it
            logger.warning("%s: %s", slide.slide_id, _left_out_hint(share))
    else:
        tissue = annotated_tissue(source.tissue_geojson, slide, used)
    return tissue, Overview(picture, tissue.mask, tissue.pixel_level0)

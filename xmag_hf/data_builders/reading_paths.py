"""The tissue of a pair as other readers bring it to 5x: optional columns of the corpus.

- `image_5x_scanner`: from the scanner's own coarser level, the coarsest stored one that is at most
  10% coarser than 2.0 um/px and coarser than the level of the 20x view, brought to 2.0 um/px by
  Lanczos. Its reduction is the scanner's and its JPEG a second one. Readers that take "the best
  level for a downsample" show this picture.
- `image_5x_fast`: from the level that the contract reads, decoded at 1/2, 1/4 or 1/8 (the coarsest
  that is at most 10% coarser than 2.0 um/px), then Lanczos to 2.0 um/px. libjpeg-turbo's reduced
  decoding averages 2 x 2 or 4 x 4 decoded pixels (8 x 8: the DC term), so that is what is done
  here, on the level's own grid: any codec, same picture.
- `image_5x_wide`: the region and a margin around it, finer than 2.0 um/px, by the contract: what
  training with other um/px than 2.0 cuts its views from.

A column is null in the rows of a slide that has no such level.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from xmag_hf.slides import Slide, resample

from .corpus_options import REGION_UM, STUDENT_MPP, STUDENT_PX, TEACHER_MPP, CorpusOptions

SCANNER, FAST, WIDE = "image_5x_scanner", "image_5x_fast", "image_5x_wide"
COARSER = 0.10  # as much as the resampling contract enlarges a level 0
REDUCTIONS = (8, 4, 2)  # what libjpeg-turbo decodes to, beside whole size
LANCZOS_SUPPORT = 3


def other_columns(options: CorpusOptions) -> list[str]:
    """Names of the optional image columns that `options` ask for, in the order of the corpus."""
    return [SCANNER, FAST] * options.reading_paths + [WIDE] * (options.margin > 0)


def other_views(
    slide: Slide, xy_level0: tuple[int, int], options: CorpusOptions
) -> dict[str, np.ndarray | None]:
    """The optional views of one region.

    Args:
        slide: Open.
        xy_level0: Top-left corner of the region, level-0 px.
        options: Of the corpus.

    Returns:
        (H, W, 3) uint8 by column; None where the slide has no such level.

    Raises:
        SlideReadError: It could not be decoded.
    """
    readers = {SCANNER: read_scanner, FAST: read_fast}
    return {
        name: _read_wide(slide, xy_level0, options)
        if name == WIDE
        else readers[name](slide, xy_level0)
        for name in other_columns(options)
    }


def view_mpps(slide: Slide, options: CorpusOptions) -> dict[str, float | None]:
    """um/px that each optional view is decoded at (the wide one: has), None if there is none."""
    level, fast = scanner_level(slide), fast_reduction(slide)
    found = {
        SCANNER: None if level is None else slide.level_mpps[level],
        FAST: None if fast is None else slide.level_mpps[fast[0]] * fast[1],
        WIDE: wide_mpp(wide_px(options.margin)),
    }
    return {name: found[name] for name in other_columns(options)}


def scanner_level(slide: Slide) -> int | None:
    """The stored level behind `image_5x_scanner`; None if the slide has no coarser level."""
    seen = slide.level_mpps[slide.level_for(TEACHER_MPP, allow_coarse=True)]
    near = [
        level
        for level, mpp in enumerate(slide.level_mpps)
        if seen < mpp <= STUDENT_MPP * (1 + COARSER)
    ]
    return max(near, key=lambda level: slide.level_mpps[level]) if near else None


def read_scanner(slide: Slide, xy_level0: tuple[int, int]) -> np.ndarray | None:
    """A region at 2.0 um/px from the scanner's own coarser level, (224, 224, 3) uint8 or None."""
    level = scanner_level(slide)
    return None if level is None else _from_level(slide, level, xy_level0, 1)


def fast_reduction(slide: Slide) -> tuple[int, int] | None:
    """Level and factor behind `image_5x_fast`; None if the level is too near 2.0 um/px already."""
    level = slide.level_for(STUDENT_MPP, allow_coarse=True)
    for factor in REDUCTIONS:
        if slide.level_mpps[level] * factor <= STUDENT_MPP * (1 + COARSER):
            return level, factor
    return None


def read_fast(slide: Slide, xy_level0: tuple[int, int]) -> np.ndarray | None:
    """A region at 2.0 um/px as reduced decoding shows it, (224, 224, 3) uint8 or None."""
    found = fast_reduction(slide)
    return None if found is None else _from_level(slide, found[0], xy_level0, found[1])


def wide_px(margin: float) -> int:
    """Side of the wide view: 2.0 * (1 + margin) um/px times 224, at 2.0 * (1 - margin) um/px."""
    return math.ceil(STUDENT_PX * (1 + margin) / (1 - margin) - 1e-9)


def wide_mpp(side_px: int) -> float:
    """um/px of a wide view: its side says by what share it can be zoomed in as well as out."""
    share = (side_px - STUDENT_PX) / (side_px + STUDENT_PX)
    return STUDENT_MPP * (1 - share)


def _read_wide(slide: Slide, xy_level0: tuple[int, int], options: CorpusOptions) -> np.ndarray:
    """The wide view, centred on the region."""
    side_px = wide_px(options.margin)
    mpp = wide_mpp(side_px)
    before = (side_px * mpp - REGION_UM) / 2 / slide.mpp0  # level-0 px
    start = (xy_level0[0] - before, xy_level0[1] - before)
    return slide.read_region(start, side_px, mpp, allow_coarse=options.allow_coarse)


def _from_level(slide: Slide, level: int, xy_level0: tuple[int, int], factor: int) -> np.ndarray:
    """A region at 2.0 um/px from the pixels of one level, averaged by `factor` before Lanczos."""
    level_mpp = slide.level_mpps[level]
    scale, side = level_mpp / slide.mpp0, REGION_UM / level_mpp  # level-0 px per px; px
    margin = LANCZOS_SUPPORT * max(factor, STUDENT_MPP / level_mpp) + 1
    start = [math.floor((v / scale - margin) / factor) * factor for v in xy_level0]
    size = [
        math.ceil((v / scale + side + margin - first) / factor) * factor
        for v, first in zip(xy_level0, start, strict=True)
    ]
    # Whole pixels of the level, asked for at its own um/px: stored pixels, not resampled.
    pixels = slide.read_region((start[0] * scale, start[1] * scale), (size[0], size[1]), level_mpp)
    if factor > 1:
        pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
    left, top = ((v / scale - at) / factor for v, at in zip(xy_level0, start, strict=True))
    box = (left, top, left + side / factor, top + side / factor)
    return resample(pixels, (STUDENT_PX, STUDENT_PX), box)

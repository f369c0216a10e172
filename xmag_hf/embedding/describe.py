"""What a slide is, and how many patches its tissue makes at 5x and at 20x."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xmag_hf.slides import Slide, SlideScaleError, find_tissue, grid_origins
from xmag_hf.slides.tissue import TissueMask

from .options import EmbedOptions
from .plan import open_row
from .sources import SlideSource

MPP_5X, MPP_20X = 2.0, 0.5


@dataclass(frozen=True)
class SlideDescription:
    """Facts about a slide.

    Attributes:
        slide_id: Its name.
        path: The file.
        bytes: Size of the file.
        format: OpenSlide's vendor name.
        width: Of level 0, px.
        height: Of level 0, px.
        mpp0: um/px of level 0.
        mpp_source: Where it is from.
        objective: Power as the file says it, '' if it does not.
        level_mpps: um/px of each level.
        level_5x: Level that is read for 5x; None if even level 0 is too coarse.
        tissue_mm2: Area of tissue.
        patches_5x: Of `patch_px_5x` at 2.0 um/px with enough tissue.
        patches_20x: Of `patch_px_20x` at 0.5 um/px.
    """

    slide_id: str
    path: str
    bytes: int
    format: str
    width: int
    height: int
    mpp0: float
    mpp_source: str
    objective: str
    level_mpps: tuple[float, ...]
    level_5x: int | None
    tissue_mm2: float
    patches_5x: int
    patches_20x: int

    @property
    def ratio(self) -> float | None:
        """20x patches for one at 5x; the paper has 6,260 / 554 = 11.3."""
        return self.patches_20x / self.patches_5x if self.patches_5x else None


def describe_slide(
    source: SlideSource, *, patch_px_5x: int, patch_px_20x: int, least_tissue: float
) -> SlideDescription:
    """Open a slide and count its patches; nothing is decoded but the overview.

    Args:
        source: The slide.
        patch_px_5x: Side of a patch, px at 2.0 um/px.
        patch_px_20x: Side of a patch, px at 0.5 um/px.
        least_tissue: Share of a patch.

    Returns:
        The facts.

    Raises:
        SlideError: It cannot be opened, or its scale is missing.
    """
    with open_row(source, EmbedOptions()) as slide:
        tissue = find_tissue(slide)
        try:
            level_5x = slide.level_for(MPP_5X)
        except SlideScaleError:
            level_5x = None
        return SlideDescription(
            slide_id=slide.slide_id,
            path=str(source.path),
            bytes=source.path.stat().st_size,
            format=slide.vendor,
            width=slide.size_level0[0],
            height=slide.size_level0[1],
            mpp0=slide.mpp0,
            mpp_source=slide.mpp_source,
            objective=slide.objective,
            level_mpps=slide.level_mpps,
            level_5x=level_5x,
            tissue_mm2=float(tissue.mask.sum()) * tissue.mpp**2 / 1e6,
            patches_5x=_count(slide, tissue, patch_px_5x, MPP_5X, least_tissue),
            patches_20x=_count(slide, tissue, patch_px_20x, MPP_20X, least_tissue),
        )


def _count(slide: Slide, tissue: TissueMask, patch_px: int, mpp: float, least_tissue: float) -> int:
    origins = grid_origins(slide, patch_px=patch_px, stride_px=patch_px, mpp=mpp)
    fractions = tissue.fractions(origins, patch_px * mpp / slide.mpp0)
    return int(np.count_nonzero((fractions >= least_tissue) & (fractions > 0)))

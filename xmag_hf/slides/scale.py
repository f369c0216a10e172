"""um/px of a slide: from the caller, OME-XML, OpenSlide or the TIFF's resolution, in this order."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .errors import SlideScaleError
from .tiff import ome_mpp

MPP_RANGE = (0.05, 20.0)  # um/px; outside it a number in a header is not a microscope's scale
MAX_ANISOTROPY = 0.05  # x and y may differ by this share of the smaller one
TIFF_UNIT_UM = {"inch": 25_400.0, "centimeter": 10_000.0}


def resolve_mpp(
    slide_id: str, properties: Mapping[str, str], size: tuple[int, int], given: float | None
) -> tuple[float, str]:
    """(um/px of level 0, where it is from); `size` is (width, height) of level 0, px."""
    if given is not None:
        return _plausible_mpp(slide_id, given, given, "given"), "given"
    ome = ome_mpp(properties.get("tiff.ImageDescription", ""), size)
    if ome is not None:
        return _plausible_mpp(slide_id, *ome, "OME PhysicalSizeX, -Y"), "ome"
    texts = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
    if texts[0] is not None and texts[1] is not None:
        x, y = (number(text) for text in texts)
        return _plausible_mpp(slide_id, x, y, "openslide.mpp-x, -y"), "openslide"
    unit = TIFF_UNIT_UM.get(properties.get("tiff.ResolutionUnit", ""))
    tags = [number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if unit is not None and all(tag > 0 for tag in tags):
        x, y = (unit / tag for tag in tags)
        return _plausible_mpp(slide_id, x, y, "TIFF resolution tags"), "tiff"
    raise SlideScaleError(
        f"{slide_id}: the file does not say its um/px (no openslide.mpp-x, no TIFF resolution; "
        f"objective power {properties.get('openslide.objective-power', '(not given)')} is no "
        "scale). Give it in a column mpp of the slide CSV, as --slide-mpp (xmag corpus: --mpp), or "
        "as mpp=."
    )


def _plausible_mpp(slide_id: str, x: float, y: float, source: str) -> float:
    low, high = MPP_RANGE
    remedy = (
        "Give the right one with --mpp (corpus), --slide-mpp (embed, info), mpp=, or an mpp column "
        "in the slide CSV."
    )
    if not (low <= x <= high and low <= y <= high):
        raise SlideScaleError(
            f"{slide_id}: mpp {x:g} x {y:g} um/px ({source}) is outside {low} to {high}. {remedy}"
        )
    if max(x, y) > min(x, y) * (1 + MAX_ANISOTROPY):
        raise SlideScaleError(
            f"{slide_id}: mpp {x:g} x {y:g} um/px ({source}) differ by more than "
            f"{MAX_ANISOTROPY:.0%}. {remedy}"
        )
    return (x + y) / 2


def number(text: str | None) -> float:
    """A header's number, NaN when there is none (NaN fails every comparison)."""
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan

"""Scale bars: how long, and where in a picture. Whoever draws the picture draws the bar."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleBar:
    """A bar at the lower left, px of the picture; black with a white edge is seen on everything.

    Attributes:
        left: Its left end.
        top: Its upper edge.
        length: From left to right.
        thickness: From top to bottom.
        text: The length in words, to stand above it.
    """

    left: float
    top: float
    length: float
    thickness: float
    text: str


def scale_bar(width: int, height: int, pixel_um: float) -> ScaleBar:
    """The bar of a picture.

    Args:
        width: Of the picture, px.
        height: Of the picture, px.
        pixel_um: um per pixel of the picture.

    Returns:
        A bar of a round length, at most a quarter of the width.
    """
    length_um = scale_bar_um(width * pixel_um)
    margin, thickness = (share * min(width, height) for share in (0.03, 0.012))
    return ScaleBar(
        left=margin,
        top=height - margin - thickness,
        length=length_um / pixel_um,
        thickness=thickness,
        text=length_text(length_um),
    )


def scale_bar_um(width_um: float) -> float:
    """The longest of 1, 2, 5 x 10^n um that fits in a quarter of the width."""
    room = width_um / 4
    power = 10.0 ** math.floor(math.log10(room))
    return max(step * power for step in (1, 2, 5) if step * power <= room)


def length_text(um: float) -> str:
    """`200 um`, `5 mm`."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} \u00b5m"

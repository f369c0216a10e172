"""A picture of a slide with the outline of its tissue, the grid of its patches and a scale bar."""

from __future__ import annotations

import io
from collections.abc import Collection

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from xmag_hf.reporting.scale_bar import scale_bar

from .plan import SlidePlan

LARGEST_PX = 2000
SMALLEST_PX = 1000  # longest side: smaller overviews are enlarged, so that the grid can be seen
MOST_ENLARGED = 4.0
OUTLINE = (0, 140, 60)
GRID = (40, 70, 200)
PADDED = (230, 140, 0)
UNREADABLE = (220, 30, 30)
LINE_PX = 18  # of the two below the picture
BAR_FONT_PX = 14


def draw_preview(plan: SlidePlan, unreadable: Collection[int] = ()) -> Image.Image:
    """Tissue outline, patches and a scale bar; below, what the colours mean and what was found.

    Args:
        plan: Of the slide.
        unreadable: Rows of the plan's coords that could not be decoded.

    Returns:
        RGB picture, its longest side at most 2,000 px without the two lines below.
    """
    overview = plan.overview
    height, width = overview.mask.shape
    longest = max(height, width)
    factor = min(LARGEST_PX / longest, max(1.0, min(SMALLEST_PX / longest, MOST_ENLARGED)))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = np.array(Image.fromarray(overview.picture).resize(size, Image.Resampling.LANCZOS))
    mask = np.array(Image.fromarray(overview.mask).resize(size, Image.Resampling.NEAREST))
    picture[mask & ~ndimage.binary_erosion(mask, iterations=2)] = OUTLINE
    sheet = Image.new("RGB", (size[0], size[1] + 2 * LINE_PX), "white")
    sheet.paste(Image.fromarray(picture))
    pen = ImageDraw.Draw(sheet)
    scale = factor / overview.pixel_level0  # px of the picture per level-0 px
    side = plan.width_level0 * scale
    lost = set(unreadable)
    for row, (x, y) in enumerate(plan.coords * scale):
        colour = PADDED if plan.padded[row] else GRID
        right, bottom = min(x + side, size[0]) - 1, min(y + side, size[1]) - 1
        box = (x, y, max(x, right), max(y, bottom))  # Pillow refuses what is less than a pixel
        if row in lost:
            pen.line(box, UNREADABLE, 2)
            colour = UNREADABLE
        pen.rectangle(box, outline=colour)
    _draw_scale_bar(pen, size, plan.mpp0 / scale)
    _draw_legend(pen, size[1], plan, bool(mask.any()), lost)
    pen.text((4, size[1] + LINE_PX + 2), _caption(plan, len(lost)), fill="black")
    return sheet


def _draw_scale_bar(pen: ImageDraw.ImageDraw, size: tuple[int, int], pixel_um: float) -> None:
    bar = scale_bar(*size, pixel_um)
    font = ImageFont.load_default(BAR_FONT_PX)
    box = (bar.left, bar.top, bar.left + bar.length, bar.top + bar.thickness)
    pen.rectangle(box, "black", "white")
    # Above its left end and not its middle: a short bar is narrower than its text.
    place = (bar.left, bar.top - 4)
    text = bar.text.replace("\u00b5", "u")  # Pillow's own font has no such letter
    left, top, right, bottom = pen.textbbox(place, text, font, anchor="lb")
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), "white")
    pen.text(place, text, "black", font, anchor="lb")


def _draw_legend(
    pen: ImageDraw.ImageDraw, top: int, plan: SlidePlan, tissue: bool, lost: Collection[int]
) -> None:
    """Name the colours that are in the picture."""
    rows = range(len(plan.coords))
    shown = (
        ("tissue outline", OUTLINE, tissue),
        ("patch grid", GRID, any(not plan.padded[row] and row not in lost for row in rows)),
        ("padded patches", PADDED, any(plan.padded[row] and row not in lost for row in rows)),
        ("unreadable patches", UNREADABLE, bool(lost)),
    )
    x = 4.0
    for name, colour, there in shown:
        if there:
            pen.rectangle((x, top + 5, x + 9, top + 14), outline=colour, width=2)
            pen.text((x + 14, top + 3), name, fill="black")
            x += 14 + pen.textlength(name) + 16


def preview_png(plan: SlidePlan, unreadable: Collection[int] = ()) -> bytes:
    """`draw_preview` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    # Level 6 takes three times as long for a file that is a tenth smaller.
    draw_preview(plan, unreadable).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _caption(plan: SlidePlan, unreadable: int) -> str:
    geometry = plan.geometry
    text = (
        f"{plan.source.slide_id}: {len(plan.coords)} of {plan.grid_patches} patches, "
        f"{geometry.patch_px} px at {geometry.mpp:g} um/px; tissue {plan.tissue_mm2:.1f} mm2, "
        f"{100 * plan.tissue_share:.0f}% of it in patches"
    )
    # Pillow's own font has no more than Latin-1.
    text = text.encode("latin-1", "replace").decode("latin-1")
    return text + (f"; {unreadable} unreadable" if unreadable else "")

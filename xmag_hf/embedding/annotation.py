"""Tissue from a GeoJSON annotation, as QuPath exports it: level-0 px.

QuPath counts them from the scanned area's corner where a file states it (openslide.bounds-x and
-y: MIRAX, Leica), since its OpenSlide reader shows that area alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xmag_hf.slides import Slide, TissueMask

logger = logging.getLogger(__name__)

# A ring whose filled area and signed area differ by more than this share (and by more than its
# outline, in mask pixels) crosses itself.
CROSSING_SHARE = 0.02


class AnnotationError(ValueError):
    """A GeoJSON file that says nothing about tissue; the message names it and the remedy."""


def annotated_tissue(path: Path, slide: Slide, mpp: float) -> TissueMask:
    """Polygons of a GeoJSON file as a tissue mask.

    Polygons and MultiPolygons count, with their holes; points and lines say nothing about areas.
    A ring that crosses itself is filled by the even-odd rule, with a warning; an empty one is left
    out, with a warning.

    Args:
        path: FeatureCollection, Feature or geometry; (x, y) in level-0 px from the scanned area's
            corner, `slide.origin_xy`.
        slide: Gives size and scale.
        mpp: um per mask pixel.

    Returns:
        The mask; its method is that of `annotation_method`.

    Raises:
        AnnotationError: No GeoJSON, or no polygon covers any of the slide.
        OSError: The file cannot be read.
    """
    content = path.read_bytes()
    try:
        polygons = list(_polygons(json.loads(content)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AnnotationError(
            f"{slide.slide_id}: {path} is no GeoJSON ({type(error).__name__}: {error}). Export it "
            "again as a FeatureCollection of polygons in level-0 px."
        ) from error
    pixel_level0 = mpp / slide.mpp0
    width, height = (math.ceil(n / pixel_level0) for n in slide.size_level0)
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        area = np.zeros_like(mask)
        for number, ring in enumerate(polygon):
            placed = (ring + slide.origin_xy) / pixel_level0
            filled = _fill(placed, (width, height), f"{slide.slide_id}: {path.name}")
            area = area & ~filled if number else filled
        mask |= area
    if not mask.any():
        raise AnnotationError(
            f"{slide.slide_id}: none of the {len(polygons)} polygons in {path} covers any of the "
            f"slide ({slide.size_level0[0]} x {slide.size_level0[1]} px{_origin(slide)}). Give "
            "level-0 px, as QuPath exports them."
        )
    gaps = np.zeros_like(mask)
    return TissueMask(mask, pixel_level0, mpp, math.nan, gaps, annotation_method(content))


def _origin(slide: Slide) -> str:
    return f", counted from {slide.origin_xy}" if any(slide.origin_xy) else ""


def annotation_method(content: bytes) -> str:
    """How bags record an annotation: `geojson:` and 16 hex digits of the file's sha256."""
    return f"geojson:{hashlib.sha256(content).hexdigest()[:16]}"


def _polygons(node: Any) -> Iterator[list[np.ndarray]]:
    """Rings (n, 2) float64 of each polygon, the outer one first."""
    kind = node.get("type")
    if kind == "FeatureCollection":
        for feature in node["features"]:
            yield from _polygons(feature)
    elif kind == "Feature":
        if node.get("geometry"):
            yield from _polygons(node["geometry"])
    elif kind == "GeometryCollection":
        for geometry in node["geometries"]:
            yield from _polygons(geometry)
    elif kind == "Polygon":
        yield _rings(node["coordinates"])
    elif kind == "MultiPolygon":
        for polygon in node["coordinates"]:
            yield _rings(polygon)
    elif kind is None:
        raise ValueError("an object without a type")


def _rings(polygon: Any) -> list[np.ndarray]:
    rings = [np.asarray([point[:2] for point in ring], dtype=np.float64) for ring in polygon]
    if any(not np.isfinite(ring).all() for ring in rings):
        raise ValueError("a coordinate is no number")
    return [ring.reshape(-1, 2) for ring in rings]


def _fill(ring: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) bool inside of a ring in mask pixels, by the even-odd rule."""
    edges = np.roll(ring, -1, axis=0) - ring
    outline = float(np.hypot(*edges.T).sum())
    if outline == 0:
        logger.warning("%s: an empty polygon is left out.", where)
        return np.zeros(size[::-1], dtype=bool)
    filled = _even_odd(ring, edges, size)
    x, y = ring.T
    signed = abs(float(np.dot(x, edges[:, 1]) - np.dot(y, edges[:, 0]))) / 2
    inside = bool((ring >= 0).all() and (ring <= np.asarray(size)).all())
    difference = abs(float(filled.sum()) - signed)
    if inside and difference > max(outline, CROSSING_SHARE * signed):
        logger.warning("%s: a polygon crosses itself; filled by the even-odd rule.", where)
    return filled


def _even_odd(ring: np.ndarray, edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels whose centre has an odd number of edges to its left."""
    width, height = size
    rising, (x, y) = edges[:, 1], ring.T
    low, high = np.minimum(y, y + rising), np.maximum(y, y + rising)
    first = np.clip(np.ceil(low - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(high - 0.5), 0, height).astype(np.int64)
    # One entry for each row centre that an edge crosses.
    edge = np.repeat(np.arange(len(ring)), last - first)
    begin = np.cumsum(last - first) - (last - first)
    row = np.arange(len(edge)) - begin[edge] + first[edge]
    at = x[edge] + (row + 0.5 - y[edge]) * edges[edge, 0] / rising[edge]
    column = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)
    toggles = np.zeros((height, width + 1), np.uint8)  # modulo 256 keeps what is odd
    np.add.at(toggles, (row, column), 1)
    return (np.cumsum(toggles, axis=1, dtype=np.uint8)[:, :width] & 1).astype(bool)

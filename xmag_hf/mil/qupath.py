"""Attention of patches as GeoJSON that QuPath opens: one tile per patch, level-0 pixels.

QuPath counts them from the scanned area's corner where a file states it (openslide.bounds-x and
-y: MIRAX, Leica), since its OpenSlide reader shows that area alone.

Fields as QuPath's PathObjectTypeAdapters reads and writes them since v0.4 (its measurements are an
object of numbers since then): `id` a UUID, `properties` with objectType, name, color [r, g, b],
isLocked and measurements. Tiles are detections, which QuPath draws by the thousand and colours by
a measurement (Measure > Show measurement maps).
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np

# Names of the measurements: what QuPath lists in its measurement maps.
ATTENTION = "Attention"
RELATIVE = "Attention x patches"
PERCENTILE = "Attention percentile"


def qupath_geojson(
    slide_id: str,
    coords: np.ndarray,
    width_level0: float,
    attention: np.ndarray,
    colours: np.ndarray,
    *,
    size_level0: tuple[int, int] | None = None,
    origin_level0: tuple[int, int] = (0, 0),
    about: dict[str, Any] | None = None,
) -> bytes:
    """A FeatureCollection with one square tile per patch.

    Args:
        slide_id: Names the tiles' ids, which are the same each time.
        coords: (M, 2) top-left corners (x, y), level-0 px.
        width_level0: Side of a patch, level-0 px, exact.
        attention: (M,) sums to 1.
        colours: (M, 3) uint8 RGB.
        size_level0: (width, height) of the slide: tiles of padded patches end there.
        origin_level0: (x, y) of the scanned area, which QuPath counts from.
        about: Foreign member `xmag` of the collection; readers of GeoJSON ignore it (RFC 7946,
            section 6.1).

    Returns:
        The file's bytes, UTF-8. `Attention x patches` is 1 where attention is uniform;
        `Attention percentile` is the share of patches with less, ties halved, in percent.
    """
    corners = np.asarray(coords, dtype=np.float64)
    ends = corners + width_level0
    if size_level0 is not None:
        ends = np.minimum(ends, size_level0)
    corners, ends = corners - origin_level0, ends - origin_level0
    percentiles = percentile_ranks(attention)
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{slide_id}/{number}")),
            "geometry": {
                "type": "Polygon",
                "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
            },
            "properties": {
                "objectType": "tile",
                "name": f"patch {number}",
                "color": [int(part) for part in colours[number]],
                "isLocked": True,
                "measurements": {
                    ATTENTION: float(attention[number]),
                    RELATIVE: float(attention[number]) * len(attention),
                    PERCENTILE: float(percentiles[number]),
                },
            },
        }
        for number, ((x, y), (right, bottom)) in enumerate(
            zip(corners.tolist(), ends.tolist(), strict=True)
        )
    ]
    collection: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if any(origin_level0):
        about = (about or {}) | {"origin_level0": list(origin_level0)}
    if about:
        collection["xmag"] = about
    return json.dumps(collection, allow_nan=False).encode()


def percentile_ranks(values: np.ndarray) -> np.ndarray:
    """(M,) share of values below each, ties halved, 0 to 100."""
    from scipy.stats import rankdata

    return 100 * (rankdata(values) - 0.5) / len(values)

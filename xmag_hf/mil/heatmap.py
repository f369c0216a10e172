"""Attention of a head on slides: a picture, GeoJSON for QuPath, and the patches that got most.

Everything but the picture comes from the stored bag: nothing is encoded again, so a slide takes
seconds. A slide without a bag is embedded first and its bag kept.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xmag_hf._version import __version__
from xmag_hf.atomic_write import write_atomically
from xmag_hf.embedding import Bag, EmbedOptions, SlideSource, read_bag
from xmag_hf.embedding.sources import SLIDE_FAULTS, open_source, reason_of
from xmag_hf.slides import Slide, SlideReadError, sha256_head

from .errors import MILError
from .heatmap_pictures import (
    ColourScale,
    colour_scale,
    draw_contact_sheet,
    draw_overlay,
    pixel_means,
)
from .qupath import percentile_ranks, qupath_geojson
from .training_slides import warn_of_training_slides

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .predict import SlidePrediction

logger = logging.getLogger(__name__)

SCALES = ("linear", "rank")
BAGS = "bags"  # in the output folder, where no other is named
# Of two patches that share more than this of their area the contact sheet shows one.
SAME_TISSUE = 0.25


@dataclass(frozen=True)
class HeatmapOptions:
    """How heatmaps are made.

    Raises:
        MILError: A value outside its range, named.
    """

    bags: Path | None = field(
        default=None,
        metadata={
            "help": "folder of SLIDE_ID.h5; bags that are missing are made there; none is "
            f"OUT/{BAGS}",
            "metavar": "DIR",
        },
    )
    top: int = field(default=10, metadata={"help": "patches on the contact sheet; 0: no sheet"})
    scale: str = field(
        default="linear",
        metadata={
            "help": "colours by attention, or by its rank among the slide's patches (shows "
            "differences where attention is near zero, and hides how small they are)",
            "choices": SCALES,
        },
    )
    longest_px: int = field(
        default=1600, metadata={"help": "longer side of the overview", "metavar": "PX"}
    )

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("top", self.top >= 0, "at least 0"),
            ("scale", self.scale in SCALES, f"one of {', '.join(SCALES)}"),
            ("longest_px", self.longest_px >= 100, "at least 100 px"),
        ):
            if not good:
                raise MILError(f"{name}={getattr(self, name)!r}: it must be {rule}.")


@dataclass(frozen=True)
class HeatmapRecord:
    """What came of a slide.

    Attributes:
        slide_id: Of the slide.
        status: `ok`, `no_tissue` or `failed`.
        label: Predicted class; empty if there is none.
        probability: Of that class; NaN if there is none.
        patches: In its bag.
        seconds: Without embedding.
        files: Written.
        reason: Why it is not ok, or that patches of the slide are missing; else empty.
    """

    slide_id: str
    status: str
    label: str = ""
    probability: float = float("nan")
    patches: int = 0
    seconds: float = 0.0
    files: tuple[Path, ...] = ()
    reason: str = ""

    @property
    def problem(self) -> bool:
        """Whether somebody should look at the slide."""
        return bool(self.reason) and self.status != "no_tissue"


def make_heatmaps(
    sources: Sequence[SlideSource],
    head: str,
    out: Path,
    options: HeatmapOptions,
    *,
    encoder: str | None = None,
    reading: EmbedOptions | None = None,
) -> Iterator[HeatmapRecord]:
    """Write `<slide_id>.png`, `.geojson` and `-top.png` of each slide.

    Args:
        sources: The slides.
        head: Folder or repository of a trained head.
        out: Folder; made if need be.
        options: See there.
        encoder: Of the head's bags, for slides without one, as `load_encoder` takes it; None for
            the one that a table names, or that is part of an end-to-end model.
        reading: Of slides without a bag; scale, patch size and pooling are the head's.

    Yields:
        A record a slide; a slide that fails does not end the run.

    Raises:
        MILError: What `load_head` refuses, a head without attention, or slides without a bag whose
            encoder is not given or is another one.
        EmbedError: The encoder or options cannot embed.
        OSError: `out` cannot be written.
    """
    from .predict import head_of, load_head

    bags = options.bags or out / BAGS
    model = load_head(head)
    if head_of(model).config.model_type == "xmag_mean_pool":
        raise MILError(
            f"--head {head}: a mean-pool head, which has no attention to draw. Give an ABMIL head."
        )
    warn_of_training_slides(head, [source.slide_id for source in sources])
    missing = [source for source in sources if not _bag_path(bags, source).is_file()]
    reading = reading or EmbedOptions()
    without = _embed(missing, bags, model, encoder, reading) if missing else {}
    out.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if source.slide_id in without:
            yield without[source.slide_id]
            continue
        started = time.perf_counter()
        try:
            bag = read_bag(_bag_path(bags, source))
            given = dataclasses.replace(source, mpp=source.mpp or reading.slide_mpp)
            record = _one(given, bag, model, head, out, options)
            yield dataclasses.replace(record, seconds=time.perf_counter() - started)
        except SLIDE_FAULTS as error:
            reason = reason_of(source.slide_id, error)
            yield HeatmapRecord(source.slide_id, "failed", reason=reason)


def _bag_path(bags: Path, source: SlideSource) -> Path:
    return bags / f"{source.slide_id}.h5"


def _embed(
    missing: Sequence[SlideSource],
    bags: Path,
    model: Any,
    encoder: str | None,
    reading: EmbedOptions,
) -> dict[str, HeatmapRecord]:
    """Make the bags that the head takes; slide -> record, where none came of it."""
    from xmag_hf.embedding import embed_slides

    from .predict import head_encoder, head_geometry

    names = ", ".join(source.slide_id for source in missing[:3]) + ", ..." * (len(missing) > 3)
    where = f"{bags}" if bags.is_dir() else f"{bags}, which is not there"
    logger.info("embedding %d without a bag in %s: %s", len(missing), where, names)
    try:
        loaded = head_encoder(model, encoder, reading)
    except MILError as error:
        raise MILError(f"{names}: no bag in {where}. {error}") from None
    summary = embed_slides(missing, bags, loaded, head_geometry(model.config, reading))
    without = {}
    for record in summary.records:
        if not (bags / f"{record.slide_id}.h5").is_file():
            status = record.status if record.status == "no_tissue" else "failed"
            reason = record.reason or f"{record.slide_id}: {record.status}"
            without[record.slide_id] = HeatmapRecord(record.slide_id, status, reason=reason)
    return without


def _one(
    source: SlideSource,
    bag: Bag,
    model: PreTrainedModel,
    head: str,
    out: Path,
    options: HeatmapOptions,
) -> HeatmapRecord:
    from .predict import check_bag, patches_lost, predict_bag

    check_bag(model.config, bag)
    _check_slide(source, bag)
    prediction = predict_bag(model, bag)
    about = {
        "software": f"xmag_hf {__version__}",
        "head": Path(head).name,
        "scale": options.scale,
        "bag_encoder": str(bag.info.encoder),
        "bag_encoder_revision": str(bag.info.encoder_revision),
    }
    with open_source(source.path, source.mpp or bag.info.mpp0, slide_id=source.slide_id) as slide:
        made = draw_heatmap(slide, bag, prediction, options, about)
    files = []
    for suffix, content in made.items():
        files.append(out / f"{source.slide_id}{suffix}")
        write_atomically(files[-1], content)
    return HeatmapRecord(
        source.slide_id,
        "ok",
        prediction.label,
        float(np.max(prediction.probabilities)),
        len(bag.features),
        files=tuple(files),
        reason=patches_lost(bag),
    )


def _check_slide(source: SlideSource, bag: Bag) -> None:
    """Refuse a bag of another file: its coordinates would point at other tissue."""
    known = bag.info.slide_sha256_head
    if known is not None and sha256_head(source.path) != known:
        raise MILError(
            f"{source.slide_id}: the bag was made from another file than {source.path} (their "
            "first MiB or sizes differ). Give that slide, or remove the bag to embed this one."
        )


def draw_heatmap(
    slide: Slide,
    bag: Bag,
    prediction: SlidePrediction,
    options: HeatmapOptions,
    about: dict[str, str] | None = None,
) -> dict[str, bytes]:
    """Files of one slide, by the end of their names.

    Args:
        slide: Open; for the overview and the patches of the contact sheet.
        bag: Its bag.
        prediction: Attentions (M,) of the bag's patches, probabilities and label.
        options: See there.
        about: Stored in the files.

    Returns:
        `.png` the overlay, `.geojson`, and `-top.png` the contact sheet.

    Raises:
        MILError: Attention is uniform, the bag does not say how large its patches are, or they lie
            outside the slide.
    """
    attention = np.asarray(prediction.attentions, dtype=np.float64)
    width = _patch_width(slide, bag)
    if len(attention) > 1 and np.ptp(attention) == 0:
        raise MILError(
            f"{bag.slide_id}: attention is the same on all {len(attention)} patches, so there is "
            "nothing to draw: a mean-pool head has none. Give an ABMIL head."
        )
    values, scale = _coloured(attention, options.scale)
    colours = scale.rgb(values)
    # Never finer than what the head saw.
    mpp = max(bag.info.mpp or 0.0, max(slide.size_level0) * slide.mpp0 / options.longest_px)
    picture, _, mpp = slide.thumbnail_with_gaps(mpp)
    pixel = mpp / slide.mpp0
    means, covered = pixel_means(bag.coords, width, values, pixel, picture.shape[:2])
    top = spread_top(bag.coords, width, attention, options.top)
    about = about or {}
    made = {
        ".png": draw_overlay(
            picture,
            means,
            covered,
            scale,
            pixel_um=mpp,
            title=_title(bag, prediction),
            boxes=np.column_stack([bag.coords[top], np.full((len(top), 2), width)]) / pixel,
            about=about,
        ),
        ".geojson": qupath_geojson(
            bag.slide_id,
            bag.coords,
            width,
            attention,
            colours,
            size_level0=slide.size_level0,
            origin_level0=slide.origin_xy,
            about=about | {"label": prediction.label},
        ),
    }
    if len(top):
        made["-top.png"] = _sheet(slide, bag, attention, colours, top, width, about)
    return made


def _patch_width(slide: Slide, bag: Bag) -> float:
    width = bag.info.width_level0
    if width is None:
        raise MILError(
            f"{bag.slide_id}: the bag does not say how large its patches are. Import it with "
            "`xmag bags import`, which asks for their size."
        )
    outside = np.any((bag.coords < 0) | (bag.coords >= slide.size_level0), axis=1)
    if outside.any():
        x, y = bag.coords[np.flatnonzero(outside)[0]]
        raise MILError(
            f"{bag.slide_id}: {int(outside.sum())} patches start outside the slide of "
            f"{slide.size_level0[0]} x {slide.size_level0[1]} px, the first at ({x}, {y}). The bag "
            "belongs to another file, or its coordinates are no level-0 pixels."
        )
    return width


def _coloured(attention: np.ndarray, kind: str) -> tuple[np.ndarray, ColourScale]:
    """Values to colour, and the scale: attention times the patches, 1 where uniform; or ranks."""
    if kind == "rank":
        return percentile_ranks(attention), ColourScale("attention, percentile", 0.0, 100.0, False)
    relative = attention * len(attention)
    return relative, colour_scale(relative, "attention x patches (1: uniform)")


def _title(bag: Bag, prediction: SlidePrediction) -> str:
    share = float(np.max(prediction.probabilities))
    info = bag.info
    size = f", {info.patch_px} px at {info.mpp:g} \u00b5m/px" if info.patch_px and info.mpp else ""
    overlap = f", overlap {info.overlap} px" if info.overlap else ""
    return (
        f"{bag.slide_id}\n{prediction.label}, probability {share:.3f}; {len(bag.features):,} "
        f"patches{size}{overlap}"
    )


def spread_top(
    coords: np.ndarray, width_level0: float, attention: np.ndarray, count: int
) -> np.ndarray:
    """Rows of the patches with most attention, without near-copies.

    From the highest on, a patch that shares more than a quarter of its area with one already taken
    is left out: on an overlapping grid the highest ten would otherwise be one place ten times.

    Args:
        coords: (M, 2) level-0 px.
        width_level0: Side of a patch, level-0 px.
        attention: (M,).
        count: At most so many.

    Returns:
        (k,) int64 rows, highest first.
    """
    taken: list[int] = []
    for row in np.argsort(-attention, kind="stable"):
        if len(taken) == count:
            break
        shared = np.clip(width_level0 - np.abs(coords[taken] - coords[row]), 0, None).prod(axis=1)
        if not (shared > SAME_TISSUE * width_level0**2).any():
            taken.append(int(row))
    return np.asarray(taken, dtype=np.int64)


def _sheet(
    slide: Slide,
    bag: Bag,
    attention: np.ndarray,
    colours: np.ndarray,
    top: np.ndarray,
    width: float,
    about: dict[str, str],
) -> bytes:
    side = bag.info.patch_px or 224
    mpp = width * slide.mpp0 / side
    patches, captions = [], []
    for rank, row in enumerate(top, 1):
        x, y = bag.coords[row]
        caption = f"{rank}: {attention[row] * len(attention):.1f} x uniform\nat ({x}, {y})"
        try:
            patches.append(slide.read_region((x, y), side, mpp, allow_coarse=True))
        except SlideReadError:
            patches.append(np.full((side, side, 3), 128, np.uint8))
            caption += ", unreadable"
        captions.append(caption)
    share = attention[top].sum()
    return draw_contact_sheet(
        patches,
        captions,
        colours[top],
        patch_um=width * slide.mpp0,
        title=f"{bag.slide_id}: most attention ({share:.0%} of all on {len(top)} patches)",
        about=about,
    )

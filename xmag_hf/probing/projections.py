"""The flow of `xmag project`: rows of a probe -> embeddings -> pictures."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xmag_hf._version import __version__
from xmag_hf.atomic_write import atomic_file
from xmag_hf.encoders import load_encoder
from xmag_hf.reporting.pictures import draw_confusion
from xmag_hf.reporting.predictions import read_class_predictions

from .errors import ProbeError
from .images import ImageSplit, open_images, pooled_ids, split_name
from .options import ProbeOptions
from .pictures import (
    Panel,
    PictureOptions,
    draw_embeddings,
    per_class_rows,
    tsne,
)
from .probe import Advance, device, precision, row_features
from .record import shown_options
from .rows import plan_rows

logger = logging.getLogger(__name__)

PICTURE, POSITIONS = "tsne.png", "tsne.csv"


def project(
    options: ProbeOptions,
    picture: PictureOptions,
    out: Path,
    advance: Advance = lambda what, done, total: None,
) -> list[Path]:
    """Draw t-SNE panels of every row of `options`, and write the positions beside the picture.

    All rows show the same images: those of one split (`test` if there is one), at most
    `picture.per_class` of each class.

    Args:
        options: Data and rows, as for a probe; its embeddings are shared with `xmag probe`.
        picture: See there.
        out: Folder, made if it is not there.
        advance: For progress bars.

    Returns:
        The files written.

    Raises:
        ProbeError: Data without labels, an unknown split, or what `tsne` refuses.
        EncoderError: An encoder that cannot be had.
    """
    rows = plan_rows(options)
    images = open_images(options, lambda done, total: advance("reading images", done, total))
    names = _splits(picture.split, images.splits)
    labels = np.concatenate([_labels(images.name, images.splits[name]) for name in names])
    ids = pooled_ids({name: images.splits[name] for name in names})
    shown = per_class_rows(labels, picture.per_class, options.seed)
    panels = []
    for row in rows:
        encoder = load_encoder(row.name, device=device(options), precision=precision(options))
        features = row_features(row, encoder, images, options, advance)
        del encoder  # the next one may need the memory
        x = np.concatenate([features[name] for name in names])[shown]
        logger.info("%s: t-SNE of %d images", row.label, len(shown))
        points = tsne(x, metric=picture.metric, perplexity=picture.perplexity, seed=options.seed)
        panels.append(Panel(f"{row.label.rsplit('@', 1)[0]} at {row.mpp:g} um/px", points))
    out.mkdir(parents=True, exist_ok=True)
    title = (
        f"{images.name} ({', '.join(names)}): t-SNE, {picture.metric}, perplexity "
        f"{picture.perplexity:g}, seed {options.seed}"
    )
    about = _about(options, picture)
    draw_embeddings(panels, labels[shown], images.classes, out / PICTURE, title=title, about=about)
    text = [images.classes[label] for label in labels[shown]]
    _write_positions(out / POSITIONS, ids[shown], text, panels)
    return [out / PICTURE, out / POSITIONS]


def confusion_pictures(predictions: Sequence[Path], out: Path) -> list[Path]:
    """Draw the confusion matrices of predictions CSVs of `xmag probe`.

    Of repeats the first is drawn, so that every image counts once.

    Args:
        predictions: The CSVs.
        out: Folder, made if it is not there.

    Returns:
        A PNG each, named after its CSV; after the folders above it too, as many as it takes, where
        two CSVs are named alike.

    Raises:
        ProbeError: A CSV named twice, or two that differ in their ending alone.
        ReportError: See `read_class_predictions`.
    """
    names = _telling_names(predictions)
    return [_confusion(path, name, out) for path, name in zip(predictions, names, strict=True)]


def _telling_names(paths: Sequence[Path]) -> list[str]:
    """Stems, after as many of the folders above them as tell the paths apart."""
    # Not `resolve`, which would take the name of a link's target.
    whole = [Path(os.path.abspath(path)) for path in paths]
    parts = [(*path.parts[1:-1], path.stem) for path in whole]
    depth, names = 1, [own[-1] for own in parts]
    while len(set(names)) < len(names):
        if depth > max(map(len, parts)):
            named = zip(paths, names, strict=True)
            same = [str(path) for path, name in named if names.count(name) > 1]
            raise ProbeError(
                f"--predictions {' '.join(same[:2])}: would be one picture. Name a file once, or "
                "draw the second into another --out."
            )
        depth += 1
        names = ["-".join(own[-depth:]) for own in parts]
    return names


def _confusion(predictions: Path, name: str, out: Path) -> Path:
    """The picture of one CSV, `name` in its title and file."""
    labels, probabilities, classes = read_class_predictions(predictions)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-confusion.png"
    repeat = f" (repeat 1 of {len(probabilities)})" if len(probabilities) > 1 else ""
    draw_confusion(
        labels,
        probabilities[0].argmax(axis=1),
        classes,
        path,
        title=name + repeat,
        about={"Software": f"xmag_hf {__version__}", "Comment": f"from {predictions.name}"},
    )
    return path


def _splits(wanted: str | None, splits: dict[str, ImageSplit]) -> list[str]:
    if wanted is None:
        return ["test"] if "test" in splits else list(splits)
    if split_name(wanted) not in splits:
        raise ProbeError(f"--split {wanted}: no such split; there are {', '.join(splits)}.")
    return [split_name(wanted)]


def _labels(name: str, split: ImageSplit) -> np.ndarray:
    if split.labels is None:
        raise ProbeError(f"{name}: images without labels have no colours; give --label-column.")
    return split.labels


def _about(options: ProbeOptions, picture: PictureOptions) -> dict[str, str]:
    given = shown_options(options) | dataclasses.asdict(picture)
    return {"Software": f"xmag_hf {__version__}", "Comment": json.dumps(given, default=str)}


def _write_positions(path: Path, ids: np.ndarray, labels: list[str], panels: list[Panel]) -> None:
    with atomic_file(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        axes = [f"{panel.title}: {axis}" for panel in panels for axis in "xy"]
        writer.writerow(["id", "label", *axes])
        positions = np.concatenate([panel.points for panel in panels], axis=1)
        for name, label, values in zip(ids, labels, positions, strict=True):
            writer.writerow([name, label, *(f"{value:.6g}" for value in values)])

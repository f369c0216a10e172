"""Counts of nuclei from embeddings by ridge regression, and counts of nuclei from a CSV.

The harder yardstick: a class can be told from colour, a count cannot.
"""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath

import numpy as np
import scipy.linalg
from sklearn.model_selection import GroupKFold, KFold
from sklearn.preprocessing import StandardScaler

from xmag_hf.reporting.tables import MISSING, doubled_heading

from .errors import ProbeError
from .images import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

ALPHAS = tuple(np.logspace(2, 7, 11))
INNER_FOLDS = 5
IMAGE_COLUMNS = ("image", "field")


def count_probe(
    x: np.ndarray,
    counts: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    folds: int = 5,
    seeds: Sequence[int] = range(5),
    alphas: Sequence[float] = ALPHAS,
) -> np.ndarray:
    """Predict log(1 + count) of each type, out of fold, by ridge regression.

    StandardScaler on all training rows of a fold, then ridge regression of all types at once, with
    one alpha for them chosen by the mean R^2 of 5 inner folds: scikit-learn's
    RidgeCV(alphas, cv=5) with several targets. Outer folds: KFold(folds, shuffle=True,
    random_state=seed); with groups whole groups are shuffled instead, and the inner folds keep
    groups together too. The inner folds follow the order of the rows: on a hundred images another
    order, or reflection padding that starts a pixel later, moves a rank correlation by 0.05 (0.12
    at worst, measured on CRCHistoPhenotypes at 2.0 um/px).

    Args:
        x: (N, D) float.
        counts: (N, K) ints, K types of nuclei.
        groups: (N,) image or patient; None when every row is its own.
        folds: Outer folds.
        seeds: One partition each.
        alphas: Candidates of ridge's penalty.

    Returns:
        (seeds, N, K) float64, predicted log(1 + count).

    Raises:
        ProbeError: Shapes, NaN, negative counts, a type that is the same everywhere, or fewer rows
            or groups than folds.
    """
    x, y = _checked(x, counts)
    unit = np.arange(len(x)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(unit) != len(x):
        raise ProbeError(f"groups: {len(unit)} for {len(x)} rows; give one for each row.")
    units = int(unit.max()) + 1
    if units < max(folds, 2) or units - math.ceil(units / folds) < INNER_FOLDS:
        raise ProbeError(
            f"--folds={folds}: {units} {'rows' if groups is None else 'groups'} are too few for "
            f"{folds} outer and {INNER_FOLDS} inner folds; give more images."
        )
    out = np.empty((len(seeds), *y.shape))
    for number, seed in enumerate(seeds):
        splitter = KFold(folds, shuffle=True, random_state=seed)
        for train_units, test_units in splitter.split(np.arange(units)):
            train = np.flatnonzero(np.isin(unit, train_units))
            test = np.flatnonzero(np.isin(unit, test_units))
            # Inner folds of plain rows are those of RidgeCV(cv=5): in order, not shuffled.
            inner = KFold(INNER_FOLDS) if groups is None else GroupKFold(INNER_FOLDS)
            parts = list(inner.split(train, groups=None if groups is None else unit[train]))
            scaler = StandardScaler().fit(x[train])
            own = np.asarray(scaler.transform(x[train]), dtype=np.float64)
            new = np.asarray(scaler.transform(x[test]), dtype=np.float64)
            best = _best_alpha(own, y[train], parts, alphas)
            out[number, test] = ridge_path(own, y[train], new, [best])[0]
    return out


def ridge_path(
    x: np.ndarray, y: np.ndarray, x_new: np.ndarray, alphas: Sequence[float]
) -> np.ndarray:
    """Ridge regression with an intercept for many penalties and targets at once.

    The same predictions as scikit-learn's Ridge(alpha), from one eigendecomposition of the smaller
    Gram matrix: RidgeCV with inner folds solves anew for every alpha, 40 times as long here.

    Args:
        x: (n, D) float64.
        y: (n, K).
        x_new: (m, D).
        alphas: A penalties above 0.

    Returns:
        (A, m, K) predictions for `x_new`.
    """
    mean, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, x_new, y = x - mean, x_new - mean, y - mean_y
    wide = x.shape[0] < x.shape[1]
    values, vectors = scipy.linalg.eigh(x @ x.T if wide else x.T @ x)
    left = (x_new @ x.T if wide else x_new) @ vectors
    right = vectors.T @ (y if wide else x.T @ y)
    shrunk = right / (np.maximum(values, 0)[:, None] + np.asarray(alphas)[:, None, None])
    return mean_y + left @ shrunk


def _best_alpha(x: np.ndarray, y: np.ndarray, parts: list, alphas: Sequence[float]) -> float:
    """The alpha of the best R^2, mean over targets and inner folds, as RidgeCV takes it."""
    total = np.zeros(len(alphas))
    for train, test in parts:
        wrong = ((ridge_path(x[train], y[train], x[test], alphas) - y[test]) ** 2).sum(axis=1)
        spread = ((y[test] - y[test].mean(axis=0)) ** 2).sum(axis=0)
        # scikit-learn's R^2 of a constant target: 0 unless it is met exactly.
        scores = np.where(spread > 0, 1 - wrong / np.where(spread > 0, spread, 1), 0.0)
        total += scores.mean(axis=1)
    return float(alphas[int(total.argmax())])


def nuclei_types(nuclei_csv: Path | str) -> tuple[str, ...]:
    """Types of nuclei in a CSV, sorted; nuclei whose type is empty are of none.

    Raises:
        ProbeError: As `nuclei_counts`, or no nucleus has a type.
    """
    table = _read_nuclei(Path(nuclei_csv))
    types = tuple(sorted({kind for nuclei in table.values() for *_, kind in nuclei} - {""}))
    if not types:
        raise ProbeError(f"{nuclei_csv}: no nucleus has a type; fill the column type.")
    return types


def nuclei_counts(
    nuclei_csv: Path | str,
    ids: Sequence[str] | np.ndarray,
    boxes: np.ndarray,
    types: Sequence[str],
) -> np.ndarray:
    """Count nuclei by type in boxes of images.

    Args:
        nuclei_csv: Columns image (or field), x, y (px of the image), type; a line a nucleus. An
            empty type, or NA, is allowed (a nucleus that nobody typed) and counted nowhere.
        ids: (N,) image of each box. Folders and endings of image files (here or in the CSV) are
            looked past where that leaves no doubt: f0 is images/f0.png.
        boxes: (N, 4) left, top, right, bottom in px of the image, right and bottom outside;
            infinities count whole images.
        types: K types, in the order wanted.

    Returns:
        (N, K) int64. An image without a line has no nuclei, and this is logged; see
        `images_without_nuclei`.

    Raises:
        ProbeError: Unreadable file, missing column, x or y not a number, unknown type, boxes of
            another shape, or a file that names less than half of the images.
    """
    table = _read_nuclei(Path(nuclei_csv))
    known = {kind for nuclei in table.values() for *_, kind in nuclei} - {""}
    unknown = [kind for kind in types if kind not in known]
    if unknown:
        raise ProbeError(
            f"{nuclei_csv}: no nucleus of type {unknown[0]!r}; it has {', '.join(sorted(known))}."
        )
    if np.shape(boxes) != (len(ids), 4) or np.isnan(boxes).any():
        raise ProbeError(f"boxes: shape {np.shape(boxes)} or NaN; expected ({len(ids)}, 4).")
    places = {
        name: (np.array([(x, y) for x, y, _ in rows]), np.array([kind for *_, kind in rows]))
        for name, rows in table.items()
    }
    found = _image_keys(Path(nuclei_csv), ids, places)
    counts = np.zeros((len(found), len(types)), dtype=np.int64)
    for row, key in enumerate(found):
        if key is None:
            continue
        xy, kind = places[key]
        left, top, right, bottom = boxes[row]
        inside = (xy >= (left, top)).all(axis=1) & (xy < (right, bottom)).all(axis=1)
        counts[row] = [(kind[inside] == wanted).sum() for wanted in types]
    return counts


def images_without_nuclei(
    nuclei_csv: Path | str, ids: Sequence[str] | np.ndarray
) -> tuple[str, ...]:
    """Those of `ids` that no line of the CSV names, each once; errors as `nuclei_counts`."""
    found = _image_keys(Path(nuclei_csv), ids, _read_nuclei(Path(nuclei_csv)), log=False)
    names = (str(name) for name, key in zip(ids, found, strict=True) if key is None)
    return tuple(dict.fromkeys(names))


def _image_keys(
    path: Path, ids: Sequence[str] | np.ndarray, places: Collection[str], log: bool = True
) -> list[str | None]:
    """What the CSV calls each image; None where it names it nowhere."""
    names = list(dict.fromkeys(str(name) for name in ids))
    in_file, asked = Counter(map(_stem, places)), Counter(map(_stem, names))
    by_stem = {_stem(key): key for key in places}
    found: dict[str, str | None] = {}
    for name in names:
        stem = _stem(name)
        doubtful = in_file[stem] > 1 or asked[stem] > 1
        found[name] = name if name in places else None if doubtful else by_stem.get(stem)
    empty = [name for name, key in found.items() if key is None]
    if 2 * len(empty) > len(names):
        raise ProbeError(
            f"{path}: names {len(names) - len(empty) or 'none'} of the {len(names)} images "
            f"({empty[0]!r}, ...; the file has {next(iter(places))!r}, ...). Give --id-column, the "
            "file of this data set, or leave out images that nobody looked at."
        )
    if empty and log:
        logger.warning(
            "%s: names none of %d of %d images (%s, ...); counted as 0.",
            *(path, len(empty), len(names), empty[0]),
        )
    return [found[str(name)] for name in ids]


def _stem(name: str) -> str:
    """Without folders and without the ending of an image file."""
    path = PurePath(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name


def _read_nuclei(path: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Image -> (x, y, type) of its nuclei."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            image = next((column for column in IMAGE_COLUMNS if column in names), None)
            missing = [column for column in ("x", "y", "type") if column not in names]
            if image is None or missing:
                raise ProbeError(
                    f"{path}: columns {', '.join(names) or 'none'}; needs image (or field), x, y, "
                    "type."
                )
            twice = doubled_heading([n for n in names if n in (image, "x", "y", "type")])
            if twice is not None:
                raise ProbeError(f"{path}: column {twice} stands there twice. Drop or rename one.")
            table: dict[str, list[tuple[float, float, str]]] = {}
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                point = (_pixel(row["x"], where), _pixel(row["y"], where))
                name, kind = ((row[column] or "").strip() for column in (image, "type"))
                if name.lower() in MISSING:
                    raise ProbeError(f"{where}: no image; fill it or drop the line.")
                kind = "" if kind.lower() in MISSING else kind
                table.setdefault(name, []).append((*point, kind))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProbeError(f"{path}: cannot be read as CSV: {error}.") from error
    if not table:
        raise ProbeError(f"{path}: no nuclei; a file of at least one line is needed.")
    return table


def _pixel(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ProbeError(f"{where}: {text!r} is no position in px; correct it or drop the line.")
    return value


def _checked(x: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features, and log(1 + count)."""
    counts = np.asarray(counts)
    if x.ndim != 2 or counts.ndim != 2 or len(x) != len(counts):
        raise ProbeError(
            f"features {x.shape}, counts {counts.shape}; expected (N, D) and (N, types)."
        )
    if not np.isfinite(x).all():
        raise ProbeError("features: NaN or infinite; embed those images again, or in fp32.")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ProbeError("counts: NaN or negative; give numbers of nuclei.")
    constant = np.flatnonzero((counts == counts[:1]).all(axis=0))
    if len(constant):
        raise ProbeError(
            f"counts: column {constant[0]} is {counts[0, constant[0]]} in every row, so no rank "
            "correlation exists; leave that type out with --nuclei-types."
        )
    return x, np.log1p(counts.astype(np.float64))

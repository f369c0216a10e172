"""What stain, blur, JPEG and the way a slide is read do to student and teacher.

Pixels are changed at 20x, as a stainer, an objective and a scanner do, and reduced to 5x after
that, so both magnifications see the same damage. Centred cosine: an encoder's features of clean
and changed tissue, its mean clean feature subtracted. A 20x encoder's feature of a region is the
mean of its sixteen sub-patches; each sub-patch by itself is printed, too. Yardsticks: probes learn
from clean images and are asked about changed ones (GlaS by patient, counts of nuclei by field).
What is finished lies in --out, and the same command goes on after a stop. Writes results.json,
table.md and robustness.png.

    python studies/robustness.py SLIDES... --student DIR --glas glas --crchisto crchisto --out out
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from magnification import CRCHISTO_MPP, GLAS_MPP, TYPES, field_counts, field_features, open_fields
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import KFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xmag_hf.atomic_write import atomic_file
from xmag_hf.data_builders.pairs import reduce_region
from xmag_hf.data_builders.reading_paths import read_fast, read_scanner
from xmag_hf.distillation.augmentation import draw_stain, stain_jitter, sub_patches
from xmag_hf.distillation.teacher_encoding import encode_sub_patches
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.evaluation import roc_auc, spearman
from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.probing.counts import ALPHAS
from xmag_hf.probing.features import embed_images
from xmag_hf.probing.images import LabelledImages, open_images
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.slides import Slide, find_tissue, grid_origins, open_slide

REGION_PX, TEACHER_MPP, STUDENT_MPP = 896, 0.5, 2.0
GRADES = {
    "stain": (0.05, 0.1, 0.2, 0.3),  # scales and shifts of the stains, drawn within +- this
    "blur": (0.25, 0.5, 1.0, 2.0),  # sigma of a Gaussian, um
    "jpeg": (90, 70, 50, 30),  # quality, chroma at half size
}
UNITS = {"stain": "largest change of stains", "blur": "blur, sigma in um", "jpeg": "JPEG quality"}
CLEAN = ("clean", 0.0)
Condition = tuple[str, float]
COLOURS = {"student at 5x": "#0072B2", "teacher at 20x": "#D55E00", "teacher at 5x": "#999999"}


def parse() -> argparse.Namespace:
    """Options of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", nargs="+", help="slides at 20x or finer")
    parser.add_argument("--student", required=True, help="folder of a distilled student")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--glas", type=Path, help="images/ and labels.csv; none: no yardsticks")
    parser.add_argument("--crchisto", type=Path, help="images/ and nuclei.csv")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--regions", type=int, default=6, help="a slide")
    parser.add_argument(
        "--grades", type=int, nargs="+", default=[0, 1, 2, 3], help="of the four, from 0"
    )
    parser.add_argument(
        "--yardstick-grades", type=int, nargs="+", default=[1, 3], help="of the four, from 0"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, write results, table and picture."""
    keep_freed_memory()
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_other_options(args)
    encoders = {
        "student at 5x": (load_encoder(args.student), STUDENT_MPP),
        "teacher at 20x": (load_encoder(args.teacher), TEACHER_MPP),
        "teacher at 5x": (load_encoder(args.teacher), STUDENT_MPP),
    }
    results: dict[str, Any] = {"options": {k: str(v) for k, v in vars(args).items() if k != "out"}}
    results["features"] = feature_shifts(args, encoders)
    write(args.out, results)
    results["reading paths"] = reading_paths(args, encoders)
    write(args.out, results)
    if args.glas and args.crchisto:
        results["yardsticks"] = {}
        for name, (encoder, mpp) in sorted(encoders.items(), key=lambda item: -item[1][1]):
            results["yardsticks"][name] = yardsticks(args, name, encoder, mpp)
            write(args.out, results)
    print((args.out / "table.md").read_text())


def write(out: Path, results: dict[str, Any]) -> None:
    """Whatever is measured so far."""
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(as_table(results))
    draw(results, out / "robustness.png")


def refuse_other_options(args: argparse.Namespace) -> None:
    """Stored features belong to one set of options."""
    mine = {k: str(v) for k, v in vars(args).items() if not k.endswith(("out", "grades"))}
    path = args.out / "options.json"
    if path.exists() and json.loads(path.read_text()) != mine:
        raise SystemExit(f"{args.out} was begun with other options; choose another --out.")
    path.write_text(json.dumps(mine, indent=1))


def conditions(numbers: Sequence[int]) -> list[Condition]:
    """Clean, then these grades of every change."""
    return [CLEAN, *((kind, grades[n]) for kind, grades in GRADES.items() for n in numbers)]


def changed(pixels: np.ndarray, condition: Condition, mpp: float, seed: int) -> np.ndarray:
    """Tissue as a stainer, an objective or a codec would have changed it.

    Args:
        pixels: (H, W, 3) uint8.
        condition: What, and how much.
        mpp: um/px of the pixels.
        seed: Of the stain: the same direction for every grade of one image.

    Returns:
        (H, W, 3) uint8.
    """
    kind, grade = condition
    if kind == "stain":
        stain = torch.from_numpy(draw_stain(np.random.default_rng(seed), grade))[None]
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        image = (stain_jitter(image, stain)[0] * 255).round().byte()
        return image.permute(1, 2, 0).numpy()
    if kind == "blur":
        blurred = pixels.astype(np.float32)
        for axis in (0, 1):
            blurred = gaussian_filter1d(blurred, grade / mpp, axis=axis, mode="nearest")
        return blurred.round().astype(np.uint8)
    if kind == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(grade))
        return np.asarray(Image.open(buffer))
    return pixels


# --- features of regions ----------------------------------------------------------------------


def stored(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What an earlier run computed, or `make()`."""
    if path.exists():
        return np.load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = make()
    with atomic_file(path) as file:
        np.save(file, array)
    return array


def places(slide: Slide, count: int, seed: int) -> list[tuple[int, int]]:
    """Regions of a slide that are mostly tissue, drawn at random."""
    origins = grid_origins(slide, patch_px=REGION_PX, stride_px=REGION_PX, mpp=TEACHER_MPP)
    full = origins[
        find_tissue(slide).fractions(origins, REGION_PX * TEACHER_MPP / slide.mpp0) > 0.5
    ]
    chosen = np.random.default_rng(seed).permutation(len(full))[:count]
    return [(int(x), int(y)) for x, y in full[np.sort(chosen)]]


def region_pixels(args: argparse.Namespace) -> np.ndarray:
    """(n, 896, 896, 3) uint8 of every slide."""
    found = []
    for path in args.slides:
        with open_slide(path) as slide:
            for xy in places(slide, args.regions, args.seed):
                found.append(slide.read_region(xy, REGION_PX, TEACHER_MPP))
    return np.stack(found)


def embed_regions(regions: Sequence[np.ndarray], encoder: Encoder, mpp: float) -> np.ndarray:
    """(n, D) at 5x, (n, 16, D) at 20x."""
    if mpp == STUDENT_MPP:
        return encode_sub_patches(encoder, np.stack([reduce_region(r) for r in regions]), 16)
    return np.stack([encode_sub_patches(encoder, sub_patches(r), 16) for r in regions])


def feature_shifts(
    args: argparse.Namespace, encoders: dict[str, tuple[Encoder, float]]
) -> dict[str, Any]:
    """Centred cosine of every encoder under every change."""
    regions = stored(args.out / "regions.npy", lambda: region_pixels(args))
    found: dict[str, dict[str, Any]] = {name: {} for name in [*encoders, "teacher at 20x, each"]}
    for condition in conditions(args.grades):
        shown: list[np.ndarray] = []
        for name, (encoder, mpp) in encoders.items():
            path = args.out / "regions" / f"{name}, {condition[0]} {condition[1]}.npy"
            if not path.exists() and not shown:
                shown = [changed(r, condition, TEACHER_MPP, i) for i, r in enumerate(regions)]
            x = stored(path, lambda e=encoder, m=mpp, s=shown: embed_regions(s, e, m))
            clean = np.load(path.with_name(f"{name}, clean 0.0.npy"))
            key = f"{condition[0]} {condition[1]:g}"
            if mpp == TEACHER_MPP:
                found["teacher at 20x, each"][key] = agreement(
                    x.reshape(-1, x.shape[-1]), clean.reshape(-1, x.shape[-1])
                )
                x, clean = x.mean(1), clean.mean(1)
            found[name][key] = agreement(x, clean)
            print(name, key, found[name][key], flush=True)
    return found


def agreement(x: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    """Cosine of rows with clean ones, raw and centred, and the latter's tenth percentile."""
    raw, centred = cosines(x, clean), cosines(x - clean.mean(0), clean - clean.mean(0))
    return {
        "cosine": float(raw.mean()),
        "centred": float(centred.mean()),
        "p10": float(np.percentile(centred, 10)),
        "n": len(x),
    }


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, (n,)."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# --- how a slide is read ----------------------------------------------------------------------


def reading_paths(
    args: argparse.Namespace, encoders: dict[str, tuple[Encoder, float]]
) -> dict[str, Any]:
    """5x encoders on four pictures of the same tissue, against the one that students learn from."""
    views: dict[str, list[tuple[int, np.ndarray]]] = {}
    number = 0
    for path in args.slides:
        with open_slide(path) as slide:
            for xy in places(slide, args.regions, args.seed):
                region = slide.read_region(xy, REGION_PX, TEACHER_MPP)
                pictures = {
                    "Lanczos from 20x": reduce_region(region),
                    "nearest finer level, Lanczos": slide.read_region(xy, 224, STUDENT_MPP),
                    "scanner's coarser level": read_scanner(slide, xy),
                    "reduced decoding": read_fast(slide, xy),
                }
                for name, picture in pictures.items():
                    if picture is not None:
                        views.setdefault(name, []).append((number, picture))
                number += 1
    found: dict[str, Any] = {}
    for name, (encoder, mpp) in encoders.items():
        if mpp != STUDENT_MPP:
            continue
        features = {
            path: encode_sub_patches(encoder, np.stack([p for _, p in pictures]), 16)
            for path, pictures in views.items()
        }
        plain = features["Lanczos from 20x"]
        for path, pictures in views.items():
            rows = [n for n, _ in pictures]
            x, own, mean = features[path], plain[rows], plain.mean(0)
            base = [views["Lanczos from 20x"][n][1].astype(float) for n in rows]
            grey = [np.abs(p - b).mean() for (_, p), b in zip(pictures, base, strict=True)]
            centred = cosines(x - mean, own - mean)
            found.setdefault(path, {})[name] = {
                "cosine": float(cosines(x, own).mean()),
                "centred": float(centred.mean()),
                "p10": float(np.percentile(centred, 10)),
                "n": len(x),
                "grey levels": float(np.mean(grey)),
            }
    return found


# --- yardsticks -------------------------------------------------------------------------------


def changed_images(images: LabelledImages, condition: Condition) -> LabelledImages:
    """A labelled set whose files are read changed; another fingerprint, so another cache."""
    if condition == CLEAN:
        return images
    split = images.splits["all"]

    def read(index: int) -> bytes:
        pixels = np.asarray(split.image(index))
        buffer = io.BytesIO()
        damaged = changed(pixels, condition, float(split.mpp[index]), index)
        Image.fromarray(damaged).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    text = f"{images.fingerprint} {condition[0]} {condition[1]}"
    return dataclasses.replace(
        images,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        splits={"all": dataclasses.replace(split, read=read)},
    )


def yardsticks(
    args: argparse.Namespace, name: str, encoder: Encoder, mpp: float
) -> dict[str, dict[str, Any]]:
    """Probes that learnt from clean images, asked about changed ones."""
    labels = str(args.glas / "labels.csv")
    glas = open_images(ProbeOptions(data=str(args.glas), labels_csv=labels, data_mpp=GLAS_MPP))
    fields = open_fields(args, args.crchisto / "images", CRCHISTO_MPP)
    counts = field_counts(args, fields)
    options = {"cache_dir": args.out / "features", "max_enlarge": 1.25}  # GlaS at 20x is enlarged
    clean: tuple[np.ndarray, np.ndarray] | None = None
    found: dict[str, dict[str, Any]] = {}
    for condition in conditions(args.yardstick_grades):
        x = embed_images(changed_images(glas, condition), encoder, mpp, **options)["all"]
        f = field_features(changed_images(fields, condition), encoder, mpp, options)
        clean = clean or (x, f)
        key = f"{condition[0]} {condition[1]:g}"
        found[key] = {
            "GlaS AUC": glas_auc(clean[0], x, glas.splits["all"]),
            "counts": count_scores(clean[1], f, counts),
        }
        print(name, key, found[key], flush=True)
    return found


def glas_auc(clean: np.ndarray, x: np.ndarray, split: Any, repeats: int = 5) -> float:
    """AUC on `x` of probes that learnt from other patients' `clean`, mean over partitions."""
    found = []
    for repeat in range(repeats):
        score = np.empty(len(x))
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=repeat)
        for train, test in folds.split(clean, split.labels, split.groups):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=1000))
            probe.fit(clean[train], split.labels[train])
            score[test] = probe.predict_proba(x[test])[:, 1]
        found.append(roc_auc(split.labels, score))
    return float(np.mean(found))


def count_scores(clean: np.ndarray, x: np.ndarray, counts: np.ndarray, repeats: int = 5) -> dict:
    """Rank correlation by type of ridge predictions on `x`, learnt from other fields' `clean`."""
    y, found = np.log1p(counts), []
    for repeat in range(repeats):
        predicted = np.empty(y.shape)
        for train, test in KFold(5, shuffle=True, random_state=repeat).split(clean):
            probe = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, cv=5))
            predicted[test] = probe.fit(clean[train], y[train]).predict(x[test])
        found.append([spearman(y[:, k], predicted[:, k]) for k in range(y.shape[1])])
    scores = np.mean(found, axis=0)
    return dict(zip(TYPES, scores.tolist(), strict=True)) | {"mean": float(scores.mean())}


# --- table and picture ------------------------------------------------------------------------


def as_table(results: dict[str, Any]) -> str:
    """Everything as Markdown."""
    features = results["features"]
    lines = ["Centred cosine with the clean feature (tenth percentile).", ""]
    lines += ["| change | " + " | ".join(features) + " |", "|---|" + "--:|" * len(features)]
    for key in next(iter(features.values())):
        cells = [f"{row[key]['centred']:.3f} ({row[key]['p10']:.3f})" for row in features.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    paths = results.get("reading paths", {})
    names = list(next(iter(paths.values()), {}))
    lines += ["", "| 5x picture | regions | grey levels | " + " | ".join(names) + " |"]
    lines.append("|---|--:|--:|" + "--:|" * len(names))
    for path, row in paths.items():
        cells = [f"{row[n]['centred']:.3f} ({row[n]['p10']:.3f})" for n in names]
        first = row[names[0]]
        head = f"| {path} | {first['n']} | {first['grey levels']:.1f} | "
        lines.append(head + " | ".join(cells) + " |")
    for measure in ("GlaS AUC", "counts"):
        found = results.get("yardsticks", {})
        if found:
            lines += [
                "",
                f"| {measure} | " + " | ".join(found) + " |",
                "|---|" + "--:|" * len(found),
            ]
            for key in next(iter(found.values())):
                cells = [f"{yard(row[key], measure):.3f}" for row in found.values()]
                lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def yard(row: dict[str, Any], measure: str) -> float:
    """One number of a yardstick."""
    return row[measure] if measure == "GlaS AUC" else row["counts"]["mean"]


def draw(results: dict[str, Any], path: Path) -> None:
    """A column a change, a row a measure, the same colours throughout."""
    from matplotlib.figure import Figure

    measures = ["centred cosine"] + ["GlaS AUC", "counts"] * bool(results.get("yardsticks"))
    titles = {"counts": "counts of nuclei,\nmean rank correlation"}
    figure = Figure(figsize=(10, 2.9 * len(measures) + 0.4), layout="constrained")
    axes = np.asarray(figure.subplots(len(measures), len(GRADES), sharey="row", squeeze=False))
    for down, measure in enumerate(measures):
        for across, (kind, grades) in enumerate(GRADES.items()):
            axis = axes[down, across]
            table = results["features" if down == 0 else "yardsticks"]
            for name in table:
                if name not in COLOURS:
                    continue
                colour = COLOURS[name]
                keys = ["clean 0", *(f"{kind} {grade:g}" for grade in grades)]
                points = [
                    (n, table[name][k]["centred"] if down == 0 else yard(table[name][k], measure))
                    for n, k in enumerate(keys)
                    if k in table[name]
                ]
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name, lw=2, ms=5)
            axis.set_xticks(range(len(grades) + 1), ["clean", *(f"{grade:g}" for grade in grades)])
            axis.set_xlim(-0.2, len(grades) + 0.2)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if down == len(measures) - 1:
                axis.set_xlabel(UNITS[kind])
        axes[down, 0].set_ylabel(titles.get(measure, measure))
    axes[0, 0].legend(frameon=False, loc="lower left")
    figure.suptitle("The same damage, seen by student and teacher")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

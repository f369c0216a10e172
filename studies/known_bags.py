"""Bags whose truth is known: does attention find the malignant images, and what does e2e add?

From GlaS (every image one 5x patch, by the probe's recipe) bags of 20 images are drawn, with
replacement, within one group of patients that holds both kinds, so that stain and patient do not
give the label away. Half of the bags are negative, with 0 or 1 malignant images, half positive,
with 2, 3 or 4; the rest is benign. Patients of training and test bags are disjoint; ten draws of
patients, bags and seeds. Four models a draw, on the same bags:

    mean pool           mean of the bag's frozen embeddings, then a hidden layer
    abmil               gated attention on frozen embeddings
    abmil, longer       the same head, as many further steps as end to end takes
    end to end          the same head, and the encoder's last stages with it

Steps and rates are fixed beforehand; nothing is chosen by test bags. A draw that is finished is
skipped, so the same command goes on after a stop, and --e2e-draws limits the expensive row. Writes
draws/*.json, predictions.csv, results.json, table.md and known_bags.png into --out.

    python studies/known_bags.py --glas glas --encoder xmag --out known-bags
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmag_hf.atomic_write import write_atomically
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.evaluation import (
    accuracy,
    bootstrap_ci,
    bootstrap_test,
    delong_test,
    f1,
    f1_bootstrap_test,
    holm,
    mcnemar_test,
    roc_auc,
)
from xmag_hf.host_memory import keep_freed_memory
from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGForSlideClassification,
    XMAGMeanPoolConfig,
    XMAGMeanPoolModel,
    XMAGSlideConfig,
)
from xmag_hf.probing.images import open_images
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.patches import scaled_squares

GLAS_MPP, MPP, SIDE_PX = 0.62, 2.0, 224
BAG, GROUPS, TEST_GROUPS = 20, 6, 2
NEGATIVE, POSITIVE = (0, 1), (2, 3, 4)  # malignant images of a bag
MODELS = ("mean pool", "abmil", "abmil, longer", "end to end")
COMPARED = (("abmil", "mean pool"), ("end to end", "abmil"), ("end to end", "abmil, longer"))
CLASSES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


@dataclass(frozen=True)
class Bags:
    """Bags as rows of images.

    Attributes:
        images: (n, 20) int64.
        labels: (n,) int64, 1 where at least two images are malignant.
        malignant: (n, 20) bool.
        groups: (n,) int64, group of patients.
    """

    images: np.ndarray
    labels: np.ndarray
    malignant: np.ndarray
    groups: np.ndarray


def parse() -> argparse.Namespace:
    """Options of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--glas", required=True, type=Path, help="images/ and labels.csv")
    parser.add_argument("--encoder", required=True, help="an XMAG or XMAG-lite folder")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--e2e-draws", type=int, help="of these, end to end; default all")
    parser.add_argument("--train-bags", type=int, default=200)
    parser.add_argument("--test-bags", type=int, default=100)
    parser.add_argument("--bags-per-step", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="of the frozen heads")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the frozen heads")
    parser.add_argument("--further-steps", type=int, default=30, help="end to end, and its control")
    parser.add_argument("--further-rate", type=float, default=1e-4, help="of the head in these")
    parser.add_argument("--encoder-rate", type=float, default=1e-4, help="of the trained stages")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the results of what is there."""
    keep_freed_memory()
    args = parse()
    torch.use_deterministic_algorithms(True)
    encoder = load_encoder(args.encoder)
    squares, malignant, patients = read_glas(args.glas)
    (args.out / "draws").mkdir(parents=True, exist_ok=True)
    known = repr((malignant.tolist(), patients.tolist())).encode()
    made_with = {
        "options": options_of(args),
        "encoder_revision": encoder.revision,
        "images": hashlib.sha256(squares.tobytes() + known).hexdigest()[:16],
    }
    refuse_others(args.out / "draws", made_with)
    probe = slide_model(encoder, 0)
    states = in_chunks(probe.frozen, normalised(squares, encoder))
    with torch.no_grad():
        features = in_chunks(probe.trained, states)
    last = args.draws if args.e2e_draws is None else args.e2e_draws
    frozen, both = MODELS[:-1], MODELS
    for draw, wanted in [(k, frozen) for k in range(args.draws)] + [(k, both) for k in range(last)]:
        path = args.out / "draws" / f"draw-{draw}.json"
        record = json.loads(path.read_text()) if path.exists() else made_with | {"models": {}}
        if set(wanted) <= record["models"].keys():
            continue
        train, test = draw_bags(args, malignant, patients, draw)
        run_draw(args, encoder, record, features, states, train, test, draw)
        write_atomically(path, json.dumps(record))
    summarise(args, encoder)


def refuse_others(folder: Path, made_with: dict[str, Any]) -> None:
    """Refuse draws of other options, weights or images; older records lack the last."""
    for path in sorted(folder.glob("draw-*.json")):
        record = json.loads(path.read_text())
        for name, value in made_with.items():
            if record.get(name, value) != value:
                raise SystemExit(
                    f"{path}: {name} {record[name]!r}, and now {value!r}. Choose another --out, or "
                    f"remove {folder}."
                )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a draw depends on, beside the encoder's weights and the images."""
    skipped = ("glas", "out", "draws", "e2e_draws", "samples", "encoder")
    return {name: value for name, value in vars(args).items() if name not in skipped}


def read_glas(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One 5x patch an image: (165, 224, 224, 3) uint8, malignant (165,) bool, patients (165,)."""
    options = ProbeOptions(
        data=str(folder), labels_csv=str(folder / "labels.csv"), data_mpp=GLAS_MPP
    )
    images = open_images(options)
    split = images.splits["all"]
    squares = []
    for index in range(len(split)):
        cut = scaled_squares(split.image(index), float(split.mpp[index]), MPP, SIDE_PX)
        if len(cut) != 1:
            raise ValueError(f"{split.ids[index]}: {len(cut)} patches at 5x, not one.")
        squares.append(cut[0])
    malignant = np.asarray(split.labels) == images.classes.index("malignant")
    return np.stack(squares), malignant, np.asarray(split.groups)


def draw_bags(
    args: argparse.Namespace, malignant: np.ndarray, patients: np.ndarray, draw: int
) -> tuple[Bags, Bags]:
    """Training and test bags of a draw, from disjoint groups of patients."""
    generator = np.random.default_rng([1, draw])
    names = np.unique(patients)
    while True:
        parts = np.array_split(generator.permutation(names), GROUPS)
        groups = [np.flatnonzero(np.isin(patients, part)) for part in parts]
        if all(0 < malignant[group].sum() < len(group) for group in groups):
            break
    test = list(range(TEST_GROUPS))
    train = list(range(TEST_GROUPS, GROUPS))
    return (
        bags_of(groups, train, malignant, args.train_bags, generator),
        bags_of(groups, test, malignant, args.test_bags, generator),
    )


def bags_of(
    groups: list[np.ndarray],
    chosen: list[int],
    malignant: np.ndarray,
    count: int,
    generator: np.random.Generator,
) -> Bags:
    """Bags from some of the groups; positive and negative ones in turn."""
    rows, numbers = [], []
    for number in range(count):
        group = int(generator.choice(chosen))
        k = int(generator.choice(POSITIVE if number % 2 else NEGATIVE))
        sick = groups[group][malignant[groups[group]]]
        well = groups[group][~malignant[groups[group]]]
        images = [generator.choice(sick, k), generator.choice(well, BAG - k)]
        rows.append(generator.permutation(np.concatenate(images)))
        numbers.append(group)
    images = np.stack(rows)
    labels = (malignant[images].sum(axis=1) >= min(POSITIVE)).astype(np.int64)
    return Bags(images, labels, malignant[images], np.array(numbers))


def slide_model(encoder: Encoder, seed: int) -> XMAGForSlideClassification:
    """Encoder and a fresh attention head, the last two stages trained."""
    torch.manual_seed(seed)
    config = encoder.model.config
    head = XMAGABMILConfig(embed_dim=config.hidden_size, **CLASSES)  # type: ignore[union-attr]
    model = XMAGForSlideClassification(
        XMAGSlideConfig(encoder_config=copy.deepcopy(config), head_config=head)  # type: ignore[arg-type]
    )
    model.encoder.load_state_dict(encoder.model.state_dict())
    # Channels last: a third off a step on a CPU.
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def normalised(squares: np.ndarray, encoder: Encoder) -> Tensor:
    """(N, 3, 224, 224) float32 as the encoder takes it."""
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    return (pixels - mean) / std


def in_chunks(function: Any, rows: Tensor) -> Tensor:
    """`function` of 32 rows at a time."""
    return torch.cat([function(chunk) for chunk in rows.split(32)])


def run_draw(
    args: argparse.Namespace,
    encoder: Encoder,
    record: dict[str, Any],
    features: Tensor,
    states: Tensor,
    train: Bags,
    test: Bags,
    draw: int,
) -> None:
    """Train and test the frozen models of a draw, or, where they are there, end to end."""
    width, seed = features.shape[1], 1000 + draw
    model = slide_model(encoder, seed)
    head = args.out / "draws" / f"head-{draw}.pt"
    first = (args.steps, args.learning_rate, None, args)
    if record["models"]:
        # Goes on from the same draw's head, which was trained on the same bags.
        model.head.load_state_dict(torch.load(head))
        plan = (args.further_steps, args.further_rate, args.encoder_rate, args)
        keep(record, "end to end", model, states, train, test, plan, seed + 1)
    else:
        record |= {
            "labels": test.labels.tolist(),
            "malignant": test.malignant.astype(int).tolist(),
            "groups": test.groups.tolist(),
        }
        torch.manual_seed(seed)
        mean_pool = XMAGMeanPoolModel(XMAGMeanPoolConfig(embed_dim=width, **CLASSES))
        keep(record, "mean pool", mean_pool, features, train, test, first, seed)
        keep(record, "abmil", model.head, features, train, test, first, seed)
        torch.save(model.head.state_dict(), head)
        plan = (args.further_steps, args.further_rate, None, args)
        keep(record, "abmil, longer", model.head, features, train, test, plan, seed + 1)
    seconds = {name: round(part["seconds"], 1) for name, part in record["models"].items()}
    print(f"draw {draw}: seconds {seconds}", flush=True)


def keep(
    record: dict[str, Any],
    name: str,
    model: Any,
    rows: Tensor,
    train: Bags,
    test: Bags,
    plan: tuple[int, float, float | None, argparse.Namespace],
    seed: int,
) -> None:
    """Train `model`, and record its probabilities and attention on the test bags."""
    steps, rate, encoder_rate, args = plan
    began = time.perf_counter()
    losses = fit(model, rows, train, steps, rate, encoder_rate, args.bags_per_step, seed)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        model.eval()
        output = head_of(model)(embedded(model, rows, test.images))
    record["models"][name] = {
        "probabilities": output.logits.softmax(-1)[:, 1].tolist(),
        "attentions": output.attentions.tolist(),
        "train_loss": [float(np.mean(losses[:20])), float(np.mean(losses[-20:]))],
        "seconds": seconds,
    }


def fit(
    model: Any,
    rows: Tensor,
    bags: Bags,
    steps: int,
    rate: float,
    encoder_rate: float | None,
    per_step: int,
    seed: int,
) -> list[float]:
    """AdamW and a cosine, over random bags; the losses.

    Args:
        model: A head, or encoder and head.
        rows: (165, D) embeddings for a head, (165, ...) frozen states for both.
        bags: To train on.
        steps: Optimiser steps.
        rate: Of the head.
        encoder_rate: Of the encoder's trained stages; None for a head alone.
        per_step: Bags a step.
        seed: Of order and dropout.
    """
    groups = [{"params": list(head_of(model).parameters()), "lr": rate}]
    if encoder_rate is not None:
        trained = [p for p in model.encoder.parameters() if p.requires_grad]
        groups.append({"params": trained, "lr": encoder_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)
    generator, losses = np.random.default_rng([2, seed]), []
    model.train()
    order = np.concatenate(
        [generator.permutation(len(bags.labels)) for _ in range(steps * per_step // 100 + 2)]
    )
    for step in range(steps):
        chosen = order[step * per_step : (step + 1) * per_step]
        embeddings = embedded(model, rows, bags.images[chosen])
        loss = head_of(model)(embeddings, labels=torch.from_numpy(bags.labels[chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def head_of(model: Any) -> Any:
    """The head of a slide model, or the head itself."""
    return model.head if isinstance(model, XMAGForSlideClassification) else model


def embedded(model: Any, rows: Tensor, images: np.ndarray) -> Tensor:
    """(B, 20, D) embeddings of bags; an image that is in several is encoded once."""
    if not isinstance(model, XMAGForSlideClassification):
        return rows[torch.from_numpy(images)]
    distinct, place = np.unique(images, return_inverse=True)
    encoded = in_chunks(model.trained, rows[torch.from_numpy(distinct)])
    return encoded[torch.from_numpy(place.reshape(images.shape))]


# --- results ---------------------------------------------------------------------------------


def summarise(args: argparse.Namespace, encoder: Encoder) -> None:
    """Write predictions, scores, tests and the picture of all draws that are there."""
    paths = sorted((args.out / "draws").glob("draw-*.json"), key=lambda p: int(p.stem[5:]))
    records = {int(path.stem[5:]): json.loads(path.read_text()) for path in paths}
    write_predictions(records, args.out / "predictions.csv")
    scores = {
        name: {draw: scores_of(r, name) for draw, r in records.items() if name in r["models"]}
        for name in MODELS
    }
    results = {
        "options": options_of(args),
        "encoder": {"name": encoder.name, "revision": encoder.revision},
        "scores": scores,
        "means": {name: means_of(args, list(found.values())) for name, found in scores.items()},
        "comparisons": [compare(args, records, scores, a, b) for a, b in COMPARED],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    table = as_table(results)
    (args.out / "table.md").write_text(table)
    draw_picture(results, args.out / "known_bags.png")
    print(table)


def scores_of(record: dict[str, Any], name: str) -> dict[str, float]:
    """AUC, accuracy and macro F1 of the bags, and the attention's AUC inside positive bags."""
    part, labels = record["models"][name], np.array(record["labels"])
    probabilities = np.array(part["probabilities"])
    predicted = (probabilities > 0.5).astype(np.int64)
    found = {
        "auc": roc_auc(labels, probabilities),
        "accuracy": accuracy(labels, predicted),
        "f1": f1(labels, predicted),
    }
    attention, malignant = np.array(part["attentions"]), np.array(record["malignant"])
    if name != "mean pool":
        inside = [roc_auc(malignant[i], attention[i]) for i in np.flatnonzero(labels)]
        found["attention"] = float(np.mean(inside))
    return found


def means_of(args: argparse.Namespace, found: list[dict[str, float]]) -> dict[str, Any]:
    """Mean, sd and a 95% interval over draws, measure by measure."""
    means = {}
    for measure in found[0] if found else ():
        values = np.array([scores[measure] for scores in found])
        means[measure] = {"mean": float(values.mean()), "draws": len(values)}
        if len(values) > 1:
            interval = bootstrap_ci(mean_of, np.zeros(len(values)), values, samples=args.samples)
            means[measure] |= {"sd": float(values.std(ddof=1))}
            means[measure] |= {"low": interval.low, "high": interval.high}
    return means


def mean_of(_: np.ndarray, values: np.ndarray) -> float:
    """A metric of draws: their mean."""
    return float(np.mean(values))


def compare(
    args: argparse.Namespace,
    records: dict[int, dict[str, Any]],
    scores: dict[str, dict[int, dict[str, float]]],
    a: str,
    b: str,
) -> dict[str, Any]:
    """Paired tests of a draw on its bags, and of the draws' differences.

    The bags of a draw are drawn with replacement from two groups of patients: its p-values are
    about these patients. Across draws the unit is the draw; draws share patients, so that its
    intervals are somewhat too short.
    """
    common = [draw for draw in scores[a] if draw in scores[b]]
    tests: dict[str, list[Any]] = {"DeLong": [], "McNemar mid-p": [], "F1 bootstrap": []}
    for draw in common:
        labels = np.array(records[draw]["labels"])
        first, second = (np.array(records[draw]["models"][n]["probabilities"]) for n in (a, b))
        hard_a, hard_b = ((values > 0.5).astype(np.int64) for values in (first, second))
        for test in (
            delong_test(labels, first, second),
            mcnemar_test(labels, hard_a, hard_b),
            f1_bootstrap_test(labels, hard_a, hard_b, samples=args.samples),
        ):
            tests[test.test].append(test)
    across = {}
    for measure in scores[a][common[0]] if len(common) > 1 else ():
        if measure in scores[b][common[0]]:
            first, second = (np.array([scores[n][d][measure] for d in common]) for n in (a, b))
            test = bootstrap_test(
                mean_of, np.zeros(len(common)), first, second, samples=args.samples
            )
            across[measure] = vars(test) | {"per_draw": (first - second).tolist()}
    return {
        "a": a,
        "b": b,
        "draws": common,
        "across": across,
        "per_draw": {
            name: {
                "p": [test.p_value for test in found],
                "holm": holm([test.p_value for test in found]).tolist(),
                "difference": [test.difference for test in found],
            }
            for name, found in tests.items()
            if found
        },
    }


def write_predictions(records: dict[int, dict[str, Any]], path: Path) -> None:
    """One row a draw, bag and model."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["draw", "bag", "group", "label", "malignant", "model", "p_positive"])
        for draw, record in records.items():
            for name, part in record["models"].items():
                for bag, probability in enumerate(part["probabilities"]):
                    facts = [record["groups"][bag], record["labels"][bag]]
                    sick = sum(record["malignant"][bag])
                    writer.writerow([draw, bag, *facts, sick, name, f"{probability:.6f}"])


def as_table(results: dict[str, Any]) -> str:
    """Scores and comparisons as Markdown."""
    measures = {"auc": "AUC", "accuracy": "accuracy", "f1": "macro F1", "attention": "attention"}
    lines = ["| model | draws | " + " | ".join(measures.values()) + " |", "|---|--:|" + "--:|" * 4]
    for name, means in results["means"].items():
        cells = [_cell(means.get(measure)) for measure in measures]
        draws = means["auc"]["draws"] if means else 0
        lines.append(f"| {name} | {draws} | " + " | ".join(cells) + " |")
    lines += ["", "| a - b | measure | difference over draws (95% CI) | p | draws apart* |"]
    lines.append("|---|---|--:|--:|---|")
    tests = {"auc": "DeLong", "accuracy": "McNemar mid-p", "f1": "F1 bootstrap"}
    for c in results["comparisons"]:
        for measure, test in c["across"].items():
            apart = "-"
            if measure in tests:
                found = c["per_draw"][tests[measure]]
                pairs = list(zip(found["holm"], found["difference"], strict=True))
                up = sum(p <= 0.05 and d > 0 for p, d in pairs)
                down = sum(p <= 0.05 and d < 0 for p, d in pairs)
                apart = f"{up} up, {down} down of {len(pairs)} ({tests[measure]})"
            lines.append(
                f"| {c['a']} - {c['b']} | {measures[measure]} | {test['difference']:+.3f} "
                f"({test['low']:+.3f} to {test['high']:+.3f}) | {test['p_value']:.3f} | {apart} |"
            )
    lines += ["", "* p <= 0.05 on the draw's bags, after Holm over draws."]
    if len({means["auc"]["draws"] for means in results["means"].values() if means}) > 1:
        lines.append("Rows of fewer draws are of the first ones: compare by the differences.")
    return "\n".join(lines) + "\n"


def _cell(mean: dict[str, float] | None) -> str:
    if mean is None:
        return "-"
    if "sd" not in mean:
        return f"{mean['mean']:.3f}"
    return f"{mean['mean']:.3f} +- {mean['sd']:.3f} ({mean['low']:.3f}-{mean['high']:.3f})"


def draw_picture(results: dict[str, Any], path: Path) -> None:
    """A line a draw through the models, and the mean: AUC of bags, and of attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {
        "auc": "Bags: AUC on test patients",
        "attention": "Attention on malignant images",
    }
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        names = [n for n in MODELS if any(measure in s for s in results["scores"][n].values())]
        draws = sorted({draw for name in names for draw in results["scores"][name]})
        for draw in draws:
            line = [results["scores"][n].get(draw, {}).get(measure, np.nan) for n in names]
            axis.plot(range(len(names)), line, "o-", color="#999999", lw=0.8, ms=3)
        for number, name in enumerate(names):
            mean = results["means"][name][measure]
            axis.plot([number - 0.2, number + 0.2], [mean["mean"]] * 2, color="#0072B2", lw=3)
            axis.text(number, 0.36, f"{mean['mean']:.3f}\n{mean['draws']} draws", ha="center")
        axis.axhline(0.5, color="black", lw=0.8, ls=":")
        axis.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylim(0.33, 1.02)
    axes[0].set_ylabel("AUC (grey: draws, blue: mean)")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

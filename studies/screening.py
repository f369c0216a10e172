"""Learning rates and options, each against the plain recipe, on held-out tissue alone.

Every row is one training of the same length and seed on the same corpus; a finished row is skipped.
What decides, said before the runs: the centred cosine with the 20x teacher, mean over the held-out
parts and both levels, each encoder mapped to the teacher's space by its own ridge map. No labelled
image is seen. The plain recipe is trained with two seeds; their distance is what chance does to a
row. Writes results.json, table.md and screening.png.

    xmag corpus SLIDES... --stride 224 --reading-paths --margin 0.2 --out corpus
    python studies/screening.py --corpus corpus --holdout LUNG STOMACH 'COLON:y>0.75' --out screen
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mixed_rows import refuse_mixed

ROOT = Path(__file__).parents[1]
PLAIN, AGAIN = "plain recipe", "plain recipe, another seed"
ROWS: dict[str, list[str]] = {
    PLAIN: [],
    AGAIN: ["--seed", "1"],
    "learning rate 3e-4": ["--learning-rate", "3e-4"],
    "learning rate 5e-4": ["--learning-rate", "5e-4"],
    "learning rate 3e-3": ["--learning-rate", "3e-3"],
    "local weight 0.5": ["--local-weight", "0.5"],
    "dihedral views, permuted": ["--dihedral"],
    "relational loss": ["--relational-weight", "1.0"],
    "centred targets": ["--target-centering", "mean"],
    "whitened targets": ["--target-centering", "whiten"],
    "stain jitter 0.05": ["--stain-jitter", "0.05"],
    "reading paths": ["--reading-paths"],
    "um/px jitter 0.2": ["--mpp-jitter", "0.2"],
}
SCORES = {"centred_cosine": "centred cosine", "cosine": "cosine", "retrieval": "top-1 retrieval"}


def main() -> None:
    """Train what is missing, then write the table of what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="made by xmag corpus")
    parser.add_argument("--holdout", required=True, nargs="+", help="as for xmag distill")
    parser.add_argument("--out", required=True, type=Path, help="students and results")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--student", default="lite")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--cache-dir", type=Path, help="teacher features; default OUT/teacher")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--score-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.score_only:
        for row in args.rows:
            train(args, row)
    found = {row: read(args.out / folder_name(row)) for row in ROWS}
    refuse_mixed({args.out / folder_name(row): ROWS[row] for row in found if found[row]})
    if not any(found.values()):
        raise SystemExit(f"{args.out}: no row is finished; leave --score-only out")
    results = summarise({row: scored for row, scored in found.items() if scored})
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    table = as_table(results)
    (args.out / "table.md").write_text(table)
    draw(results, args.out / "screening.png")
    print(table)


def folder_name(row: str) -> str:
    """Of a row's student."""
    return row.replace(",", "").replace(" ", "-").replace("/", "-")


def train(args: argparse.Namespace, row: str) -> None:
    """Distil one student in a process of its own; a finished one is skipped by the trainer."""
    command = [
        *(sys.executable, str(ROOT / "train_distill.py"), "--data", args.corpus),
        *("--teacher", args.teacher, "--student", args.student, "--cache-teacher"),
        *("--cache-dir", str(args.cache_dir or args.out / "teacher"), "--no-dihedral"),
        *("--batch-size", "32", "--learning-rate", "1e-3", "--epochs", str(args.epochs)),
        *("--local-weight", "1.0", "--seed", "0", "--num-workers", "1"),
        *("--output-dir", str(args.out / folder_name(row)), "--holdout", *args.holdout),
        *ROWS[row],  # last, so that it overrules
    ]
    began = time.monotonic()
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    print(f"{row}: {time.monotonic() - began:.0f} s", flush=True)


def read(folder: Path) -> list[dict[str, Any]]:
    """A student's scores on the held-out parts; none if it is not finished."""
    path = folder / "distillation.json"
    return json.loads(path.read_text())["alignment"] if path.exists() else []


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over parts and levels, and each row's distance from the plain recipe.

    Args:
        found: Row -> lines of part, level, student (constant, start, distilled) and scores.

    Returns:
        rows: name -> {score: mean, by_level, difference}; chance: what another seed does;
        ranked: names from best to worst; pairs, disjoint: held-out sample sizes.
    """
    rows: dict[str, Any] = {}
    for name, lines in found.items():
        mine = [line for line in lines if line["student"] == "distilled"]
        rows[name] = {score: _mean(mine, score) for score in SCORES} | {
            "by_level": {
                level: _mean([line for line in mine if line["level"] == level], "centred_cosine")
                for level in ("global", "local")
            }
        }
        start = [line for line in lines if line["student"] == "start"]
        rows[name]["start"] = _mean(start, "centred_cosine")
    base = rows.get(PLAIN)
    for row in rows.values():
        row["difference"] = None if base is None else row["centred_cosine"] - base["centred_cosine"]
    parts = {line["part"]: line for line in next(iter(found.values()), [])}
    return {
        "rows": rows,
        "chance": abs(rows[AGAIN]["difference"]) if base and AGAIN in rows else None,
        "ranked": sorted(rows, key=lambda name: -rows[name]["centred_cosine"]),
        "pairs": sum(line["n_pairs"] for line in parts.values()),
        "disjoint": sum(line["n_disjoint"] for line in parts.values()),
    }


def _mean(lines: list[dict[str, Any]], score: str) -> float:
    return float(np.mean([line[score] for line in lines]))


def as_table(results: dict[str, Any]) -> str:
    """One line a row, best first."""
    lines = [
        "| row | centred cosine | global | local | - plain | cosine | top-1 retrieval |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in results["ranked"]:
        row = results["rows"][name]
        away = "" if row["difference"] is None or name == PLAIN else f"{row['difference']:+.3f}"
        lines.append(
            f"| {name} | {row['centred_cosine']:.3f} | {row['by_level']['global']:.3f} | "
            f"{row['by_level']['local']:.3f} | {away} | {row['cosine']:.3f} | "
            f"{row['retrieval']:.3f} |"
        )
    chance = results["chance"]
    lines += [
        "",
        f"{results['pairs']:,} held-out pairs, {results['disjoint']} disjoint regions; "
        + ("" if chance is None else f"another seed moves the plain recipe by {chance:.3f}; ")
        + f"start {next(iter(results['rows'].values()))['start']:.3f}.",
        "",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Differences from the plain recipe, best on top, and the band of another seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in results["ranked"] if name != PLAIN][::-1]
    if not names or results["rows"][names[0]]["difference"] is None:
        return
    away = [results["rows"][name]["difference"] for name in names]
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(names) + 1.2), layout="constrained")
    if results["chance"] is not None:
        axes.axvspan(-results["chance"], results["chance"], color="#dddddd", label="one other seed")
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.scatter(away, range(len(names)), color="#0072B2", zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(
        "centred cosine with the 20x teacher on held-out tissue,\ndifference from the plain recipe"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""What a million pairs cost in teacher features: bytes and passes by the format, time by FLOPs.

    python benchmarks/teacher_cost.py [--corpus DIR] [--tflops 50 200 400] [--measure 64]

- bytes: a file of the cache's format is written with features of each teacher's width;
- FLOPs: counted by torch on the meta device, multiplications and additions apart;
- hours: computed from them for a sustained rate that you name. Nothing is run at that rate;
- passes: with --corpus, how many sub-patches its overlapping pairs share;
- --measure: sub-patches per second of the offline teacher on this machine, really run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from xmag_hf.distillation.corpus import Corpus, PairIndex, open_corpus
from xmag_hf.distillation.teacher_cache import TeacherIdentity, write_features
from xmag_hf.distillation.teacher_encoding import CELLS, encode_sub_patches, shared_cells
from xmag_hf.encoders import ENCODERS, EncoderCard, build_architecture, load_encoder

SLIDE = "TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAAD-4AA5-9AAD-E1E3A4C6D0E7"  # a usual length
MILLION = 1_000_000


def main() -> int:
    """Count, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", nargs="+", default=["uni2-h", "efficientnet-lite0"])
    parser.add_argument("--corpus", help="whose overlap is counted")
    parser.add_argument("--tflops", type=float, nargs="+", default=[50, 200, 400])
    parser.add_argument("--pairs", type=int, default=1000, help="in the file that is written")
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="sub-patches to run")
    args = parser.parse_args()
    console = Console()
    title = "a million pairs, sixteen passes each; hours are computed, not measured"
    table = Table(title=title)
    headings = ["teacher", "bytes a pair", "GB", "GFLOP a pass"]
    headings += [f"h at {rate:g} TFLOP/s" for rate in args.tflops]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "teacher" else "right")
    for name in args.teachers:
        card = ENCODERS[name]
        size, flops = bytes_per_pair(card, args.pairs), flops_per_pass(card)
        hours = [MILLION * CELLS * flops / (rate * 1e12) / 3600 for rate in args.tflops]
        table.add_row(
            name,
            f"{size:,.0f}",
            f"{MILLION * size / 1e9:.1f}",
            f"{flops / 1e9:.2f}",
            *(f"{value:.2g}" for value in hours),
        )
    console.print(table)
    if args.corpus:
        share(console, args.corpus)
    if args.measure:
        measure(console, args.measure)
    return 0


def flops_per_pass(card: EncoderCard) -> int:
    """Of one 224 px image, on the meta device."""
    model = build_architecture(card).model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, card.input_px, card.input_px, device="meta"))
    return counter.get_total_flops()


def bytes_per_pair(card: EncoderCard, pairs: int) -> float:
    """Of a file as the cache writes it, everything included."""
    index = PairIndex(
        np.array([SLIDE], dtype=object),
        np.zeros(pairs, np.int32),
        np.zeros(pairs, np.int32),
        np.arange(pairs) * 896,
        np.zeros(pairs, np.int64),
        np.full(pairs, 896.0),
    )
    counts = np.array([pairs])
    corpus = Corpus("generated", ("one",), counts, index, "0" * 64, {}, None, frozenset())
    identity = TeacherIdentity(card.name, "0" * 40, "bf16", "mean sd", "0" * 64)
    features = np.random.default_rng(0).normal(size=(pairs, 1, CELLS, int(card.embed_dim or 0)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5"
        write_features(
            path, features.astype(np.float16), corpus, np.arange(pairs), identity, {"licence": ""}
        )
        return path.stat().st_size / pairs


def share(console: Console, location: str) -> None:
    """Print how many passes sharing leaves, shard by shard as the cache does it."""
    corpus = open_corpus(location)
    starts = corpus.shard_starts
    distinct = sum(
        len(shared_cells(corpus, np.arange(a, b))[0])
        for a, b in zip(starts, starts[1:], strict=False)
    )
    pairs = len(corpus.index)
    console.print(
        f"{Path(location).name}: {pairs} pairs, {pairs * CELLS} sub-patches, {distinct} of them "
        f"distinct: {distinct / pairs:.2f} passes a pair in place of {CELLS}."
    )


def measure(console: Console, count: int) -> None:
    """Print what the offline teacher really does here."""
    teacher = load_encoder("efficientnet-lite0")
    patches = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    encode_sub_patches(teacher, patches[:16], 16)
    wall, cpu = time.perf_counter(), time.process_time()
    encode_sub_patches(teacher, patches, 16)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    hours = MILLION * CELLS / 3600
    console.print(
        f"efficientnet-lite0, measured, {torch.get_num_threads()} thread(s): {count / wall:.1f} "
        f"sub-patches/s of wall time ({count / cpu:.1f} of processor time): a million pairs in "
        f"{hours * wall / count:.0f} hours ({hours * cpu / count:.0f} processor hours)."
    )


if __name__ == "__main__":
    raise SystemExit(main())

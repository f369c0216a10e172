"""XMAG-lite on a CPU: as it is, with its normalisations folded, and by onnxruntime.

    python benchmarks/encode_lite.py --threads 1 [--onnx lite.onnx]

The ways take turns within one process, on the same batch of noise; freed memory is kept, as in
every command. `--onnx` is an export of the student in fp32 (inputs (B, 3, 224, 224), normalised),
and needs `pip install onnxruntime`. Shown: median patches/s, the ratio to the first way, and the
largest difference of a feature from it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xmag_hf.embedding.folding import folded
from xmag_hf.encoders import load_encoder
from xmag_hf.host_memory import keep_freed_memory

ROOT = Path(__file__).parents[1]


def onnx_way(path: str, threads: int, images: torch.Tensor) -> Callable[[], np.ndarray]:
    """The same images through an export."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, values = session.get_inputs()[0].name, images.contiguous().numpy()
    return lambda: session.run(None, {name: values})[0]


def main() -> None:
    """Let the ways take turns, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default=str(ROOT / "examples" / "xmag-lite"))
    parser.add_argument("--onnx", help="export of the student")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    encoder = load_encoder(args.student)
    fast = folded(encoder)
    images = torch.rand(args.batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "as it is": lambda: encoder.model(pixel_values=images).pooler_output.numpy(),
        "folded": lambda: fast.model(pixel_values=images).pooler_output.numpy(),
    }
    if args.onnx:
        ways["onnxruntime"] = onnx_way(args.onnx, args.threads, images)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        features = {name: way() for name, way in ways.items()}
        for _ in range(args.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    rates = {name: args.batch_size / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(ways))
    table = Table("way", "patches/s", "ratio", "largest difference")
    for name, rate in rates.items():
        away = np.abs(features[name] - features[first]).max()
        table.add_row(name, f"{rate:.1f}", f"{rate / rates[first]:.2f}", f"{away:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()

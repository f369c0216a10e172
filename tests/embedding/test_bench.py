"""FLOPs in closed form, times of encoders that sleep, and the command as a whole."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mean_colour import mean_colour

from xmag_hf.cli.main import main
from xmag_hf.embedding.bench import (
    PAPER,
    BenchOptions,
    bench,
    flops_per_patch,
    matrix_product_rate,
    time_encoders,
)
from xmag_hf.embedding.options import EmbedError, EmbedOptions
from xmag_hf.encoders import load_encoder


def test_flops_of_a_vit():
    """XMAG tiny: 12 layers of width 192, 3 heads, 256 + 1 tokens of 14 x 14 px."""
    tokens, width, layers = 257, 192, 12
    linear = layers * 2 * tokens * (4 * width**2 + 2 * 4 * width**2)
    attention = layers * 2 * 2 * tokens**2 * width
    patches = 2 * 256 * 3 * 14 * 14 * width
    assert flops_per_patch(load_encoder("random:tiny")) == linear + attention + patches


def test_encoders_that_sleep():
    """10 ms and 30 ms a patch: rate, share and the slide's time follow."""
    rows = []
    for name, pause in (("fast", 0.01), ("slow", 0.03)):
        encoder = mean_colour()
        plain = encoder.model.forward_features

        def sleepy(images: torch.Tensor, pause: float = pause, plain=plain) -> torch.Tensor:
            time.sleep(pause * len(images))
            return plain(images)

        encoder.model.forward_features = sleepy
        rows.append((name, encoder, 100, None))
    timings, rate = time_encoders(rows, sample=6, rounds=2, batch_size=4)
    for timing, pause in zip(timings, (0.01, 0.03), strict=True):
        assert timing.patches_per_second < 1 / pause
        assert timing.slide_seconds == pytest.approx(100 * timing.seconds / 6)
        assert timing.share == pytest.approx(timing.gflops * 1e9 / rate * 6 / timing.seconds)
    assert timings[0].seconds < timings[1].seconds


def test_each_encoder_gets_its_own_size():
    """56 px, then 28: neither can take the other's pixels."""
    sizes: list[list[tuple[int, ...]]] = [[], []]
    rows = []
    for px, seen in zip((56, 28), sizes, strict=True):
        encoder = mean_colour(input_px=px)
        plain = encoder.model.forward_features

        def noted(images: torch.Tensor, seen=seen, plain=plain) -> torch.Tensor:
            seen.append(tuple(images.shape[1:]))
            return plain(images)

        encoder.model.forward_features = noted
        rows.append((f"{px} px", encoder, None, None))
    timings, _ = time_encoders(rows, sample=3, rounds=1, batch_size=2)
    assert [timing.name for timing in timings] == ["56 px", "28 px"]
    assert [set(seen) for seen in sizes] == [{(3, 56, 56)}, {(3, 28, 28)}]


@pytest.mark.parametrize(
    ("mpp", "given", "patches"),
    [
        (2.0, {}, 554),
        (0.5, {}, None),  # a 20x encoder
        (2.0, {"mpp": 1.0}, None),
        (2.0, {"overlap": 56}, None),
        (0.5, {"mpp": 2.0}, 554),
    ],
)
def test_the_paper_s_count_is_of_the_paper_s_patches(monkeypatch, mpp, given, patches):
    """The 554 of a slide are of 224 px at 2.0 um/px, edge to edge; at 0.5 there are 16 times."""
    monkeypatch.setattr("xmag_hf.embedding.bench.time_slides", lambda *args, **options: ())
    monkeypatch.setattr("xmag_hf.embedding.bench.paper_rows", lambda *args: [])
    options, what = EmbedOptions(batch_size=1, **given), BenchOptions(sample=1, rounds=1)
    (row,) = bench([], mean_colour(mpp=mpp), options, what).encoders
    assert row.patches == patches
    assert (row.slide_seconds is None) == (patches is None)


def test_matrix_products_are_counted_as_numpy_takes_time_for_them():
    """Within a factor of five of NumPy's own, whatever else the machine does."""
    a = np.random.default_rng(0).random((1024, 1024), np.float32)
    a @ a
    started = time.perf_counter()
    a @ a
    numpy_rate = 2 * 1024**3 / (time.perf_counter() - started)
    rate = matrix_product_rate(torch.device("cpu"), "fp32")
    assert numpy_rate / 5 < rate < 5 * max(numpy_rate, 2e9)


def test_wrong_options():
    for wrong in ({"sample": 0}, {"rounds": 0}):
        with pytest.raises(EmbedError, match=next(iter(wrong))):
            BenchOptions(**wrong)


def test_the_command(tmp_path: Path, slide: Path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", str(slide), "--model", "random:tiny", "--json", str(out), "--quiet"]
    command += ["--sample", "2", "--rounds", "1", "--no-paper", "--mpp", "0.5"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "cold" in printed and "warm" in printed and "slides/min" in printed
    report = json.loads(out.read_text())
    assert [timing["name"] for timing in report["passes"]] == ["cold", "warm"]
    for timing in report["passes"]:
        assert (timing["slides"], timing["patches"] > 5) == (1, True)
        assert 0 < timing["stages"]["tissue"] < timing["wall_seconds"]
        assert timing["stages"]["encode"] < timing["wall_seconds"]
    (encoder,) = report["encoders"]
    assert (encoder["name"], encoder["sample"], encoder["patches"]) == ("random:tiny", 2, None)
    assert 0 < encoder["share"] < 1.5
    assert report["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    (tmp_path / "bad.tif").write_bytes(b"")
    assert main([*command[:2], str(tmp_path / "bad.tif"), *command[2:]]) == 1
    assert [patches for _, _, patches, _ in PAPER] == [554, 6260, 6260]


@pytest.mark.slow
def test_the_paper_s_comparison(tmp_path: Path, slide: Path):
    out = tmp_path / "bench.json"
    command = ["bench", str(slide), "--model", "random:lite", "--json", str(out), "--quiet"]
    assert main([*command, "--sample", "1", "--rounds", "1"]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["encoders"]}
    sizes = {name: row["params_m"] for name, row in rows.items()}
    assert sizes["Phikon, 20x"] == pytest.approx(85.80, abs=0.01)
    assert sizes["UNI2-h, 20x"] == pytest.approx(681.39, abs=0.01)
    assert sizes["XMAG base, 5x"] == pytest.approx(85.7, abs=0.1)
    slides = {n: r["patches"] * r["seconds"] / r["sample"] for n, r in rows.items()}
    assert slides["UNI2-h, 20x"] > slides["Phikon, 20x"] > slides["XMAG base, 5x"]

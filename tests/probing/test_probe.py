"""A whole probe in small: alone in its folder, and every image under a name of its own."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xmag_hf.cli.main import main
from xmag_hf.lock import host
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.images import open_images
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.pictures import PictureOptions
from xmag_hf.probing.probe import image_counts, run_probe
from xmag_hf.probing.projections import project


@pytest.fixture
def options(tmp_path: Path) -> ProbeOptions:
    """Six images of noise in each of two splits, named 0 to 5 in both; the odd ones are dark."""
    rng = np.random.default_rng(0)
    lines = ["file,label,split"]
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 80 if number % 2 else 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{number}.png")
            lines.append(f"{split}/{number}.png,{('light', 'dark')[number % 2]},{split}")
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines))
    return ProbeOptions(
        data=str(tmp_path / "data"), labels_csv=str(tmp_path / "data" / "labels.csv"),
        data_mpp=2.0, model=("random:tiny",), methods=("knn",), neighbours=1, folds=2, repeats=1,
        samples=20, cross_validate=True, cache_dir=str(tmp_path / "cache"),
        out=str(tmp_path / "out"),
    )  # fmt: skip


def _ids(path: Path) -> list[str]:
    with path.open(newline="") as stream:
        return [row["id"] for row in csv.DictReader(stream)]


def test_a_second_probe_into_one_folder_is_refused_at_every_step_of_the_first(options, tmp_path):
    tried = set()

    def another(what: str, done: int, total: int) -> None:
        if what not in tried:
            tried.add(what)
            with pytest.raises(ProbeError, match=f"out: process {os.getpid()} .*is working on it"):
                run_probe(dataclasses.replace(options, folds=3))

    run_probe(options, another)
    assert {"reading images", "random:tiny@2", "random:tiny@2 scores"} <= tried
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["options"]["folds"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"data", "cache", "out"}  # no lock, no half


def test_the_lock_of_a_dead_probe_is_taken_over(options, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    holder = {"host": host(), "pid": child.pid, "token": "theirs"}
    (tmp_path / "out.lock").write_text(json.dumps(holder))
    run_probe(options)
    assert (tmp_path / "out" / "results.json").is_file()
    assert not (tmp_path / "out.lock").exists()


def test_pooled_images_of_one_name_are_told_apart_and_can_be_compared(options, tmp_path, capsys):
    files = []
    for model in ("random:tiny", "random:tiny:1"):
        out = tmp_path / model.replace(":", "_")
        run_probe(dataclasses.replace(options, model=(model,), out=str(out)))
        files += list((out / "predictions").iterdir())
    wanted = [f"{split}/{number}" for split in ("train", "test") for number in range(6)]
    assert [_ids(file) for file in files] == [wanted, wanted]
    arguments = [*map(str, files), "--out", str(tmp_path / "both"), "--samples", "20"]
    assert main(["compare", *arguments, "--names", "a", "b", "--quiet"]) == 0, capsys.readouterr()


def test_pooled_images_of_other_names_keep_them(options, tmp_path):
    for number in range(6):
        image = tmp_path / "data" / "test" / f"{number}.png"
        image.rename(image.with_name(f"t{number}.png"))
    path = tmp_path / "data" / "labels.csv"
    path.write_text(path.read_text().replace("test/", "test/t"))
    run_probe(options)
    (file,) = (tmp_path / "out" / "predictions").iterdir()
    assert _ids(file) == [*map(str, range(6)), *(f"t{number}" for number in range(6))]


def test_positions_of_pooled_images_tell_them_apart(options, tmp_path):
    path = tmp_path / "data" / "labels.csv"
    path.write_text(path.read_text().replace(",train", ",left").replace(",test", ",right"))
    project(options, PictureOptions(perplexity=3), tmp_path / "out")
    wanted = [f"{split}/{number}" for split in ("left", "right") for number in range(6)]
    assert _ids(tmp_path / "out" / "tsne.csv") == wanted


def test_nuclei_of_two_images_of_one_name_are_refused(options, tmp_path):
    path, labels = tmp_path / "nuclei.csv", tmp_path / "data" / "labels.csv"
    names = [f"{split}-{number}" for split in ("train", "test") for number in range(6)]
    lines = [f"{number},1,1,round" for number in range(6) for _ in range(number)]
    lines += [f"{name},1,1,round" for n, name in enumerate(names) for _ in range(n)]
    path.write_text("image,x,y,type\n" + "\n".join(lines))
    options = dataclasses.replace(options, nuclei_csv=str(path))
    words = r"nuclei.csv: 6 ids .*more than one image \(0, 1, .*train, test.*--id-column"
    with pytest.raises(ProbeError, match=words):
        run_probe(options)
    header, *rows = labels.read_text().splitlines()
    rows = [f"{row},{name}" for row, name in zip(rows, names, strict=True)]
    labels.write_text("\n".join([f"{header},name", *rows]))
    told = dataclasses.replace(options, id_column="name")
    ids, counts = image_counts(open_images(told), told)
    assert dict(zip(ids, counts[:, 0], strict=True)) == {name: n for n, name in enumerate(names)}

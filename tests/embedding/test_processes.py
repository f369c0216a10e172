"""Runs that are killed, and runs that share a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from tiled_tiff import write_tiff

from xmag_hf.embedding import read_bag


@pytest.fixture
def slides(tmp_path: Path, tissue) -> list[str]:
    (tmp_path / "slides").mkdir()
    crops = [tissue[top : top + 500, 300:900] for top in range(0, 480, 120)]
    return [
        str(write_tiff(tmp_path / "slides" / f"s{number}.tif", [crop], mpp=0.5))
        for number, crop in enumerate(crops)
    ]


def run(mode: str, out: Path, n: int, slides: list[str]) -> None:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    command = [sys.executable, str(here / "forked.py"), mode, str(out), str(n), *slides]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=600)


@pytest.mark.parametrize("moments", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_leaves_whole_bags_or_none(tmp_path, slides, moments):
    run("kill", tmp_path, moments, slides)
    whole = {path.name: read_bag(path) for path in (tmp_path / "whole").glob("*.h5")}
    assert len(whole) == len(slides)
    left = 0
    for folder in tmp_path.glob("killed*"):
        for path in folder.glob("*.h5"):
            with h5py.File(path) as file:
                assert (file["features"][()] == whole[path.name].features).all()
                assert (file["coords"][()] == whole[path.name].coords).all()
            left += 1
    assert left < len(slides) * (moments + 1)  # some were killed in time
    resumed = tmp_path / f"killed{moments - 1}"
    assert {path.name for path in resumed.glob("*.h5")} == set(whole)
    assert not list(resumed.glob(".*.tmp"))
    assert not list((resumed / ".locks").iterdir())
    statuses = {r["status"] for r in json.loads((resumed / "summary.json").read_text())["records"]}
    assert statuses <= {"ok", "present"}


@pytest.mark.slow
def test_two_processes_do_each_slide_once(tmp_path, slides):
    out = tmp_path / "out"
    run("share", out, 2, slides)
    said = [json.loads(path.read_text()) for path in out.glob("status.*.json")]
    assert len(said) == 2
    for slide_id in said[0]:
        assert sorted(one[slide_id] for one in said) == ["ok", "present"]
    assert all("ok" in one.values() for one in said)  # both had some
    assert len(list(out.glob("*.h5"))) == len(slides)
    assert not list((out / ".locks").iterdir())

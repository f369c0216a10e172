"""`xmag spider`: exit codes and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from spider_folder import make_spider, name_of

from xmag_hf.cli.main import main


@pytest.fixture
def root(tmp_path: Path, cmu_pixels) -> Path:
    return make_spider(tmp_path / "source", cmu_pixels)


def test_success_and_again(tmp_path, root, capsys):
    out = tmp_path / "out"
    command = ["spider", "colorectal", "--source", str(root.parent), "--out", str(out)]
    command += ["--missing", "reflect", "--seed", "3", "--workers", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "24 records" in printed
    assert "context missing in 12 records; 0 dropped" in printed
    assert "warning: 20 training records, published: 63,989" in printed
    options = json.loads((out / "spider.json").read_text())["options"]
    assert (options["missing"], options["seed"]) == ("reflect", 3)
    assert main([*command, "--quiet"]) == 0
    assert "Already done" in capsys.readouterr().out
    assert main([*command, "--missing", "drop"]) == 1
    assert "missing 'reflect' there, 'drop' asked for" in capsys.readouterr().err


def test_a_file_that_does_not_decode_gives_1_and_the_rest_is_done(tmp_path, root, capsys):
    (root / "images" / name_of("slide_2", 2, 2)).write_bytes(b"no image")
    command = ["spider", "colorectal", "--source", str(root), "--out", str(tmp_path / "out")]
    assert main([*command, "--workers", "1", "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "23 records" in printed
    assert "failed: record 9 (slide_2), 2_2 slide_2_2_2.png: does not decode" in printed


def test_no_network_says_what_to_do(tmp_path, capsys):
    assert main(["spider", "skin", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "accept its licence" in said
    assert "hf auth login" in said
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["liver"], "liver"),
        (["skin", "--missing", "black"], "missing"),
        (["skin", "--validation", "1.5"], "validation"),
        (["skin", "--workers", "0"], "workers"),
        (["skin", "--source", ".", "--revision", "v1"], "--revision"),
    ],
)
def test_wrong_usage_gives_2(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        main(["spider", *arguments, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err

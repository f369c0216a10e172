"""`xmag bags`: export, import, and what cannot be converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from xmag_hf.cli.main import main
from xmag_hf.embedding import Bag, BagInfo, read_bag, write_bag


@pytest.fixture
def bags(tmp_path: Path) -> Path:
    folder = tmp_path / "bags"
    folder.mkdir()
    info = BagInfo(encoder="uni", mpp=0.5, patch_px=256, overlap=0, mpp0=0.25, pooling="cls")
    for number in range(2):
        features = np.full((3 + number, 4), number, np.float16)
        coords = np.arange(2 * len(features), dtype=np.int64).reshape(-1, 2) * 512
        write_bag(folder / f"s{number}.h5", Bag(f"s{number}", features, coords, info))
    return folder


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp"])
def test_there_and_back(tmp_path, bags, layout, capsys):
    there, back = tmp_path / layout, tmp_path / "back"
    assert main(["bags", "export", str(bags), "--to", layout, "--out", str(there)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 bags" in printed
    assert f"{layout} cannot hold: " in printed and "pooling" in printed
    known = ["--mpp0", "0.25", "--pooling", "cls"]
    known += [] if layout == "stamp" else ["--encoder", "uni", "--mpp", "0.5"]
    known += ["--patch-px", "256"] if layout == "clam" else []
    command = ["bags", "import", str(there), "--from", layout, "--out", str(back), *known]
    assert main(command) == 0
    for path in bags.iterdir():
        first, second = read_bag(path), read_bag(back / path.name)
        assert (first.features == second.features).all()
        assert (first.coords == second.coords).all()
        for name in ("encoder", "mpp", "patch_px", "mpp0", "pooling", "width_level0"):
            assert getattr(first.info, name) == getattr(second.info, name)
        assert second.info.created_by.endswith(f"from {layout}")
    assert main(command) == 1  # nothing is replaced unasked
    assert "--overwrite" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0


def test_um_px_slide_by_slide(tmp_path, bags, capsys):
    """STAMP's um become each slide's own pixels; one um/px for all would misplace the others."""
    for name, mpp0 in (("s0", 0.25), ("s1", 0.5)):
        bag = read_bag(bags / f"{name}.h5")
        write_bag(bags / f"{name}.h5", replace(bag, info=replace(bag.info, mpp0=mpp0)))
    assert main(["bags", "export", str(bags), "--to", "stamp", "--out", str(tmp_path / "s")]) == 0
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,mpp\ns0,0.25\ns1,0.5\n")
    command = ["bags", "import", str(tmp_path / "s"), "--from", "stamp", "--pooling", "cls"]
    there = ["--out", str(tmp_path / "back")]
    capsys.readouterr()
    assert main([*command, *there, "--slides-csv", str(table)]) == 0
    for path in bags.iterdir():
        one, other = read_bag(path), read_bag(tmp_path / "back" / path.name)
        assert (one.coords == other.coords).all() and one.info.mpp0 == other.info.mpp0
    printed = capsys.readouterr().out
    assert "not known: encoder_revision;" in printed and "--encoder-revision" in printed
    assert "was taken for all" not in printed
    table.write_text("slide_id,mpp\ns0,0.25\n")
    more = [*there, "--overwrite"]
    assert main([*command, *more, "--slides-csv", str(table)]) == 1
    assert "has no mpp for s1" in capsys.readouterr().out
    assert main([*command, *more, "--mpp0", "0.25"]) == 0
    assert "0.25 um/px was taken for all 2 slides" in capsys.readouterr().out
    assert main([*command, *there, "--mpp0", "0.25"]) == 1
    assert "taken for all" not in capsys.readouterr().out  # nothing was replaced
    for text, words in (
        ("slide_id,mpp\ns0,-1\n", "must be above 0"),
        ("slide_id,mpp\ns0,\n", "no line has an mpp"),
        ("slide_id,mpp\n,1\n", "neither `slide` nor"),
        ("slide_id,mpp\ns0,0.25\ns0,0.5\n", "line 3: s0 again, first on line 2"),
    ):
        table.write_text(text)
        with pytest.raises(SystemExit):
            main([*command, *more, "--slides-csv", str(table)])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, *more, "--slides-csv", str(table), "--mpp0", "0.25"])
    assert "in place of --mpp0" in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_rest(tmp_path, bags, capsys):
    (bags / "bad.h5").write_bytes(b"not HDF5")
    with h5py.File(bags / "linked.h5", "w") as file:
        file["features"] = h5py.ExternalLink(str(bags / "s0.h5"), "features")
        file["coords"] = h5py.ExternalLink(str(bags / "s0.h5"), "coords")
    assert main(["bags", "export", str(bags), "--to", "clam", "--out", str(tmp_path / "c")]) == 1
    printed = capsys.readouterr().out
    assert "2 of 4 bags" in printed
    assert "bad.h5" in printed and "outside the file" in printed
    assert len(list((tmp_path / "c" / "pt_files").iterdir())) == 2


def test_one_damaged_file_of_stamp_does_not_stop_the_rest(tmp_path, bags, capsys):
    there = tmp_path / "stamp"
    assert main(["bags", "export", str(bags), "--to", "stamp", "--out", str(there)]) == 0
    with h5py.File(there / "s0.h5", "r+") as file:
        file.attrs["tile_size_px"] = "224 px"
    command = ["bags", "import", str(there), "--from", "stamp", "--mpp0", "0.25"]
    assert main([*command, "--out", str(tmp_path / "back")]) == 1
    printed = capsys.readouterr().out
    assert f"failed: {there / 's0.h5'}" in printed and "1 of 2 bags" in printed
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["s1.h5"]


def test_stamp_s_name_of_the_encoder_is_told_and_can_be_overruled(tmp_path, bags, capsys):
    there = tmp_path / "stamp"
    assert main(["bags", "export", str(bags), "--to", "stamp", "--out", str(there)]) == 0
    for path in there.iterdir():
        with h5py.File(path, "r+") as file:
            file.attrs["extractor"] = "mahmood-uni2"
    command = ["bags", "import", str(there), "--from", "stamp", "--mpp0", "0.25"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "mahmood-uni2" in line]
    assert len(told) == 1 and "as STAMP calls it" in told[0] and "--encoder" in told[0]
    assert read_bag(tmp_path / "a" / "s0.h5").info.encoder == "mahmood-uni2"
    assert main([*command, "--out", str(tmp_path / "b"), "--encoder", "uni2-h"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "mahmood-uni2" in line]
    assert told == ["encoder: uni2-h, as given; STAMP calls it 'mahmood-uni2'"]
    assert read_bag(tmp_path / "b" / "s0.h5").info.encoder == "uni2-h"


ACTIONS = [["export", "--to"], ["import", "--from"]]


@pytest.mark.parametrize("action", ACTIONS, ids=["export", "import"])
@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_two_files_of_one_name_are_refused(tmp_path, bags, action, layout, capsys):
    """One of them would be left."""
    other, out = tmp_path / "other" / "s1.h5", tmp_path / "out"
    other.parent.mkdir()
    other.write_bytes((bags / "s1.h5").read_bytes())
    verb, option = action
    command = ["bags", verb, str(bags), str(other), option, layout, "--out", str(out)]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--overwrite"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert str(bags / "s1.h5") in said and str(other) in said
    assert not out.exists()


@pytest.mark.parametrize("action", ACTIONS, ids=["export", "import"])
@pytest.mark.parametrize("layout", ["trident", "clam"])
def test_an_output_where_an_input_is_is_refused(tmp_path, bags, action, layout, capsys):
    verb, option = action
    inside = bags
    if (verb, layout) == ("export", "clam"):  # writes a folder deeper
        bags, inside = bags.rename(tmp_path / "h5_files"), tmp_path
    before = {path.name: path.read_bytes() for path in bags.iterdir()}
    (tmp_path / "link").symlink_to(inside)
    for out in (inside, tmp_path / "link"):
        with pytest.raises(SystemExit) as caught:
            main(["bags", verb, str(bags), option, layout, "--out", str(out), "--overwrite"])
        assert caught.value.code == 2
        assert "Choose another --out" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in bags.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [["export"], ["export", "--from", "clam"], ["import", "--to", "clam", "--from", "clam"]],
)
def test_wrong_usage_gives_2(tmp_path, bags, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["bags", *arguments, str(bags), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["bags", "export", str(tmp_path / "none"), "--to", "clam", "--out", str(tmp_path)])
    assert caught.value.code == 2

"""The bag's contract: names and types in the file, atomic writing, foreign files."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest

from xmag_hf.embedding import Bag, BagError, BagInfo, read_bag, write_bag
from xmag_hf.embedding.bag import read_info

INFO = BagInfo(
    encoder="xmag/base",
    encoder_revision="sha256:00112233aabbccdd",
    pooling="cls",
    precision="bf16",
    mpp=2.0,
    patch_px=224,
    overlap=32,
    input_px=224,
    input_mpp=2.0,
    mpp0=0.2524,
    mpp_source="openslide",
    level=1,
    level0_size=(10_752, 10_240),
    reader="openslide-region-lanczos",
    tissue="saturation-otsu-1",
    tissue_threshold=0.25,
    pad_edges=True,
    unreadable_patches=2,
    padded_patches=1,
    slide_sha256_head="ab" * 32,
)


@pytest.fixture
def bag() -> Bag:
    rng = np.random.default_rng(0)
    coords = rng.integers(0, 2**40, (5, 2))
    features = rng.normal(size=(5, 7)).astype(np.float16)
    tokens = rng.normal(size=(5, 16, 4)).astype(np.float16)
    return Bag("s1", features, coords, INFO, tokens)


def test_the_file_holds_what_the_contract_says(tmp_path, bag):
    write_bag(tmp_path / "s1.h5", bag)
    width = 224 * 2.0 / 0.2524
    with h5py.File(tmp_path / "s1.h5") as file:
        assert set(file) == {"features", "coords", "tokens"}
        assert (file["features"].dtype, file["features"].shape) == (np.float16, (5, 7))
        assert (file["coords"].dtype, file["tokens"].dtype) == (np.int64, np.float16)
        assert (file["coords"][()] == bag.coords).all()
        attributes = dict(file["coords"].attrs)
        assert attributes.pop("savetodir") == str(tmp_path)
        assert attributes.pop("patch_size_level0_exact") == pytest.approx(width, rel=1e-15)
        assert attributes == {
            "patch_size": 224,
            "patch_size_level0": round(width),
            "level0_magnification": 40,
            "target_magnification": 5,
            "overlap": 32,
            "name": "s1",
            "level0_width": 10_752,
            "level0_height": 10_240,
        }
        root = dict(file.attrs)
    assert (root.pop("format"), root.pop("format_version")) == ("xmag-bag", 1)
    assert root.pop("created_by").startswith("xmag_hf ")
    said = {k: v for k, v in dataclasses.asdict(INFO).items() if k in root}
    assert root == said
    names = "encoder encoder_revision pooling precision mpp patch_px mpp0 mpp_source reader tissue"
    assert set(names.split()) | {"tissue_threshold", "slide_sha256_head"} <= set(root)


def test_reading_gives_back_everything(tmp_path, bag):
    back = read_bag(write_bag(tmp_path / "s1.h5", bag))
    for name in ("features", "coords", "tokens"):
        assert (getattr(back, name) == getattr(bag, name)).all()
        assert getattr(back, name).dtype == getattr(bag, name).dtype
    width = back.info.patch_size_level0
    assert dataclasses.replace(back.info, patch_size_level0=None) == INFO
    assert back.info.width_level0 == width == pytest.approx(224 * 2.0 / 0.2524)
    assert back.identity["encoder_revision"] == "sha256:00112233aabbccdd"


@pytest.mark.parametrize("leading", [False, True])
def test_a_file_of_trident(tmp_path, leading):
    features = np.arange(12, dtype=np.float32).reshape(3, 4)
    coords = np.array([[0, 0], [1024, 0], [0, 1024]])
    with h5py.File(tmp_path / "case.h5", "w") as file:
        file["features"] = features[None] if leading else features
        file["coords"] = coords
        file["coords"].attrs.update(
            {
                "patch_size": 512,
                "patch_size_level0": 1024,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "name": "case",
                "savetodir": "./out",
                "level0_width": 4096,
                "level0_height": 2048,
            }
        )
    bag = read_bag(tmp_path / "case.h5")
    assert (bag.features == features).all()
    assert (bag.coords == coords).all()
    info = bag.info
    assert (info.patch_px, info.patch_size_level0, info.overlap) == (512, 1024.0, 0)
    assert (info.magnifications, info.level0_size) == ((40.0, 20.0), (4096, 2048))
    assert (info.mpp, info.mpp0, info.encoder, info.created_by) == (None,) * 4


def test_a_file_of_clam(tmp_path):
    with h5py.File(tmp_path / "slide_1.h5", "w") as file:
        file.create_dataset("features", data=np.ones((2, 3), np.float32), maxshape=(None, 3))
        file.create_dataset("coords", data=np.array([[5, 6], [7, 8]], np.int32))
    bag = read_bag(tmp_path / "slide_1.h5")
    assert bag.coords.dtype == np.int64
    assert bag.coords.tolist() == [[5, 6], [7, 8]]
    assert bag.info == BagInfo(created_by=None)


def test_data_outside_the_file_are_not_followed(tmp_path, bag):
    secret = tmp_path / "secret.h5"
    write_bag(secret, bag)
    raw = tmp_path / "secret.raw"
    raw.write_bytes(bytes(5 * 7 * 2))
    layout = h5py.VirtualLayout((5, 7), np.float16)
    layout[:] = h5py.VirtualSource(str(secret), "features", (5, 7))
    for kind in ("link", "storage", "virtual", "soft"):
        path = tmp_path / f"{kind}.h5"
        with h5py.File(path, "w") as file:
            file["coords"] = bag.coords
            if kind == "link":
                file["features"] = h5py.ExternalLink(str(secret), "features")
            elif kind == "soft":
                file["features"] = h5py.SoftLink("/coords")
            elif kind == "virtual":
                file.create_virtual_dataset("features", layout)
            else:
                external = [(str(raw), 0, h5py.h5f.UNLIMITED)]
                file.create_dataset("features", (5, 7), np.float16, external=external)
        with pytest.raises(BagError, match="outside the file"):
            read_bag(path)


def test_what_is_no_bag(tmp_path, bag):
    whole = write_bag(tmp_path / "whole.h5", bag).read_bytes()
    cases = {"empty": b"", "text": b"no bag at all", "half": whole[: len(whole) // 2]}
    for name, content in cases.items():
        (tmp_path / f"{name}.h5").write_bytes(content)
        with pytest.raises(BagError, match=f"{name}.h5"):
            read_bag(tmp_path / f"{name}.h5")
    arrays = {"features": np.ones((3, 2), np.float32), "coords": np.ones((3, 2), np.int64)}
    wrong = {
        "without": {"features": arrays["features"]},
        "short": arrays | {"coords": np.ones((2, 2), np.int64)},
        "flat": arrays | {"features": np.ones(3, np.float32)},
        "deep": arrays | {"features": np.ones((2, 3, 2), np.float32)},
        "coords": arrays | {"coords": np.ones(3, np.int64)},
        "words": arrays | {"features": np.full((3, 2), b"a")},
    }
    for name, data in wrong.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, array in data.items():
                file[key] = array
        with pytest.raises(BagError, match="features|coords"):
            read_bag(tmp_path / f"{name}.h5")
        with pytest.raises(BagError, match=f"{name}.h5: .*(features|coords)"):
            read_info(tmp_path / f"{name}.h5")
    with pytest.raises(FileNotFoundError):
        read_bag(tmp_path / "absent.h5")


def test_coordinates_that_are_no_pixels_are_refused(tmp_path):
    """um, cut to whole numbers, would be places of another scale."""
    for name, coords in (("um", [[0.0, 56.5], [113.1, 0.0]]), ("nan", [[0.0, np.nan], [1, 1]])):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = np.ones((2, 3), np.float32), np.array(coords)
        with pytest.raises(BagError, match="no level-0 pixels"):
            read_bag(tmp_path / f"{name}.h5")
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["features"], file["coords"] = (
            np.ones((2, 3), np.float32),
            np.array([[0.0, 56], [7, 8]]),
        )
    assert read_bag(tmp_path / "whole.h5").coords.tolist() == [[0, 56], [7, 8]]


def test_a_later_format_is_not_guessed_at(tmp_path, bag):
    path = write_bag(tmp_path / "s1.h5", bag)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(BagError, match="format 2"):
        read_bag(path)


def test_damage_within_a_file_names_the_file(tmp_path):
    """HDF5's checksum finds it; h5py alone raises OSError without the path."""
    path = tmp_path / "s1.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=np.ones((8, 4), np.float32), fletcher32=True)
        file["coords"] = np.zeros((8, 2), np.int64)
        offset = file["features"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)
    with pytest.raises(BagError, match=r"s1\.h5: damaged"):
        read_bag(path)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_embeddings_that_are_no_numbers_are_not_written(tmp_path, bag, value):
    bag.features[2, 3] = value
    with pytest.raises(BagError, match="float32"):
        write_bag(tmp_path / "s1.h5", bag)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_bag_and_nothing_else(tmp_path, bag):
    """The kernel's limit on a file's size stops a write in the middle, as a full disk does."""
    path = write_bag(tmp_path / "s1.h5", bag)
    old = path.read_bytes()
    large = Bag("s1", np.ones((1000, 1000), np.float32), np.zeros((1000, 2), np.int64), INFO)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_bag(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_that_do_not_fit_are_refused():
    good = {"features": np.ones((3, 2), np.float16), "coords": np.ones((3, 2), np.int64)}
    for wrong in (
        {"features": np.ones((3, 2))},
        {"coords": np.ones((3, 2), np.int32)},
        {"coords": np.ones((2, 2), np.int64)},
        {"tokens": np.ones((2, 16, 4), np.float16)},
        {"tokens": np.ones((3, 4, 16), np.float16)},
    ):
        with pytest.raises(BagError, match="a bag has"):
            Bag("s", **(good | wrong))


def test_reading_bags_needs_neither_openslide_nor_torch():
    import subprocess
    import sys

    code = (
        "import sys; from xmag_hf.embedding import read_bag, write_bag\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'openslide')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0

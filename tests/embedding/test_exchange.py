"""TRIDENT's, CLAM's and STAMP's layouts, read and written."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import torch

from xmag_hf.embedding import Bag, BagError, BagInfo, export_bag, import_bag
from xmag_hf.embedding.exchange import find_files

INFO = BagInfo(
    encoder="phikon",
    encoder_revision="c0ffee",
    pooling="cls",
    precision="fp32",
    mpp=0.5,
    patch_px=256,
    overlap=0,
    input_px=224,
    input_mpp=0.5 * 256 / 224,
    mpp0=0.2524,
    mpp_source="openslide",
    level0_size=(90_000, 80_000),
)


@pytest.fixture(params=[np.float16, np.float32])
def bag(request: pytest.FixtureRequest) -> Bag:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(6, 5)).astype(request.param)
    coords = rng.integers(0, 90_000, (6, 2))
    tokens = rng.normal(size=(6, 16, 5)).astype(np.float16)
    return Bag("case-1.svs", features, coords, INFO, tokens)


def test_trident(tmp_path, bag):
    lost = export_bag(bag, tmp_path, "trident")
    with h5py.File(tmp_path / "case-1.svs.h5") as file:
        assert set(file) == {"features", "coords"}
        assert (file["features"][()] == bag.features).all()
        assert (file["coords"].dtype, file["coords"].shape) == (np.int64, (6, 2))
        attributes = dict(file["coords"].attrs)
        assert not file.attrs
    assert set(attributes) == {
        *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification"),
        *("overlap", "name", "savetodir", "level0_width", "level0_height"),
    }
    assert attributes["patch_size_level0"] == 507  # 256 * 0.5 / 0.2524 = 507.13
    back = import_bag(tmp_path / "case-1.svs.h5", "trident")
    assert (back.features == bag.features).all()
    assert (back.coords == bag.coords).all()
    assert back.info.patch_px == 256
    assert back.info.level0_size == INFO.level0_size
    assert back.info.magnifications == (40.0, 20.0)
    assert {"encoder", "encoder_revision", "mpp", "mpp0", "tokens"} <= set(lost)
    assert not {"patch_px", "overlap", "level0_size", "float32"} & set(lost)


def test_clam(tmp_path, bag):
    lost = export_bag(bag, tmp_path, "clam")
    with h5py.File(tmp_path / "h5_files" / "case-1.svs.h5") as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
    tensor = torch.load(tmp_path / "pt_files" / "case-1.svs.pt", weights_only=True)
    assert tensor.dtype == torch.float32
    assert (tensor.numpy() == bag.features.astype(np.float32)).all()
    (path,) = find_files([tmp_path], "clam")
    back = import_bag(path, "clam", encoder="phikon", mpp=0.5, patch_px=256, mpp0=0.2524)
    assert (back.features.astype(bag.features.dtype) == bag.features).all()
    assert (back.coords == bag.coords).all()
    assert (back.info.encoder, back.info.width_level0) == ("phikon", 256 * 0.5 / 0.2524)
    assert {"encoder", "mpp", "patch_px", "overlap", "tokens"} <= set(lost)


def test_stamp(tmp_path, bag):
    lost = export_bag(bag, tmp_path, "stamp")
    path = tmp_path / "case-1.svs.h5"
    with h5py.File(path) as file:
        assert set(file) == {"feats", "coords"}
        assert (file["feats"].dtype, file["coords"].dtype) == (np.float16, np.float32)
        assert np.allclose(file["coords"], bag.coords * 0.2524, rtol=1e-6)
        attributes = dict(file.attrs)
    assert attributes.pop("stamp_version").count(".") == 2
    assert attributes == {
        "extractor": "phikon",
        "unit": "um",
        "tile_size_um": 128.0,
        "tile_size_px": 256,
        "feat_type": "tile",
    }
    back = import_bag(path, "stamp", mpp0=0.2524)
    assert (back.coords == bag.coords).all()  # through um in float32, at 90,000 px
    assert (back.features == bag.features.astype(np.float16)).all()
    assert (back.info.encoder, back.info.mpp, back.info.patch_px) == ("phikon", 0.5, 256)
    assert ("float32" in lost) == (bag.features.dtype == np.float32)
    with pytest.raises(BagError, match="--mpp0"):
        import_bag(path, "stamp")


def test_stamp_files_that_cannot_be_bags(tmp_path):
    cases = {
        "patient": ({"unit": "um", "feat_type": "patient"}, "feat_type"),
        "pixels": ({"feat_type": "tile"}, "unit"),
    }
    for name, (attributes, said) in cases.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["feats"], file["coords"] = np.ones((2, 3), np.float16), np.ones((2, 2), np.float32)
            file.attrs.update(attributes)
        with pytest.raises(BagError, match=said):
            import_bag(tmp_path / f"{name}.h5", "stamp", mpp0=0.5)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.ones((2, 3))
    with pytest.raises(BagError, match="no 'feats'"):
        import_bag(tmp_path / "other.h5", "stamp", mpp0=0.5)


def test_damage_in_one_of_stamp_s_files_is_named(tmp_path):
    """HDF5's checksum finds it; h5py alone raises OSError without the path."""
    path = tmp_path / "s1.h5"
    with h5py.File(path, "w") as file:
        feats = np.ones((8, 4), np.float16)
        file.create_dataset("feats", data=feats, chunks=feats.shape, fletcher32=True)
        file["coords"] = np.zeros((8, 2), np.float32)
        file.attrs["unit"] = "um"
        offset = file["feats"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)
    with pytest.raises(BagError, match=r"s1\.h5: damaged"):
        import_bag(path, "stamp", mpp0=0.5)


@pytest.mark.parametrize(
    "wrong",
    [{"tile_size_px": "224 px"}, {"tile_size_px": 0}, {"tile_size_um": np.nan}],
    ids=["words", "zero", "nan"],
)
def test_sizes_of_stamp_that_are_no_numbers(tmp_path, bag, wrong):
    export_bag(bag, tmp_path, "stamp")
    with h5py.File(tmp_path / "case-1.svs.h5", "r+") as file:
        file.attrs.update(wrong)
    with pytest.raises(BagError, match=r"case-1\.svs\.h5: .*(224 px|tile_size)"):
        import_bag(tmp_path / "case-1.svs.h5", "stamp", mpp0=0.2524)


def test_an_encoder_that_is_given_wins_over_stamp_s_name(tmp_path, bag):
    stamps = dataclasses.replace(bag, info=dataclasses.replace(INFO, encoder="mahmood-uni2"))
    export_bag(stamps, tmp_path, "stamp")
    path = tmp_path / "case-1.svs.h5"
    assert import_bag(path, "stamp", mpp0=0.2524).info.encoder == "mahmood-uni2"
    assert import_bag(path, "stamp", mpp0=0.2524, encoder="uni2-h").info.encoder == "uni2-h"
    with pytest.raises(BagError, match="patch_px 256, but 224"):  # anything else is still refused
        import_bag(path, "stamp", mpp0=0.2524, encoder="uni2-h", patch_px=224)


def test_what_cannot_be_exported(tmp_path, bag):
    bare = dataclasses.replace(bag, info=BagInfo())
    with pytest.raises(BagError, match="lacks mpp"):
        export_bag(bare, tmp_path / "a", "stamp")
    assert not (tmp_path / "a").exists()
    large = dataclasses.replace(bag, features=np.full((6, 5), 1e5, np.float32))
    with pytest.raises(BagError, match="65504"):
        export_bag(large, tmp_path, "stamp")
    far = dataclasses.replace(bag, coords=np.full((6, 2), 2**31))
    with pytest.raises(BagError, match="32 bits"):
        export_bag(far, tmp_path, "clam")
    export_bag(bag, tmp_path, "trident")
    with pytest.raises(BagError, match="--overwrite"):
        export_bag(bag, tmp_path, "trident")
    export_bag(bag, tmp_path, "trident", overwrite=True)
    with pytest.raises(BagError, match="no such layout"):
        export_bag(bag, tmp_path, "zarr")


def test_the_scale_of_an_import_is_that_of_the_file_s_own_sizes(tmp_path):
    """A tool that cuts by magnification: 512 px of 0.2524 um for 256 px at "20x" are 0.5048."""
    path = tmp_path / "case.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.ones((2, 3), np.float32), np.array([[0, 0], [512, 0]])
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512})
    back = import_bag(path, "trident", mpp0=0.2524)
    assert back.info.mpp == pytest.approx(0.5048)
    assert back.info.width_level0 == pytest.approx(512)
    for wrong in ({"mpp": 0.5}, {"mpp": 2.0}):
        with pytest.raises(BagError, match=r"0\.5048 um/px"):
            import_bag(path, "trident", mpp0=0.2524, **wrong)
    assert import_bag(path, "trident", mpp0=0.25, mpp=0.5).info.mpp == 0.5


def test_our_rounded_width_is_no_contradiction(tmp_path, bag):
    export_bag(bag, tmp_path, "trident")  # 507 for 507.13
    back = import_bag(tmp_path / "case-1.svs.h5", "trident", mpp=0.5, mpp0=0.2524)
    assert back.info.width_level0 == 256 * 0.5 / 0.2524


@pytest.mark.parametrize("wrong", [{"mpp0": 0.0}, {"mpp": -1.0}, {"patch_px": 0}, {"mpp0": np.nan}])
def test_scales_that_are_none(tmp_path, bag, wrong):
    export_bag(bag, tmp_path, "stamp")
    with pytest.raises(BagError, match="above 0"):
        import_bag(tmp_path / "case-1.svs.h5", "stamp", **({"mpp0": 0.25} | wrong))


def test_um_px_come_back_as_they_were(tmp_path, bag):
    """0.1 * 3 / 3 is 0.10000000000000002: a head would refuse the bag for it."""
    mpps = [0.1, 0.47, 0.55, 1.1, 2.2]
    for mpp in mpps:
        for px in (3, 224, 256, 333):
            info = dataclasses.replace(INFO, mpp=mpp, patch_px=px)
            export_bag(dataclasses.replace(bag, info=info), tmp_path, "stamp", overwrite=True)
            back = import_bag(tmp_path / "case-1.svs.h5", "stamp", mpp0=0.2524, mpp=mpp)
            assert back.info.mpp == mpp


def test_a_contradiction_is_not_overruled(tmp_path, bag):
    export_bag(bag, tmp_path, "trident")
    with pytest.raises(BagError, match="patch_px 256, but 224"):
        import_bag(tmp_path / "case-1.svs.h5", "trident", patch_px=224)

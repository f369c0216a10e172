"""Labelled images from CSV, folders and data sets; what is refused says why."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.images import open_images
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.protocols import is_official


def _picture(value: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 255 - value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and labels.csv."""
    (tmp_path / "images").mkdir()
    for number in (1, 2, 10):
        _picture(number).save(tmp_path / "images" / f"img{number}.png")
    lines = ["file,label,patient_id,mpp"]
    lines += ["images/img10.png,b,7,0.5", "images/img1.png,a,8,0.5", "images/img2.png,b,7,0.25"]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def _options(folder: Path, **given) -> ProbeOptions:
    return ProbeOptions(**({"data": str(folder), "labels_csv": str(folder / "labels.csv")} | given))


def test_csv_is_sorted_naturally_with_its_columns(folder):
    images = open_images(_options(folder))
    split = images.splits["all"]
    assert images.classes == ("a", "b")
    assert split.ids.tolist() == ["img1", "img2", "img10"]
    assert split.labels is not None and split.labels.tolist() == [0, 1, 1]
    assert split.groups is not None and split.groups.tolist() == ["8", "7", "7"]
    assert split.mpp.tolist() == [0.5, 0.25, 0.5]
    assert split.image(2).getpixel((0, 0)) == (10, 0, 245)
    assert split.size(0) == (6, 4)


def test_data_mpp_fills_but_does_not_overrule_and_groups_can_be_turned_off(folder):
    with pytest.raises(ProbeError, match="--data-mpp 1: column mpp says 0.5 in row 0.*3 rows"):
        open_images(_options(folder, data_mpp=1.0))
    text = (folder / "labels.csv").read_text().replace("0.25", "")
    (folder / "labels.csv").write_text(text)
    split = open_images(_options(folder, data_mpp=0.5, group_column="-")).splits["all"]
    assert split.mpp.tolist() == [0.5, 0.5, 0.5] and split.groups is None


def test_fingerprint_follows_pixels_and_scale_not_labels(folder):
    def fingerprint(**given):
        return open_images(_options(folder, **given)).fingerprint

    before = fingerprint()
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace("0.25", "0.3"))
    assert fingerprint() != before
    (folder / "labels.csv").write_text(text.replace("img1.png,a", "img1.png,c"))
    assert fingerprint() == before
    _picture(99).save(folder / "images" / "img2.png")
    assert fingerprint() != before


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("file,", "path,", "need a header with one of file"),
        ("images/img2.png", "images/img3.png", r"1 of 3 files are not there: .*img3.png"),
        (",b,7,0.25", ",b,7", "line 4: not 4 values"),
        (",b,7,0.25", ",,7,0.25", r"1 of 3 images of split 'all' have no label \(first: row 2\)"),
        (",a,8", ",b,8", "need two classes"),
        ("0.25", "fine", "mpp is 'fine' in row 2"),
        ("0.25", "-1", "mpp is '-1' in row 2"),
        (",mpp", ",scale", "um/px of its images is not known. Give --data-mpp"),
        (",label,", ",diagnosis,", "no column 'label'.*diagnosis.*--label-column"),
        ("b,7,0.25", "b,,0.25", r"1 images of split 'all' have no patient_id \(rows 2\)"),
        ("b,7,0.25", "b,nan,0.25", r"1 images of split 'all' have no patient_id \(rows 2\)"),
        ("b,7,0.25", "b,#N/A,0.25", r"1 images of split 'all' have no patient_id \(rows 2\)"),
        (
            ",b,7,0.25",
            ",N/A ,7,0.25",
            r"1 of 3 images of split 'all' have no label \(first: row 2\)",
        ),
        ("label,patient_id", "label,label", r"labels\.csv: column label stands there twice"),
        ("images/img2.png,b", "images/../images/img1.png,b", "img1.png more than once"),
        ("b,7,0.25", "\udce9,7,0.25", "Save it as UTF-8"),
    ],
)
def test_bad_csv_is_refused_by_name(folder, old, new, words):
    text = (folder / "labels.csv").read_text()
    assert old in text
    (folder / "labels.csv").write_text(text.replace(old, new), errors="surrogateescape")
    with pytest.raises(ProbeError, match=words):
        open_images(_options(folder))


def test_doubled_ids_are_refused(folder):
    with pytest.raises(ProbeError, match="--id-column patient_id holds 7 more than once"):
        open_images(_options(folder, id_column="patient_id"))


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_image_is_named(folder, damage):
    path = folder / "images" / "img1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900] if damage == "cut" else b"no image at all")
    split = open_images(_options(folder)).splits["all"]
    with pytest.raises(ProbeError, match=r"image 'img1' does not decode"):
        split.image(0)
    if damage == "text":
        with pytest.raises(ProbeError, match=r"image 'img1' does not decode"):
            split.size(0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_modes_of_8_bits_are_read_as_pillow_does(folder, mode):
    image = _picture(200).convert(mode)
    path = folder / "images" / "img1.tif"
    image.save(path)
    found = open_images(_folder_options(folder, "img1.tif")).splits["all"].image(0)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def _folder_options(folder: Path, name: str) -> ProbeOptions:
    """Of one image alone."""
    for path in (folder / "images").iterdir():
        if path.name != name:
            path.unlink()
    return ProbeOptions(data=str(folder / "images"), nuclei_csv="unused", data_mpp=0.5)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white_as_glass_is(folder, mode):
    """Left half seen through entirely, right half by half: there 0.5 * 255 + 0.5 * 100."""
    pixels = np.full((4, 6, 4), 100, dtype=np.uint8)
    pixels[:, :3, 3], pixels[:, 3:, 3] = 0, 128
    image = Image.fromarray(pixels, "RGBA")
    if mode == "P":  # one colour is transparent, the other not at all
        image = Image.fromarray((pixels[..., 3] > 0).astype(np.uint8), "P")
        image.putpalette([9, 9, 9, 100, 100, 100])
        image.save(folder / "images" / "img1.png", transparency=0)
    else:
        image.convert(mode).save(folder / "images" / "img1.png")
    found = np.asarray(open_images(_folder_options(folder, "img1.png")).splits["all"].image(0))
    assert (found[:, :3] == 255).all()
    expected = 100 if mode == "P" else 177
    assert abs(found[:, 3:].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_grey_of_more_than_8_bits_is_refused(folder, dtype):
    Image.fromarray(np.full((4, 6), 40000, dtype=dtype)).save(folder / "images" / "img1.tif")
    split = open_images(_folder_options(folder, "img1.tif")).splits["all"]
    with pytest.raises(ProbeError, match="image 'img1': grey values of more than 8 bits"):
        split.image(0)


def test_tissue_arrays_are_not_taken_for_an_attack(folder):
    """14,000 px a side are above Pillow's own limit; only the header is read here."""
    Image.new("1", (14_000, 14_000)).save(folder / "images" / "img1.png")
    split = open_images(_folder_options(folder, "img1.png")).splits["all"]
    assert split.size(0) == (14_000, 14_000)


def test_column_split_of_the_csv_is_used(folder):
    lines = (folder / "labels.csv").read_text().splitlines()
    added = zip(lines, ["split", "train", "val", "train"], strict=True)
    (folder / "labels.csv").write_text("\n".join(f"{line},{split}" for line, split in added))
    splits = open_images(_options(folder)).splits
    assert {name: split.ids.tolist() for name, split in splits.items()} == {
        "train": ["img2", "img10"],
        "validation": ["img1"],
    }


def test_a_line_without_a_split_is_no_split_of_its_own(folder):
    lines = (folder / "labels.csv").read_text().splitlines()
    added = zip(lines, ["split", "train", "NA", "train"], strict=True)
    (folder / "labels.csv").write_text("\n".join(f"{line},{split}" for line, split in added))
    with pytest.raises(ProbeError, match="line 3: split is empty"):
        open_images(_options(folder))


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (("Train", "TEST "), ("train", "test")),
        ((" training", "Testing"), ("train", "test")),
        (("train", "VAL"), ("train", "validation")),
        (("Train", "Validation"), ("train", "validation")),
        (("Lab A", "Lab a"), ("Lab A", "Lab a")),  # no known names: what they mean is theirs
    ],
)
def test_names_of_splits_are_known_in_any_case(folder, written, wanted):
    """A test split that is not known as one would be pooled and cross-validated in silence."""
    lines = (folder / "labels.csv").read_text().splitlines()
    added = zip(lines, ["split", *written, written[0]], strict=True)
    (folder / "labels.csv").write_text("\n".join(f"{line},{split}" for line, split in added))
    options = _options(folder)
    images = open_images(options)
    assert {name: split.ids.tolist() for name, split in images.splits.items()} == {
        wanted[0]: ["img2", "img10"],
        wanted[1]: ["img1"],
    }
    assert is_official(images, options) == (wanted == ("train", "test"))


def test_space_around_labels_and_groups_means_nothing(folder):
    text = (folder / "labels.csv").read_text().replace("b,7,0.25", " b ,7 ,0.25")
    (folder / "labels.csv").write_text(text)
    images = open_images(_options(folder))
    split = images.splits["all"]
    assert images.classes == ("a", "b")
    assert split.labels is not None and split.labels.tolist() == [0, 1, 1]
    assert split.groups is not None and split.groups.tolist() == ["8", "7", "7"]


def test_saved_splits_are_known_in_any_case(two_scales, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(str(two_scales), cache_dir=str(tmp_path / "hf"))
    saved = {"Training": data["train"], "TEST": data["test"]}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    assert set(open_images(ProbeOptions(data=str(tmp_path / "saved"))).splits) == {"train", "test"}


def test_folder_without_labels_is_in_natural_order(folder):
    """For counts; img10 after img2, as the folds of published numbers expect."""
    options = ProbeOptions(data=str(folder / "images"), nuclei_csv="nuclei.csv", data_mpp=0.5)
    images = open_images(options)
    assert images.splits["all"].ids.tolist() == ["img1", "img2", "img10"]
    assert images.classes == () and images.splits["all"].labels is None


def _bytes(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def two_scales(tmp_path: Path) -> Path:
    """Parquet with image_20x and image_5x, splits train and test, as `xmag spider` writes."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image_20x": datasets.Image(),
            "image_5x": datasets.Image(),
            "label": datasets.ClassLabel(names=["fat", "muscle"]),
            "slide_id": datasets.Value("string"),
        }
    )
    (tmp_path / "data").mkdir()
    for split, start in (("train", 0), ("test", 10)):
        rows = {
            "image_20x": [_bytes(_picture(start + i)) for i in range(3)],
            "image_5x": [_bytes(_picture(100 + start + i)) for i in range(3)],
            "label": [1, 0, 1],
            "slide_id": ["s1", "s1", "s2"],
        }
        data = datasets.Dataset.from_dict(rows, features=features)
        data.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    return tmp_path


def test_parquet_with_two_scales_gives_each_row_its_own(two_scales):
    images = open_images(ProbeOptions(data=str(two_scales)))
    assert images.classes == ("fat", "muscle") and set(images.splits) == {"train", "test"}
    fine, coarse = images.at(0.5), images.at(2.0)
    assert fine.splits["test"].mpp.tolist() == [0.5] * 3
    assert coarse.splits["test"].mpp.tolist() == [2.0] * 3
    assert fine.splits["test"].image(1).getpixel((0, 0))[0] == 11
    assert coarse.splits["test"].image(1).getpixel((0, 0))[0] == 111
    assert images.at(1.0).splits["test"].mpp[0] == 0.5  # never from a coarser image
    assert images.at(0.25).splits["test"].mpp[0] == 0.5  # refused later, as too coarse
    assert fine.fingerprint != coarse.fingerprint
    np.testing.assert_array_equal(fine.splits["train"].labels, [1, 0, 1])
    assert fine.splits["train"].groups is not None
    assert fine.splits["train"].groups.tolist() == ["s1", "s1", "s2"]


def test_known_scales_are_not_overruled(two_scales):
    with pytest.raises(ProbeError, match="whose scales are known"):
        open_images(ProbeOptions(data=str(two_scales), data_mpp=0.3))
    options = ProbeOptions(data=str(two_scales), data_mpp=0.3, image_column="image_20x")
    assert open_images(options).splits["test"].mpp[0] == 0.3
    with pytest.raises(ProbeError, match="--image-column picture.*has image_20x"):
        open_images(ProbeOptions(data=str(two_scales), image_column="picture"))


def test_columns_of_scale_come_before_names(two_scales, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(str(two_scales), cache_dir=str(tmp_path / "hf"))
    for split in data:
        data[split] = data[split].add_column("mpp", [0.46] * 3).add_column("mpp_5x", [1.84] * 3)
    data["val"] = data.pop("test")
    data.save_to_disk(str(tmp_path / "saved"))
    saved = str(tmp_path / "saved")
    images = open_images(ProbeOptions(data=saved))
    assert set(images.splits) == {"train", "validation"}
    assert [view.splits["train"].mpp[0] for view in images.views] == [0.46, 1.84]
    one = ProbeOptions(data=saved, image_column="image_5x", data_mpp=2.5)
    with pytest.raises(ProbeError, match="--data-mpp 2.5: column mpp_5x says 1.84"):
        open_images(one)


def test_one_folder_per_class(tmp_path):
    pytest.importorskip("datasets")
    for name in ("tumour", "stroma"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(2):
            _picture(number).save(tmp_path / "train" / name / f"{name}{number}.png")
    images = open_images(ProbeOptions(data=str(tmp_path), data_mpp=0.5))
    split = images.splits["train"]
    assert images.classes == ("stroma", "tumour")
    found = dict(zip(split.ids, split.labels, strict=True))  # type: ignore[arg-type]
    assert found == {"stroma0": 0, "stroma1": 0, "tumour0": 1, "tumour1": 1}


def test_no_such_data(tmp_path):
    with pytest.raises(ProbeError, match="`datasets` cannot load it"):
        open_images(ProbeOptions(data=str(tmp_path / "nowhere"), data_mpp=0.5))

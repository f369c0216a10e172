from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from xmag_hf.distillation.corpus import Corpus, open_corpus
from xmag_hf.distillation.options import DistillationError
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    build_cache,
    find_cache,
    finish_cache,
    teacher_identity,
)
from xmag_hf.distillation.teacher_encoding import shared_cells
from xmag_hf.lock import acquire


@pytest.fixture
def corpus(pair_corpus: Path) -> Corpus:
    return open_corpus(str(pair_corpus))


def _expected(cmu_pixels: np.ndarray) -> np.ndarray:
    """(24, 16, 3) mean colours, straight from the slide's pixels."""
    rows = []
    for top in (100, 1500):
        for y in range(0, 3 * 224, 224):
            for x in range(0, 4 * 224, 224):
                region = cmu_pixels[top + y : top + y + 896, 100 + x : 100 + x + 896]
                cells = region.reshape(4, 224, 4, 224, 3).mean((1, 3)).reshape(16, 3)
                rows.append(cells / 255)
    return np.stack(rows)


def _build(corpus: Corpus, teacher, folder: Path, **changes) -> TeacherFeatures:
    finish_cache(build_cache(corpus, teacher, folder, **changes))
    identity = teacher_identity(teacher, corpus)
    return TeacherFeatures(folder / identity.key, corpus, identity)


@pytest.mark.parametrize("share", [True, False])
def test_features_are_those_of_each_cell(
    corpus: Corpus, teacher, tmp_path: Path, cmu_pixels: np.ndarray, share: bool
) -> None:
    features = _build(corpus, teacher, tmp_path, share=share, batch_size=7)
    got = features.rows(np.arange(24))
    assert got.dtype == np.float16 and got.shape == (24, 16, 3)
    assert np.abs(got - _expected(cmu_pixels)).max() < 1e-3  # float16
    # 4 x 3 pairs at stride 224 cover 7 x 6 sub-patches a slide.
    assert teacher.seen == (2 * 7 * 6 if share else 24 * 16)


# By Pillow's own names, and nothing of the package.
_T = Image.Transpose
TURNED = {
    2: [[], [_T.FLIP_LEFT_RIGHT]],
    4: [[], [_T.ROTATE_180], [_T.FLIP_LEFT_RIGHT], [_T.FLIP_TOP_BOTTOM]],
    8: [
        [],
        [_T.ROTATE_90],
        [_T.ROTATE_180],
        [_T.ROTATE_270],
        [_T.FLIP_LEFT_RIGHT],
        [_T.FLIP_LEFT_RIGHT, _T.ROTATE_90],
        [_T.FLIP_TOP_BOTTOM],
        [_T.FLIP_LEFT_RIGHT, _T.ROTATE_270],
    ],
}


@pytest.mark.parametrize(("count", "share"), [(2, True), (4, False), (8, True)])
def test_cached_views_are_of_truly_turned_regions(
    corpus: Corpus, turning_teacher, tmp_path: Path, cmu_pixels: np.ndarray, count: int, share: bool
) -> None:
    finish_cache(build_cache(corpus, turning_teacher, tmp_path, views=count, share=share))
    assert turning_teacher.seen == count * (2 * 7 * 6 if share else 24 * 16)
    identity = teacher_identity(turning_teacher, corpus, "20x", count)
    features = TeacherFeatures(tmp_path / identity.key, corpus, identity)
    for row, left, top in ((0, 100, 100), (18, 100 + 2 * 224, 1500 + 224)):
        region = Image.fromarray(cmu_pixels[top : top + 896, left : left + 896])
        for number, turns in enumerate(TURNED[count]):
            turned = region
            for turn in turns:
                turned = turned.transpose(turn)
            cells = np.asarray(turned).reshape(4, 224, 4, 224, 3)[:, :112, :, :56]
            expected = cells.mean((1, 3)).reshape(16, 3) / 255
            assert np.abs(features.view(row, number) - expected).max() < 1e-3, (row, turns)
    assert np.array_equal(features[18], features.view(18, 0))
    assert find_cache(tmp_path, "upper-left", corpus, share=share) is None
    assert find_cache(tmp_path, "upper-left", corpus, share=share, views=count) == identity


def test_a_file_that_lacks_views_is_refused(corpus: Corpus, teacher, tmp_path: Path) -> None:
    finish_cache(build_cache(corpus, teacher, tmp_path, views=2))
    identity = teacher_identity(teacher, corpus, "20x", 2)
    with h5py.File(tmp_path / identity.key / "features-00000-of-00002.h5", "a") as file:
        del file["views"]
    with pytest.raises(DistillationError, match="1 dihedral views, expected 2.*Delete"):
        TeacherFeatures(tmp_path / identity.key, corpus, identity)


def test_one_view_is_the_old_file(corpus: Corpus, teacher, tmp_path: Path) -> None:
    """Format 1, without the new data set: what older releases read and wrote."""
    with h5py.File(_build(corpus, teacher, tmp_path).paths[0]) as file:
        assert set(file) == {"features", "slide_id", "x", "y"}
        assert file.attrs["format_version"] == 1 and file["features"].shape == (12, 16, 3)


def _expected_5x(pair_corpus: Path) -> np.ndarray:
    """(24, 16, 3) mean colours of the cells of `image_5x`, each enlarged by Pillow on its own."""
    rows = []
    for path in sorted((pair_corpus / "data").glob("*.parquet")):
        for pair in pq.read_table(path, columns=["image_5x"]).to_pylist():
            view = Image.open(io.BytesIO(pair["image_5x"]["bytes"]))
            boxes = [(x, y, x + 56, y + 56) for y in range(0, 224, 56) for x in range(0, 224, 56)]
            cells = [view.resize((224, 224), Image.Resampling.LANCZOS, box=box) for box in boxes]
            rows.append([np.asarray(cell).mean((0, 1)) / 255 for cell in cells])
    return np.array(rows)


def test_the_5x_control_is_another_cache(
    corpus: Corpus, teacher, tmp_path: Path, pair_corpus: Path
) -> None:
    fine = _build(corpus, teacher, tmp_path).rows(np.arange(24))
    finish_cache(build_cache(corpus, teacher, tmp_path, share=False, teacher_view="5x"))
    identity = teacher_identity(teacher, corpus, "5x")
    coarse = TeacherFeatures(tmp_path / identity.key, corpus, identity).rows(np.arange(24))
    assert np.abs(coarse - _expected_5x(pair_corpus)).max() < 1e-3  # float16
    assert not np.array_equal(coarse, fine)
    assert find_cache(tmp_path, "mean-colour", corpus) == teacher_identity(teacher, corpus)
    found = find_cache(tmp_path, "mean-colour", corpus, teacher_view="5x", share=False)
    assert found == identity


def test_the_20x_key_stays_what_it_was(teacher, corpus: Corpus) -> None:
    """Worked out by hand from the published rule: older caches must be found."""
    fields = ["mean-colour", "sha256:0", "fp32", "mean 0 sd 255", "f" * 64]
    text = "[" + ", ".join(f'"{field}"' for field in fields) + "]"
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert teacher_identity(teacher, corpus).key == key
    assert teacher_identity(teacher, corpus, "5x").key != key


def test_sharing_by_brute_force_at_a_fractional_scale(corpus: Corpus) -> None:
    """Pairs of a 0.5266 um/px slide: origins rounded to whole pixels, strides fractional."""
    step, n = 224 * 0.5 / 0.5266, 6
    x = np.array([round(k * step) for k in range(n)] * n)
    y = np.repeat([round(k * step) for k in range(n)], n)
    index = dataclasses.replace(
        corpus.index,
        slide=np.zeros(n * n, np.int32),
        x=x,
        y=y,
        width0=np.full(n * n, 448 / 0.5266),
    )
    fractional = dataclasses.replace(corpus, index=index)
    first, inverse = shared_cells(fractional, np.arange(n * n))
    assert len(first) == (n + 3) ** 2
    for pair in range(n * n):
        for cell in range(16):
            source, source_cell = divmod(int(first[inverse[pair, cell]]), 16)
            for axis, shift in ((x, cell % 4 - source_cell % 4), (y, cell // 4 - source_cell // 4)):
                assert abs((axis[pair] - axis[source]) + shift * step) <= 1.0


def test_pairs_off_the_grid_share_nothing(corpus: Corpus) -> None:
    shifted = dataclasses.replace(
        corpus, index=dataclasses.replace(corpus.index, x=corpus.index.x + np.arange(24) * 3)
    )
    first, inverse = shared_cells(shifted, np.arange(24))
    assert len(first) == 24 * 16
    assert sorted(inverse.ravel().tolist()) == list(range(24 * 16))


def test_two_builders_make_what_one_makes(corpus: Corpus, teacher, tmp_path: Path) -> None:
    one = _build(corpus, teacher, tmp_path / "one").rows(np.arange(24))
    for rank in range(2):
        partial = build_cache(corpus, teacher, tmp_path / "two", rank=rank, world=2)
    finish_cache(partial)
    identity = teacher_identity(teacher, corpus)
    two = TeacherFeatures(tmp_path / "two" / identity.key, corpus, identity)
    assert np.array_equal(one, two.rows(np.arange(24)))


def test_an_interrupted_build_is_completed_not_repeated(
    corpus: Corpus, teacher, tmp_path: Path
) -> None:
    partial = build_cache(corpus, teacher, tmp_path, rank=0, world=2)  # shard 0 only
    assert not (tmp_path / teacher_identity(teacher, corpus).key).exists()
    seen = teacher.seen
    again = build_cache(corpus, teacher, tmp_path)
    assert again == partial
    assert not list(tmp_path.glob("*.lock"))
    assert teacher.seen == 2 * seen  # only shard 1 was computed
    build_cache(corpus, teacher, tmp_path, share=False)  # made another way: done again
    assert teacher.seen == 2 * seen + 24 * 16


def test_found_without_the_teacher(corpus: Corpus, teacher, tmp_path: Path) -> None:
    def find(name: str = "mean-colour", **changes):
        return find_cache(tmp_path, name, corpus, **changes)

    assert find() is None
    build_cache(corpus, teacher, tmp_path)
    assert find() is None  # still partial
    _build(corpus, teacher, tmp_path)
    identity = teacher_identity(teacher, corpus)
    assert find() == find(revision="sha256:0", precision="fp32") == identity
    assert find(precision="bf16") is None
    assert find(revision="sha256:1") is None  # the teacher's weights have changed since
    assert find("other") is None
    with pytest.raises(DistillationError, match="sub-patches shared"):
        find(share=False)
    teacher.revision = "sha256:1"
    _build(corpus, teacher, tmp_path)
    assert find(revision="sha256:0") == identity
    with pytest.raises(DistillationError, match="several caches"):
        find()
    (tmp_path / identity.key / "features-00000-of-00002.h5").write_bytes(b"damaged")
    assert find() == teacher_identity(teacher, corpus)  # the other one


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_shard_is_computed_anew_and_only_it(
    corpus: Corpus, teacher, tmp_path: Path, lost: int
) -> None:
    features = _build(corpus, teacher, tmp_path)
    before, seen = features.rows(np.arange(24)), teacher.seen
    features.paths[lost].unlink()
    assert find_cache(tmp_path, "mean-colour", corpus) is None
    again = _build(corpus, teacher, tmp_path)
    assert teacher.seen == seen + 7 * 6
    assert np.array_equal(again.rows(np.arange(24)), before)


def test_few_files_stay_open(
    corpus: Corpus, teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmag_hf.distillation.teacher_cache.MOST_OPEN_FILES", 1)
    features = _build(corpus, teacher, tmp_path)
    rows = np.array([0, 13, 1, 14])
    assert np.array_equal(features.rows(rows), np.stack([features[r] for r in rows]))
    assert len(features._files) == 1


@pytest.mark.parametrize("damage", ["truncate", "remove", "attribute", "rows", "version"])
def test_stale_or_damaged_caches_are_refused(
    corpus: Corpus, teacher, tmp_path: Path, damage: str
) -> None:
    features = _build(corpus, teacher, tmp_path)
    path = features.paths[1]
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "remove":
        path.unlink()
    else:
        with h5py.File(path, "a") as file:
            if damage == "attribute":
                file.attrs["revision"] = "sha256:else"
            elif damage == "version":
                file.attrs["format_version"] = 99
            else:
                file["x"][0] += 1
    with pytest.raises(DistillationError, match=r"features-00001-of-00002.h5.*Delete"):
        TeacherFeatures(features.folder, corpus, teacher_identity(teacher, corpus))


def test_key_changes_with_everything_the_numbers_depend_on(corpus: Corpus, teacher) -> None:
    identity = teacher_identity(teacher, corpus)
    keys = {identity.key}
    for field in dataclasses.fields(identity):
        keys.add(dataclasses.replace(identity, **{field.name: "changed"}).key)
    assert len(keys) == 6 and all(len(key) == 16 for key in keys)


def test_infinite_features_are_refused(corpus: Corpus, teacher, tmp_path: Path) -> None:
    teacher.scale.data *= 1e7  # beyond float16
    with pytest.raises(DistillationError, match="not finite"):
        build_cache(corpus, teacher, tmp_path)


def test_open_files_do_not_travel_to_workers(corpus: Corpus, teacher, tmp_path: Path) -> None:
    features = _build(corpus, teacher, tmp_path)
    first = features[3]
    assert np.array_equal(pickle.loads(pickle.dumps(features))[3], first)


# Seeds started at once on a corpus without a cache: RUN, a number of its own, waits for the other
# before it builds. The teacher is slow enough for the two to meet at every shard.
RUN = """
import sys, time
from pathlib import Path
import numpy as np
from conftest import MeanColour
from xmag_hf.distillation.corpus import open_corpus
from xmag_hf.distillation import teacher_cache
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures, build_cache, finish_cache, teacher_identity)

data, cache, run = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

class Slow(MeanColour):
    def forward(self, images):
        time.sleep(0.2)
        return super().forward(images)

teacher_cache.WAIT_SECONDS = 0.1
corpus, teacher = open_corpus(data), Slow()
(cache.parent / f"ready-{run}").touch()
while len(list(cache.parent.glob("ready-*"))) < 2:
    time.sleep(0.01)
finish_cache(build_cache(corpus, teacher, cache, batch_size=21))
identity = teacher_identity(teacher, corpus)
features = TeacherFeatures(cache / identity.key, corpus, identity)
np.savez(cache.parent / f"run-{run}.npz", features.rows(np.arange(24)), teacher.seen)
"""


def test_two_runs_build_one_cache_together(
    pair_corpus: Path, tmp_path: Path, cmu_pixels: np.ndarray
) -> None:
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", str(pair_corpus), str(tmp_path / "cache")]
    settings = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    settings["env"] = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    runs = [subprocess.Popen([*command, str(number)], **settings) for number in range(2)]
    for run in runs:
        error = run.communicate(timeout=120)[1]
        assert run.returncode == 0, error
    made = [list(np.load(tmp_path / f"run-{number}.npz").values()) for number in range(2)]
    for features, _ in made:
        assert np.abs(features - _expected(cmu_pixels)).max() < 1e-3
    assert sum(seen for _, seen in made) == 2 * 7 * 6  # no sub-patch went through two teachers
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.iterdir())) == 2 and folder.suffix != ".partial"


def test_a_shard_that_another_run_makes_is_waited_for(
    corpus: Corpus, teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """Said once, and by name; what that run leaves undone is done here."""
    monkeypatch.setattr("xmag_hf.distillation.teacher_cache.WAIT_SECONDS", 0.01)
    key = teacher_identity(teacher, corpus).key
    lock = acquire(tmp_path / f"{key}.00000.lock")
    assert lock is not None
    here = threading.Thread(target=_build, args=(corpus, teacher, tmp_path))
    here.start()
    partial = tmp_path / f"{key}.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.05)  # the other shard is made meanwhile
    there = [path.name for path in partial.glob("*.h5")]
    lock.release()
    here.join(60)
    assert there == ["features-00001-of-00002.h5"]
    (said,) = caplog.messages
    assert f"{key}: process {os.getpid()} on" in said and "has shard 0 now" in said
    assert teacher.seen == 2 * 7 * 6
    assert [path.name for path in tmp_path.iterdir()] == [key]


def test_a_run_that_planned_before_the_cache_was_finished_leaves_it_where_it_is(
    corpus: Corpus, teacher, tmp_path: Path
) -> None:
    """The first run reads its files, and opens further ones as it goes on."""
    features, seen = _build(corpus, teacher, tmp_path), teacher.seen
    folder = build_cache(corpus, teacher, tmp_path)  # of a run whose plan found no cache
    assert features[23].shape == (16, 3)  # of a shard that was not open yet
    assert finish_cache(folder) == features.folder
    assert teacher.seen == seen
    assert list(tmp_path.iterdir()) == [features.folder]


def test_drafts_of_a_killed_build_do_not_stay(corpus: Corpus, teacher, tmp_path: Path) -> None:
    partial = build_cache(corpus, teacher, tmp_path, rank=0, world=2)
    (partial / "features-00001-of-00002.tmp7").write_bytes(b"half a shard")
    finish_cache(build_cache(corpus, teacher, tmp_path))
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 2


def test_two_processes_that_finish_a_cache_together(tmp_path):
    partial = tmp_path / "0123456789abcdef.partial"
    partial.mkdir()
    assert finish_cache(partial) == finish_cache(partial) == tmp_path / "0123456789abcdef"
    with pytest.raises(FileNotFoundError):
        finish_cache(tmp_path / "absent.partial")

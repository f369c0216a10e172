"""Teacher features in a repository of the Hub, here a server on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import loopback_hub
import numpy as np
import pytest

from xmag_hf.cli.main import main
from xmag_hf.distillation.corpus import Corpus, open_corpus
from xmag_hf.distillation.hub_cache import find_hub_cache, push_cache
from xmag_hf.distillation.options import DistillationError
from xmag_hf.distillation.teacher_cache import (
    TeacherFeatures,
    build_cache,
    finish_cache,
    teacher_identity,
)
from xmag_hf.distillation.trainer import distill

REPOSITORY = "lab/pairs"
WANTED = {
    "encoder": "mean-colour", "precision": None, "revision": None,
    "share": True, "teacher_view": "20x", "views": 1,
}  # fmt: skip


class PairsHub(loopback_hub.CommittingHub):
    """What listing and reading in ranges need beside downloads and commits."""

    public: bool
    fetched: list[str]

    def _entries(self, inside: str, recursive: bool = True) -> list[dict]:
        """Files and folders below `inside`, as the Hub lists them."""
        top = self.root / REPOSITORY
        found = sorted((top / inside).rglob("*") if recursive else (top / inside).glob("*"))
        return [
            {"path": path.relative_to(top).as_posix(), "oid": "0" * 40}
            | ({"type": "directory"} if path.is_dir() else {"type": "file"})
            | ({} if path.is_dir() else {"size": path.stat().st_size})
            for path in found
        ]

    def do_HEAD(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/datasets/{REPOSITORY}/resolve/"):
            name = path.split("/resolve/")[1].partition("/")[2]
            content = (self.root / REPOSITORY / name).read_bytes()
            asked = self.headers.get("Range")
            if self.command == "GET" and asked:
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                part = content[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)
                return
            if self.command == "GET":
                self.fetched.append(Path(name).name)
            self.path = self.path.removeprefix("/datasets")
            return super().do_HEAD()
        if not path.startswith(f"/api/datasets/{REPOSITORY}"):
            return self._refuse(401, "RepoNotFound")
        if "/tree/" in path:
            inside = path.split("/tree/")[1].partition("/")[2]
            entries = self._entries(inside, "recursive=true" in self.path.lower())
            return self._answer(entries) if entries else self._refuse(404, "EntryNotFound")
        commit = loopback_hub.COMMIT
        self._answer({"id": REPOSITORY, "sha": commit, "private": not self.public, "siblings": []})

    do_GET = do_HEAD

    def do_POST(self) -> None:
        if "/paths-info/" in self.path:
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            return self._answer([e for e in self._entries("") if e["path"] in wanted])
        super().do_POST()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[PairsHub]]:
    from huggingface_hub import HfFileSystem

    PairsHub.public, PairsHub.fetched, PairsHub.commits = False, [], 0
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    HfFileSystem.clear_instance_cache()
    with loopback_hub.serving(PairsHub, tmp_path, monkeypatch):
        yield PairsHub
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def corpus(pair_corpus: Path) -> Corpus:
    return open_corpus(str(pair_corpus))


@pytest.fixture
def cache(corpus: Corpus, teacher, tmp_path: Path) -> Path:
    return finish_cache(build_cache(corpus, teacher, tmp_path / "made"))


def test_what_is_pushed_is_found_and_pulled_shard_by_shard(
    hub, corpus: Corpus, teacher, cache: Path
) -> None:
    sent = []
    assert push_cache(cache, REPOSITORY, advance=sent.append) == 2
    assert sent == [2] and hub.commits == 1
    for path in cache.iterdir():
        assert (hub.root / REPOSITORY / "teacher" / cache.name / path.name).read_bytes() == (
            path.read_bytes()
        )
    assert push_cache(cache, REPOSITORY) == 0 and hub.commits == 1  # a push goes on, not anew
    found = find_hub_cache(REPOSITORY, corpus, WANTED)
    assert found is not None and found[0] == teacher_identity(teacher, corpus)
    far = TeacherFeatures(Path(REPOSITORY), corpus, *found)
    near = TeacherFeatures(cache, corpus, found[0])
    assert np.array_equal(far[3], near[3])
    assert hub.fetched == ["features-00000-of-00002.h5"]  # the other shard is not needed yet
    assert np.array_equal(far[13], near[13])
    assert len(hub.fetched) == 2 and far.licence == near.licence
    assert find_hub_cache(REPOSITORY, corpus, WANTED | {"precision": "bf16"}) is None
    (hub.root / REPOSITORY / "teacher" / cache.name / "features-00001-of-00002.h5").unlink()
    assert find_hub_cache(REPOSITORY, corpus, WANTED) is None  # not complete


def test_a_name_without_organisation_is_the_users(hub, cache: Path) -> None:
    assert push_cache(cache, "pairs") == 2
    there = hub.root / REPOSITORY / "teacher" / cache.name
    assert {path.name for path in there.iterdir()} == {path.name for path in cache.iterdir()}


def test_features_of_other_pairs_are_refused_when_read(hub, corpus: Corpus, cache: Path) -> None:
    with h5py.File(cache / "features-00001-of-00002.h5", "a") as file:
        file["x"][0] += 1
    push_cache(cache, REPOSITORY)
    found = find_hub_cache(REPOSITORY, corpus, WANTED)
    assert found is not None
    far = TeacherFeatures(Path(REPOSITORY), corpus, *found)
    with pytest.raises(DistillationError, match="are not the 12 pairs"):
        far[13]


@pytest.mark.parametrize("streaming", [True, False])
def test_training_on_a_repository_needs_no_teacher(
    hub, options, use_teacher, corpus: Corpus, cache: Path, pair_corpus: Path, streaming: bool
) -> None:
    shutil.copytree(pair_corpus, hub.root / REPOSITORY, ignore=shutil.ignore_patterns("teacher"))
    push_cache(cache, REPOSITORY)
    seen = use_teacher.seen
    chosen = options(
        data=REPOSITORY if streaming else str(pair_corpus),
        streaming=streaming,
        cache_teacher=True,
        cache_dir=None if streaming else str(cache.parent),
        max_steps=6,
        dihedral=False,
        color_jitter=False,
    )
    result = distill(chosen, quiet=True)
    assert result is not None and use_teacher.seen == seen
    assert result.teacher.licence == "none"
    if streaming:
        pulled = sorted(name for name in hub.fetched if name.endswith(".h5"))
        assert pulled == [f"features-{n:05d}-of-00002.h5" for n in range(2)]  # each once


def test_what_cannot_be_pushed_or_pulled(
    hub, corpus: Corpus, teacher, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = build_cache(corpus, teacher, tmp_path / "part", rank=0, world=2)
    with pytest.raises(DistillationError, match="not a complete cache"):
        push_cache(partial, REPOSITORY)
    hub.public = True
    with pytest.raises(DistillationError, match="public.*--no-hub-private"):
        push_cache(cache, REPOSITORY)
    assert hub.commits == 0
    push_cache(cache, REPOSITORY, private=False)
    found = find_hub_cache(REPOSITORY, corpus, WANTED)
    assert found is not None
    assert find_hub_cache("lab/nothing", corpus, WANTED) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_hub_cache(REPOSITORY, corpus, WANTED) is None
    with pytest.raises(DistillationError, match="features-00001-of-00002.h5: the Hub did not give"):
        TeacherFeatures(Path(REPOSITORY), corpus, *found)[13]


def test_the_command_pushes_what_it_completed(
    hub, options, use_teacher, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xmag_hf.distillation.cache_run.load_encoder", lambda *a, **k: use_teacher)
    chosen = options()
    flags = [f"--data={chosen.data}", "--teacher=mean-colour", f"--cache-dir={chosen.cache_dir}"]
    push = [*flags, "--world=2", "--quiet", "--push-to-hub"]
    push += [f"--hub-model-id={REPOSITORY}"]
    assert main(["cache", *push, "--rank=1"]) == 1
    assert "Not pushed" in capsys.readouterr().out and hub.commits == 0
    assert main(["cache", *push, "--rank=0"]) == 0
    assert f"2 files sent to {REPOSITORY}" in capsys.readouterr().out
    assert len(list((hub.root / REPOSITORY / "teacher").rglob("*.h5"))) == 2

"""SPIDER's files: tar parts cut anywhere, damaged ones, unpacked folders, the Hub and its gate."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import huggingface_hub.constants
import loopback_hub
import pytest
from huggingface_hub import close_session
from PIL import Image
from spider_folder import make_spider, tar_of, write_parts

from xmag_hf.data_builders import SpiderError, find_source


@pytest.fixture(scope="module")
def root(tmp_path_factory, cmu_pixels) -> Path:
    return make_spider(tmp_path_factory.mktemp("spider"), cmu_pixels)


@pytest.fixture(scope="module")
def content(root) -> bytes:
    return tar_of(root)


@pytest.fixture(scope="module")
def headers(content) -> list[int]:
    """Where each member's header starts."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [member.offset for member in archive]


@pytest.mark.parametrize("cut", ["thirds", "in headers", "tiny"])
def test_parts_cut_anywhere_hold_the_same_files(tmp_path, root, content, headers, cut):
    n = len(content)
    cuts = {
        "thirds": [n // 3, 2 * n // 3],
        "in headers": [headers[3] + 100, headers[50], headers[51] + 511, headers[-1] + 1],
        "tiny": [*range(1000, 60_000, 1000), headers[-1] + 20],
    }[cut]
    write_parts(tmp_path, content, cuts)
    seen = []
    opened = find_source("colorectal", tmp_path).open(lambda *state: seen.append(state))
    assert opened.metadata == (root / "metadata.json").read_bytes()
    files = {path.name: path.read_bytes() for path in (root / "images").iterdir()}
    assert {name: opened.reader.read(at) for name, at in opened.locations.items()} == files
    assert seen[-1][0] == "index"
    assert 0.9 * n < seen[-1][1] <= seen[-1][2] == n


def test_nothing_is_unpacked(tmp_path, content):
    parts = write_parts(tmp_path, content, [len(content) // 2])
    find_source("colorectal", tmp_path).open()
    assert sorted(tmp_path.iterdir()) == parts


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("lost", [1, 700, 6000, 200_000])
def test_a_truncated_part_is_named(tmp_path, content, number, lost):
    n = len(content)
    # The last part ends with padding, up to 10 kB, that nobody misses: cut beyond it.
    lost += 10_240 * (number == 2)
    parts = write_parts(tmp_path, content, [n // 3, 2 * (n // 3)])
    parts[number].write_bytes(parts[number].read_bytes()[:-lost])
    with pytest.raises(SpiderError, match="truncated or missing") as caught:
        find_source("colorectal", tmp_path).open()
    if number < 2:
        assert f"Shorter than the others: {parts[number].name}" in str(caught.value)


def test_a_loss_of_whole_blocks_is_noticed(tmp_path, content, headers, caplog):
    # 1,024 bytes are a pax header here: the walk over the members stays in step.
    parts = write_parts(tmp_path, content, [headers[100] - 2000, 2 * headers[100] - 4000])
    parts[0].write_bytes(parts[0].read_bytes()[:-1024])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        cut = archive.getmembers()[99].name.split("/")[-1]
    opened = find_source("colorectal", tmp_path).open()
    assert "shorter than the other parts" in caplog.text
    assert parts[0].name in caplog.text
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(opened.reader.read(opened.locations[cut]))).load()


def test_missing_parts(tmp_path, content, headers):
    n = len(content)
    parts = write_parts(tmp_path / "a", content, [n // 4, n // 2, headers[-1]])
    parts[1].unlink()
    with pytest.raises(SpiderError, match=r"missing: spider-colorectal\.tar\.01\."):
        find_source("colorectal", tmp_path / "a")
    # The last part, cut off exactly between two members: tarfile itself sees no fault there.
    parts = write_parts(tmp_path / "b", content, [n // 4, headers[-1]])
    parts[-1].unlink()
    with pytest.raises(SpiderError, match="no end of the archive"):
        find_source("colorectal", tmp_path / "b").open()
    # The right parts under wrong numbers.
    a, b, _ = write_parts(tmp_path / "c", content, [n // 3, 2 * n // 3])
    a.rename(tmp_path / "x"), b.rename(a), (tmp_path / "x").rename(b)
    with pytest.raises(SpiderError, match="the tar breaks at byte"):
        find_source("colorectal", tmp_path / "c").open()


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        _member("../evil.png"),
        _member("SPIDER-colorectal/images/../../../evil.png"),
        _member("/etc/evil.png"),
        _member("C:\\evil.png"),
        _member("SPIDER-colorectal\\..\\..\\evil.png"),
        _member("SPIDER-colorectal/images/evil.png", tarfile.SYMTYPE, "/etc/passwd"),
        _member("SPIDER-colorectal/images/evil.png", tarfile.LNKTYPE, "../../secret"),
        _member("SPIDER-colorectal/images/evil.png", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.linkname}",
)
def test_members_that_leave_the_folder_are_refused_by_name(tmp_path, root, member):
    write_parts(tmp_path, tar_of(root, [member]), [100])
    with pytest.raises(SpiderError, match=r"member .*evil\.png"):
        find_source("colorectal", tmp_path).open()


def test_no_tar(tmp_path, root):
    write_parts(tmp_path / "a", b"no tar at all" * 1000, [4000])
    with pytest.raises(SpiderError, match="breaks at byte 0"):
        find_source("colorectal", tmp_path / "a").open()
    write_parts(tmp_path / "b", b"", [])
    with pytest.raises(SpiderError, match="breaks at byte 0"):
        find_source("colorectal", tmp_path / "b").open()
    write_parts(tmp_path / "c", tar_of(root), [], organ="skin")  # colorectal under skin's name
    with pytest.raises(SpiderError, match="SPIDER-colorectal, asked for skin"):
        find_source("skin", tmp_path / "c").open()


def test_unpacked_folders(tmp_path, root):
    for given in (root, root.parent):
        opened = find_source("colorectal", given).open()
        name, at = next(iter(opened.locations.items()))
        assert opened.reader.read(at) == (root / "images" / name).read_bytes()
    with pytest.raises(SpiderError, match="asked for skin"):
        find_source("skin", root)
    with pytest.raises(SpiderError, match="neither spider-breast"):
        find_source("breast", root.parent)
    with pytest.raises(SpiderError, match="is no folder"):
        find_source("breast", tmp_path / "absent")
    bad = tmp_path / "SPIDER-skin"
    (bad / "images").mkdir(parents=True)
    (bad / "metadata.json").write_text("[]")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (bad / "images" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(SpiderError, match=r"a\.png: a link to .*climbs out"):
        find_source("skin", bad).open()


# --- the Hub, as a server on 127.0.0.1 -----------------------------------------------------------


class DataHub(loopback_hub.Hub):
    """Adds the two questions that data sets need."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if not self.path.startswith("/api/datasets/"):
            self.path = self.path.removeprefix("/datasets")
            return super().do_HEAD()
        repository = "/".join(self.path.split("?")[0].split("/")[3:5])
        if "/revision/v9" in self.path:
            return self._refuse(404, "RevisionNotFound")
        if not (self.root / repository).is_dir():
            return self._refuse(401, "RepoNotFound")
        files = {path.name: path.stat().st_size for path in (self.root / repository).iterdir()}
        answer: object = {"id": repository, "sha": loopback_hub.COMMIT, "siblings": []}
        if "/tree/" in self.path:
            kind = {"type": "file", "oid": "0" * 40}
            answer = [kind | {"path": name, "size": size} for name, size in files.items()]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server's handler; its repositories lie in `root`."""
    DataHub.asked = []
    with loopback_hub.serving(DataHub, tmp_path, monkeypatch) as handler:
        yield handler


def test_parts_come_from_the_hub_once(hub, root, content, monkeypatch):
    n = len(content)
    repository = hub.root / "histai/SPIDER-colorectal"
    write_parts(repository, content, [n // 3, 2 * n // 3])
    (repository / "README.md").write_text("a card")
    source = find_source("colorectal")
    assert source.revision == loopback_hub.COMMIT
    assert source.open().metadata == (root / "metadata.json").read_bytes()
    hub.asked.clear()
    assert find_source("colorectal") == source
    assert not any("GET" in line and "resolve" in line for line in hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert find_source("colorectal") == source
    with pytest.raises(SpiderError, match="cannot be reached.*does not have it.*gated"):
        find_source("breast")


def test_the_gate_is_explained(hub, content):
    write_parts(hub.root / "histai/SPIDER-colorectal", content, [5000])
    hub.gated = frozenset(["histai/SPIDER-colorectal"])
    with pytest.raises(SpiderError, match="access refused") as caught:
        find_source("colorectal")
    assert "accept its licence (CC-BY-NC-4.0)" in str(caught.value)
    assert "https://huggingface.co/datasets/histai/SPIDER-colorectal" in str(caught.value)
    assert "hf auth login" in str(caught.value)
    with pytest.raises(SpiderError, match="not there, or not to be seen"):
        find_source("skin")
    with pytest.raises(SpiderError, match="no revision 'v9'"):
        find_source("colorectal", revision="v9")
    (hub.root / "histai/SPIDER-thorax").mkdir()
    with pytest.raises(SpiderError, match=r"holds no spider-thorax\.tar\.NN"):
        find_source("thorax")

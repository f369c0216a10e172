"""Two studies into one folder at once: the second is refused, a dead one's lock is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from xmag_hf.cli.main import main
from xmag_hf.lock import host, only_writer
from xmag_hf.mil.errors import MILError


def leave(path: Path, pid: int) -> Path:
    """A lock of another process on this machine."""
    path.write_text(json.dumps({"host": host(), "pid": pid, "token": "theirs"}))
    return path


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def commands(tmp_path: Path, cmu_slide: Path) -> dict[str, list[str]]:
    """Commands with nothing to learn from: without a lock they are refused for that."""
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,patient_id,label\nCMU-1-Small-Region,p,a\nother,q,b\n")
    (tmp_path / "bags").mkdir()
    (tmp_path / "bags" / "other.h5").write_bytes(b"no bag")
    shared = ["--labels", str(labels), "--out", str(tmp_path / "deep" / "study"), "--quiet"]
    return {
        "mil": ["mil", str(tmp_path / "bags"), *shared],
        "e2e": ["e2e", str(cmu_slide), "--encoder", "random:tiny", *shared],
    }


@pytest.mark.parametrize("verb", ["mil", "e2e"])
def test_the_second_names_the_first(verb, commands, tmp_path, capsys) -> None:
    """Told apart by who is alive: this process is, a child that has ended is not."""
    (tmp_path / "deep").mkdir()
    lock = leave(tmp_path / "deep" / "study.lock", os.getpid())
    assert main(commands[verb]) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # warnings of other packages come before
    assert f"process {os.getpid()} on {socket.gethostname()}" in error
    assert f"xmag {verb}: --out {tmp_path / 'deep' / 'study'}" in error
    assert lock.exists() and not (tmp_path / "deep" / "study").exists()
    leave(lock, dead_pid())
    assert main(commands[verb]) == 1
    assert "is working on it" not in capsys.readouterr().err
    assert not lock.exists()


def test_held_while_it_lasts_and_then_gone(tmp_path) -> None:
    out = tmp_path / "new" / "study"
    with only_writer(out, MILError):
        assert json.loads(out.with_name("study.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(MILError, match="is working on it"), only_writer(out, MILError):
            pass
        with only_writer(tmp_path / "new" / "another", MILError):
            pass
    assert not any(out.parent.iterdir())
    with pytest.raises(RuntimeError), only_writer(out, MILError):
        raise RuntimeError
    assert not any(out.parent.iterdir())

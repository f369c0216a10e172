from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xmag_hf.cli.main import VERBS, main, run_verb
from xmag_hf.cli.options import add_options, hyphenated, read_options


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"xmag {verb}" in text and "example:" in text and "--quiet" in text


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    for wrong in (["nonsense"], ["distill"], ["distill", "--data", "x", "--student", "huge"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "invalid choice: 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["nonsense"], "xmag: error: argument VERB: invalid choice: 'nonsense'"),
        (["embed", "--out", "x"], "xmag embed: error: the following arguments are required"),
        (["embed", "no.svs", "--model", "m", "--out", "x"], "xmag embed: error: no.svs: no such"),
    ],
)
def test_a_usage_error_is_not_buried(argv, error, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    first, second = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert first.startswith(error)
    assert second == f"see {error.partition(':')[0]} --help"


def test_a_file_that_cannot_be_written_is_known_at_once(tmp_path, capsys) -> None:
    """For a folder that is not there, and a folder in the file's place: before hours of work."""
    for path, said in ((tmp_path / "no" / "p.csv", f"no folder {tmp_path / 'no'}"),
                       (tmp_path, "is a folder")):  # fmt: skip
        for command in (["info", "a.svs", "--csv"], ["predict", "a.svs", "--head", "h", "--out"]):
            with pytest.raises(SystemExit) as stop:
                main([*command, str(path)])
            assert stop.value.code == 2
            assert said in capsys.readouterr().err


def test_failure_is_1_and_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(["distill", "--data", str(tmp_path), "--teacher", "no-such-teacher", "--quiet"])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("xmag distill: ") and "no-such-teacher" in error
    assert "Traceback" not in error


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from xmag_hf.cli import convert

    def broken(*args: object) -> int:
        raise KeyError("bug")

    monkeypatch.setattr(convert, "run", broken)
    with pytest.raises(KeyError):
        main(["convert", "a", "b"])


def test_top_level_help_imports_no_torch() -> None:
    code = "import sys; from xmag_hf.cli.main import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'openslide')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@dataclasses.dataclass(frozen=True)
class _Options:
    out_dir: str
    rate: float = 0.5
    limit: int | None = None
    parts: tuple[str, ...] = ()
    flag: bool = True
    kind: str = dataclasses.field(default="a", metadata={"choices": ("a", "b")})


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--out-dir", "x"], _Options("x")),
        (["--out_dir", "x", "--rate", "2", "--limit", "3"], _Options("x", 2.0, 3)),
        (
            ["--out-dir=x", "--parts", "p", "q", "--parts", "r"],
            _Options("x", parts=("p", "q", "r")),
        ),
        (["--out-dir", "x", "--no-flag", "--kind", "b"], _Options("x", flag=False, kind="b")),
    ],
)
def test_options_come_from_the_dataclass(argv: list[str], expected: _Options) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_options(parser, _Options)
    assert read_options(_Options, parser.parse_args(hyphenated(argv))) == expected


def test_libraries_are_settled_unless_the_user_has_done_so(monkeypatch) -> None:
    for given, spins, words in (
        ({}, "10000", "error"),
        ({"OMP_WAIT_POLICY": "active", "HF_HUB_VERBOSITY": "info"}, None, "info"),
        ({"GOMP_SPINCOUNT": "7"}, "7", "error"),
    ):
        environment = {**os.environ, **given}
        for name in {"OMP_WAIT_POLICY", "HF_HUB_VERBOSITY", "GOMP_SPINCOUNT"} - given.keys():
            environment.pop(name, None)
        monkeypatch.setattr(os, "environ", environment)
        with pytest.raises(SystemExit):
            run_verb("info", ["--help"])
        assert environment.get("GOMP_SPINCOUNT") == spins
        assert environment["HF_HUB_VERBOSITY"] == words

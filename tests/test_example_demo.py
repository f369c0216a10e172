"""The demo in examples/: what it leaves behind."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from xmag_hf.distillation.options import DistillOptions


def test_the_demo_leaves_the_place_of_the_next_student_free(project_root, monkeypatch):
    """What it names as the next step, and the README's command, write to the default folder."""
    path = project_root / "examples" / "distil_one_slide.py"
    spec = importlib.util.spec_from_file_location("distil_one_slide", path)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    commands: dict[str, tuple[str, ...]] = {}

    def run(verb: str, *arguments: str) -> None:
        commands[verb] = arguments
        if verb == "distill":
            sys.exit()

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit):
        demo.main()
    default = DistillOptions.__dataclass_fields__["output_dir"].default
    for verb, option in (("corpus", "--out"), ("distill", "--output-dir")):
        arguments = commands[verb]
        out = Path(arguments[arguments.index(option) + 1])
        assert out.parent == Path("xmag_demo") and out != Path(str(default))

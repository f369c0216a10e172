"""Command-line options read off a dataclass, so that a default has one home."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options")
OptionsTarget = argparse.ArgumentParser | argparse._ArgumentGroup  # a group is a heading in --help


def add_options(parser: OptionsTarget, options: type, skip: tuple[str, ...] = ()) -> None:
    """Add one option for each field of the dataclass `options`.

    A field `output_dir` becomes `--output-dir` (`hyphenated` lets users write `--output_dir`). Help
    text and choices come from `field(metadata={"help": ..., "choices": ...})`; a field without a
    default is required; a bool gets `--name` and `--no-name`; a tuple takes several values, or the
    option again.

    Args:
        parser: Gets the options.
        options: A dataclass type.
        skip: Field names that the verb takes in another way (positional slides, say).
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in skip:
            continue
        default = _default(field)
        required = default is dataclasses.MISSING
        shown = "required" if required else f"default: {_shown(default)}"
        keywords: dict[str, Any] = {
            "dest": field.name,
            "required": required,
            # A list given replaces the default; argparse's `extend` would add to it.
            "default": None if required or isinstance(default, tuple) else default,
            "help": f"{field.metadata.get('help', '')} ({shown})".replace("%", "%%"),
        }
        keywords |= _type_keywords(hints[field.name], field)
        parser.add_argument("--" + field.name.replace("_", "-"), **keywords)


def hyphenated(argv: Sequence[str]) -> list[str]:
    """Write option names with hyphens: `--output_dir=a_b` becomes `--output-dir=a_b`."""
    split = [arg.partition("=") if arg.startswith("--") else (arg, "", "") for arg in argv]
    return [
        (name.replace("_", "-") if name.startswith("--") else name) + equals + value
        for name, equals, value in split
    ]


def read_options(options: type[Options], args: argparse.Namespace, **given: Any) -> Options:
    """Build the dataclass `options` from parsed arguments; `given` fills skipped fields."""
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    # None is what was not given: the dataclass has the default.
    parsed = {n: value for n, value in vars(args).items() if n in names and value is not None}
    for name, value in parsed.items():
        if isinstance(value, list):
            parsed[name] = tuple(value)
    return options(**(parsed | given))


def new_file(text: str) -> Path:
    """A file that is written at the end, as `type=` of an option.

    Raises:
        ArgumentTypeError: Its folder is not there, or it is a folder: known before hours of work.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}. Make it.")
    return path


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers, by default all cores."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=_cores(),
        help="processes (default: the cores of this machine)",
    )


def _cores() -> int:
    """Cores this process may use: fewer than the machine has under a scheduler."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _type_keywords(hint: Any, field: dataclasses.Field) -> dict[str, Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    short = {int: "N", float: "F"}.get(hint, "TEXT")
    keywords: dict[str, Any] = {"metavar": field.metadata.get("metavar", short)}
    if typing.get_origin(hint) is tuple:
        keywords |= {"action": "extend", "nargs": "+", "type": typing.get_args(hint)[0]}
    else:
        keywords["type"] = hint
    if "choices" in field.metadata:
        keywords["choices"] = field.metadata["choices"]
        del keywords["metavar"]
    return keywords

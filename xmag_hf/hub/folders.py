"""A student's folder: written whole or not at all, and sent to the Hub.

How a folder is replaced. Everything is first written and fsynced in `.<name>.partial` beside it. If
there is no such folder yet, or an empty one, one rename puts it in place. Otherwise the folder
stays where it is, since a run's `checkpoints/` and `metrics.jsonl` live in it and may be open: its
`config.json` is removed (from then on it does not load), the other files are renamed over the old
ones, weights of the old model that the new one does not have are removed, and `config.json` is
renamed in last. So a reader, or whoever looks after a crash, finds the old model, the new one, or
none; never a mixture. After a crash in between, `.<name>.partial` still holds what was not yet
moved, and saving again finishes the job.

A folder without `config.json` of ours, and without such a `.<name>.partial`, is somebody else's: a
card, a processor or weights in it are not replaced. Files that no model has are never touched.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xmag_hf.atomic_write import sync

logger = logging.getLogger(__name__)

CONFIG = "config.json"
CARD = "README.md"
PROCESSOR = "preprocessor_config.json"
# Under which names transformers writes and looks for weights; other weights are somebody's own.
WEIGHTS = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json"),
)
# Models on embeddings: there are no pixels to process.
WITHOUT_PROCESSOR = ("xmag_abmil", "xmag_mean_pool")
# All that a model has: its code, how it was trained, and notices that licences ask for. Whatever
# else lies in the folder is somebody's own: a teacher's weights, a list of slides.
PUSHED = (
    *(CONFIG, PROCESSOR, CARD, *WEIGHTS, "*.py", "LICENSE*", "NOTICE*"),
    *("distillation.json", "training.json", "metrics.jsonl"),
)


class PublishError(OSError):
    """A folder that cannot be saved or sent; the message names it, the reason and the remedy."""


class Saveable(Protocol):
    """A model or processor of transformers."""

    def save_pretrained(self, save_directory: Any, /) -> Any:
        """Write config or weights into a folder."""
        ...


def save_folder(
    model: Saveable,
    processor: Saveable | None,
    card_text: str,
    out_dir: str | os.PathLike[str],
    extra_files: Mapping[str, str] | None = None,
    *,
    replace: bool = True,
) -> Path:
    """Write a model folder that `AutoModel.from_pretrained` loads, complete or absent.

    Args:
        model: Saved with its code, config and weights.
        processor: Its image processor; None for a head on embeddings.
        card_text: README.md.
        out_dir: The folder. An earlier model of ours in it is replaced, its card included;
            sub-folders and other files stay, other weights among them.
        extra_files: File name to text, beside the model's own files.
        replace: Allow a folder that holds something.

    Returns:
        The folder.

    Raises:
        PublishError: `out_dir` is a file, holds a model that is not ours or a card or weights
            without one of ours, or anything at all and `replace` is off; or nothing that loads was
            written.
        ValueError: A name in `extra_files` is a path, or one of the model's own files.
    """
    # A link to a folder is followed, so that it stays a link.
    out_dir = Path(out_dir).resolve()
    _refuse_foreign(out_dir)
    if not replace and out_dir.exists() and any(out_dir.iterdir()):
        raise PublishError(f"{out_dir}: exists already. Choose another folder, or remove it first.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(out_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        (partial / CARD).write_text(card_text, encoding="utf-8")
        _write_extras(partial, extra_files or {})
        _check_complete(partial)
        mode = (partial / CONFIG).stat().st_mode
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors writes 0600, which shuts colleagues out
            sync(path)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _move_into_place(partial, out_dir)
    return out_dir


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
) -> str:
    """Send the model in a saved folder to the Hub; other files and sub-folders stay, and are named.

    Args:
        folder: As `save_folder` wrote it.
        repo_id: `<org>/<name>`, or `<name>` for the user who is logged in; made if it does not
            exist.
        private: How the repository is made. One that exists is never made private or public by
            this; one that is public is refused unless `private=False` says that this is meant.
        revision: Branch to send to, made if it does not exist; default main.

    Returns:
        Address of the commit, or of the repository where the Hub names none.

    Raises:
        PublishError: No complete folder, no login, no right to write, or a public repository.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder, so there is nothing to push.")
    _check_complete(folder)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    sent = [name for name in names if (folder / name).is_file() and _fits(name, PUSHED)]
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise PublishError(f"{repo_id!r}: {error} Give it as <org>/<name>.") from error
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = repo.repo_id  # with the user's name, where none was given
        if private and not api.repo_info(repo_id).private:
            raise PublishError(
                f"{repo_id} exists and is public. Make it private on "
                f"https://huggingface.co/{repo_id}/settings, or push with private=False."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload model with xmag_hf",
            allow_patterns=sent,
        )
    except errors.LocalTokenNotFoundError as error:
        raise PublishError(f"{repo_id}: {_log_in()}") from error
    except errors.OfflineModeIsEnabled as error:
        raise PublishError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to push.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = _log_in() if status in (401, 403, 404) else "Try again later."
        raise PublishError(f"{repo_id}: the Hub answered {status}: {error} {remedy}") from error
    except getattr(errors, "HTTPError", OSError) as error:  # the HTTP client's own base class
        raise PublishError(
            f"{repo_id}: the Hub could not be reached ({error}). The folder {folder} is complete; "
            "push it again when there is a network."
        ) from error
    stay = [name for name in names if name not in sent]
    if stay:
        logger.warning("%s: not part of the model, so not pushed: %s", folder, ", ".join(stay))
    return getattr(commit, "commit_url", None) or str(repo)


def _log_in() -> str:
    return (
        "Log in with `hf auth login` or set HF_TOKEN, with a token that may write to this "
        "organisation or user."
    )


def _partial(out_dir: Path) -> Path:
    """Where a model is written before it is moved into `out_dir`."""
    return out_dir.parent / f".{out_dir.name}.partial"


def _refuse_foreign(out_dir: Path) -> None:
    """Refuse to overwrite what is no model of ours."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise PublishError(f"{out_dir}: is a file. Give a folder as output.")
    path = out_dir / CONFIG
    if not path.is_file():
        path = _partial(out_dir) / CONFIG  # a save that was interrupted
    if not path.is_file():
        names = sorted(path.name for path in out_dir.iterdir())
        taken = [name for name in names if name in (CARD, PROCESSOR) or _is_weights(name)]
        if taken:
            raise PublishError(
                f"{out_dir}: holds {', '.join(taken)} but no config.json, so no model of ours, and "
                "nothing of it is replaced. Give another folder, or move these files away."
            )
        return
    kind = _model_type(path)
    if not str(kind).startswith("xmag"):
        raise PublishError(
            f"{out_dir}: holds another model (model_type {kind!r}), which is not replaced. Give "
            "another folder, or remove it."
        )


def _model_type(config: Path) -> str | None:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _write_extras(folder: Path, files: Mapping[str, str]) -> None:
    taken = {path.name for path in folder.iterdir()}
    for name, text in files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"extra file {name!r}: must be a plain file name, not a path.")
        if name in taken:
            raise ValueError(f"extra file {name!r}: the model's own file has this name.")
        (folder / name).write_text(text, encoding="utf-8")


def _is_weights(name: str) -> bool:
    return _fits(name, WEIGHTS)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_complete(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    needed = [CONFIG, PROCESSOR, CARD]
    if _model_type(folder / CONFIG) in WITHOUT_PROCESSOR:
        needed.remove(PROCESSOR)
    missing = [name for name in needed if name not in names]
    if not any(map(_is_weights, names)):
        missing.append("model.safetensors")
    if missing:
        raise PublishError(
            f"{folder}: not a complete model folder, it lacks {', '.join(missing)}. "
            "Save the model, its image processor and its card into it first."
        )


def _move_into_place(partial: Path, out_dir: Path) -> None:
    """Rename `partial` to `out_dir`, or its files into it; see the module's text."""
    if not out_dir.exists() or not any(out_dir.iterdir()):
        os.replace(partial, out_dir)
        sync(out_dir.parent)
        return
    names = sorted(path.name for path in partial.iterdir())
    (out_dir / CONFIG).unlink(missing_ok=True)
    sync(out_dir)
    for path in out_dir.iterdir():
        if path.is_file() and _is_weights(path.name) and path.name not in names:
            path.unlink()
    for name in names:
        if name != CONFIG:
            os.replace(partial / name, out_dir / name)
    sync(out_dir)
    os.replace(partial / CONFIG, out_dir / CONFIG)
    sync(out_dir)
    partial.rmdir()

"""Teacher features beside a corpus on the Hub: pushed, found, and pulled shard by shard.

They lie in the corpus's data set repository as on disk: `teacher/<key>/features-*.h5`. The card of
a corpus pins its shards, so `load_dataset` does not see them.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmag_hf.distillation.corpus import Corpus
from xmag_hf.distillation.options import DistillationError
from xmag_hf.distillation.teacher_cache import (
    TeacherIdentity,
    choose_cache,
    file_attributes,
    shard_names,
)

FOLDER = "teacher"
FILES_PER_COMMIT = 20  # a push that is cut short loses no more than this
Fetch = Callable[[str], Path]
if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)


def find_hub_cache(
    repository: str, corpus: Corpus, wanted: Mapping[str, Any]
) -> tuple[TeacherIdentity, Fetch] | None:
    """Find a complete cache in the corpus's own repository; one shard of each key is fetched.

    Args:
        repository: Data set repository, ORG/NAME.
        corpus: The features must belong to.
        wanted: What `choose_cache` compares.

    Returns:
        Its identity, and what fetches a shard by its name; None if there is none, or no network.

    Raises:
        DistillationError: Several fit, or a shard cannot be fetched.
    """
    from huggingface_hub import HfApi

    names = shard_names(corpus)
    try:
        commit = HfApi().repo_info(repository, repo_type="dataset").sha
        files = _listed(repository, commit)
    except (*_unreachable(), OSError) as error:
        logger.warning("%s: not asked for teacher features (%s)", repository, type(error).__name__)
        return None
    keys = sorted({path.split("/")[1] for path in files if path.count("/") == 2})
    complete = [k for k in keys if all(f"{FOLDER}/{k}/{name}" in files for name in names)]
    fetches = {key: functools.partial(fetch_shard, repository, commit, key) for key in complete}
    found = {key: file_attributes(fetch(names[0])) for key, fetch in fetches.items()}
    identity = choose_cache(found, f"{repository}/{FOLDER}", corpus, **wanted)
    return None if identity is None else (identity, fetches[identity.key])


def fetch_shard(repository: str, commit: str | None, key: str, name: str) -> Path:
    """Download one file of a cache to the Hugging Face cache, or find it there.

    Args:
        repository: Data set repository.
        commit: Of it.
        key: Of the cache.
        name: Of the file.

    Returns:
        Its local path.

    Raises:
        DistillationError: It cannot be had.
    """
    from huggingface_hub import hf_hub_download

    path = f"{FOLDER}/{key}/{name}"
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset", revision=commit))
    except (*_unreachable(), OSError) as error:
        raise DistillationError(
            f"{repository}/{path}: the Hub did not give it ({type(error).__name__}). Check the "
            "network and `hf auth login`, and run again: what is here is not fetched twice."
        ) from error


def push_cache(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    advance: Callable[[int], None] = lambda files: None,
) -> int:
    """Send a complete cache to a data set repository; what is there already is not sent again.

    Args:
        folder: Of one key.
        repository: ORG/NAME, or NAME for the user who is logged in; made if it does not exist.
        private: How it is made; one that is public is refused unless this is False.
        advance: Called with the number of files sent.

    Returns:
        Number of files sent.

    Raises:
        DistillationError: The cache is not complete, no login, no right, or a public repository.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    files = sorted(folder.glob("features-*.h5"))
    if folder.suffix == ".partial" or not files:
        raise DistillationError(f"{folder}: not a complete cache, so it is not pushed.")
    api = HfApi()
    try:
        repo = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        repository = repo.repo_id  # with the user's name, where none was given
        if private and not api.repo_info(repository, repo_type="dataset").private:
            raise DistillationError(
                f"{repository} exists and is public. Say --no-hub-private if the features may be "
                "public: the teacher's licence decides."
            )
        there = _listed(repository, None)
        target = f"{FOLDER}/{folder.name}"
        todo = [path for path in files if not _same(there.get(f"{target}/{path.name}"), path)]
        for first in range(0, len(todo), FILES_PER_COMMIT):
            part = todo[first : first + FILES_PER_COMMIT]
            api.create_commit(
                repository,
                [CommitOperationAdd(f"{target}/{path.name}", path) for path in part],
                commit_message=f"Teacher features {first + len(part)} of {len(todo)}",
                repo_type="dataset",
            )
            advance(len(part))
    except (*_unreachable(), errors.HFValidationError) as error:
        raise DistillationError(
            f"{repository}: the features were not pushed ({error}). Check the name ORG/NAME, the "
            "network and `hf auth login` with a token that may write there; then run again."
        ) from error
    return len(todo)


def _same(there: RepoFile | None, path: Path) -> bool:
    """Whether the Hub has a file's content; features made anew have the size of the old ones."""
    if there is None or there.size != path.stat().st_size:
        return False
    if there.lfs is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def _listed(repository: str, commit: str | None) -> dict[str, RepoFile]:
    """Every file of a repository's caches by path; {} where it has none."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(
        repository, FOLDER, recursive=True, revision=commit, repo_type="dataset"
    )
    try:
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except errors.EntryNotFoundError:
        return {}


def _unreachable() -> tuple[type[Exception], ...]:
    """What a Hub that refuses, is offline or cannot be reached raises."""
    from huggingface_hub import errors

    client = getattr(errors, "HTTPError", errors.HfHubHTTPError)  # the HTTP client's own base class
    return errors.HfHubHTTPError, errors.OfflineModeIsEnabled, client

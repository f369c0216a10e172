"""Teacher features of a paired corpus, computed once.

One HDF5 file per shard in `<cache>/<key>/`, row i belonging to row i of the shard. The key names
everything that the numbers depend on, so another teacher, precision or corpus cannot be mistaken
for this one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from xmag_hf._version import __version__
from xmag_hf.distillation.corpus import Corpus
from xmag_hf.distillation.options import CACHED_VIEWS, TEACHER_VIEWS, DistillationError
from xmag_hf.distillation.teacher_encoding import CELLS, ShardDecoder, encode_shard
from xmag_hf.lock import acquire, describe_holder

if TYPE_CHECKING:
    from xmag_hf.encoders import Encoder

FORMAT_VERSION = 1
ALL_VIEWS = "; {} dihedral views"  # ends it where more than one view is kept
ENLARGED = "; 5x view enlarged by Lanczos"  # ends the normalisation of the 5x control's identity
MOST_OPEN_FILES = 64  # of thousands of shards, in every loader process
WAIT_SECONDS = 2.0  # between two looks at shards that another run is making
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherIdentity:
    """What the features depend on.

    Attributes:
        encoder: Table name or id of the teacher.
        revision: Of its weights.
        precision: fp32, bf16 or fp16.
        normalisation: Mean and sd as text; then `ENLARGED` where the teacher saw the 5x view, and
            `ALL_VIEWS` where it saw several dihedral views.
        corpus_fingerprint: Of the paired corpus.
    """

    encoder: str
    revision: str
    precision: str
    normalisation: str
    corpus_fingerprint: str

    @property
    def key(self) -> str:
        """First 16 hex digits of sha256 over the five fields."""
        fields = [
            self.encoder,
            self.revision,
            self.precision,
            self.normalisation,
            self.corpus_fingerprint,
        ]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def teacher_identity(
    teacher: Encoder, corpus: Corpus, teacher_view: str = "20x", views: int = 1
) -> TeacherIdentity:
    """Identity of `teacher`'s features on `corpus`.

    Args:
        teacher: That encodes.
        corpus: That is encoded.
        teacher_view: What the teacher sees: 20x or 5x.
        views: Number of dihedral views kept.

    Returns:
        The identity; at 20x and one view its key is as old as the format.
    """
    return TeacherIdentity(
        teacher.name,
        teacher.revision,
        teacher.precision,
        teacher.normalisation + _seen_as(teacher_view, views),
        corpus.fingerprint,
    )


def find_cache(
    cache_dir: Path,
    encoder: str,
    corpus: Corpus,
    *,
    precision: str | None = None,
    revision: str | None = None,
    share: bool = True,
    teacher_view: str = "20x",
    views: int = 1,
) -> TeacherIdentity | None:
    """Find a complete cache of `encoder` on `corpus`, without loading the encoder.

    Args:
        cache_dir: Holds one folder per key.
        encoder: Name of the teacher.
        corpus: The features must belong to.
        precision: Wanted; None takes any.
        revision: Of the teacher's weights now; a cache of others is stale and not found. None
            (the Hub cannot be asked) takes any.
        share: Whether shared sub-patches are wanted.
        teacher_view: What the teacher saw: 20x or 5x.
        views: Number of dihedral views that it was shown.

    Returns:
        Its identity, or None.

    Raises:
        DistillationError: Several fit, or the only one was made with the other `share`.
    """
    names = shard_names(corpus)
    complete = [
        folder
        for folder in sorted(path for path in cache_dir.glob("*") if path.is_dir())
        if folder.suffix != ".partial" and all((folder / name).exists() for name in names)
    ]
    return choose_cache(
        {folder.name: file_attributes(folder / names[0]) for folder in complete},
        str(cache_dir),
        corpus,
        encoder=encoder,
        precision=precision,
        revision=revision,
        share=share,
        teacher_view=teacher_view,
        views=views,
    )


def choose_cache(
    candidates: Mapping[str, Mapping[str, Any]],
    place: str,
    corpus: Corpus,
    *,
    encoder: str,
    precision: str | None,
    revision: str | None,
    share: bool,
    teacher_view: str,
    views: int,
) -> TeacherIdentity | None:
    """Of complete caches, the one that fits; arguments as `find_cache` has them.

    Args:
        candidates: Attributes of the first file of each cache, by its key.
        place: Where they lie, for errors.
        corpus: The features must belong to.
        encoder: Name of the teacher.
        precision: Wanted; None takes any.
        revision: Of the teacher's weights; None takes any.
        share: Whether shared sub-patches are wanted.
        teacher_view: What the teacher saw.
        views: Number of dihedral views.

    Returns:
        Its identity, or None.

    Raises:
        DistillationError: Several fit, or the only one was made with the other `share`.
    """
    found = []
    for key, attributes in candidates.items():
        identity = TeacherIdentity(
            *(str(attributes.get(f.name)) for f in dataclasses.fields(TeacherIdentity))
        )
        same = (identity.encoder, identity.corpus_fingerprint) == (encoder, corpus.fingerprint)
        same = same and precision in (None, identity.precision)
        same = same and _ending(identity.normalisation) == _seen_as(teacher_view, views)
        if same and revision in (None, identity.revision):
            found.append(identity)
            if attributes.get("sharing") != _sharing(share):
                raise DistillationError(
                    f"{place}/{key}: sub-patches shared: {attributes.get('sharing')}, wanted "
                    f"{_sharing(share)}. Delete that folder, or change --share-sub-patches."
                )
    if len(found) > 1:
        keys = ", ".join(f"{i.key} ({i.revision}, {i.precision})" for i in found)
        raise DistillationError(
            f"{place}: several caches of {encoder} fit: {keys}. Delete all but one, or name "
            "one with --teacher-precision."
        )
    return found[0] if found else None


def build_cache(
    corpus: Corpus,
    teacher: Encoder,
    cache_dir: Path,
    *,
    share: bool = True,
    teacher_view: str = "20x",
    views: int = 1,
    batch_size: int = 128,
    num_threads: int = 2,
    rank: int = 0,
    world: int = 1,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Path:
    """Compute the features of every pair, shard by shard; finished shards are not done again.

    Runs that build one cache at once (seeds started together) share its shards, and each waits for
    those of the others.

    Args:
        corpus: To encode.
        teacher: Frozen 20x encoder.
        cache_dir: Holds one folder per key.
        share: Encode a sub-patch seen by several pairs of a shard once. At the 5x view the cells
            of two pairs differ in up to twelve enlarged px next to a view's edge.
        teacher_view: 20x, or 5x for cells of the 5x view enlarged four times.
        views: Dihedral views to encode, a key of `CACHED_VIEWS`; each costs as much as the first.
        batch_size: Sub-patches per teacher call.
        num_threads: Decode JPEGs ahead of the teacher.
        rank: This process does shards `rank::world`.
        world: Number of processes that build together.
        advance: Called with the number of pairs finished, for progress bars.

    Returns:
        The folder `<key>.partial`, to be given to `finish_cache` once every process is done; or
        `<key>`, if another run has finished it.

    Raises:
        DistillationError: An image that does not decode (shard and row are named), or features
            that are not finite.
    """
    identity = teacher_identity(teacher, corpus, teacher_view, views)
    cache_dir.mkdir(parents=True, exist_ok=True)
    starts, count = corpus.shard_starts, len(corpus.shards)
    for number in _in_turn(range(rank, count, world), cache_dir / identity.key):
        name = shard_name(number, count)
        rows = np.arange(starts[number], starts[number + 1])
        if not _done_with(building_folder(cache_dir, identity) / name, share):
            shard = corpus.shards[number]
            decoder = ShardDecoder(shard, teacher_view, CACHED_VIEWS[views], num_threads)
            features = encode_shard(
                corpus, rows, teacher, decoder, share=share, batch_size=batch_size
            )
            attributes = {"sharing": _sharing(share), "licence": teacher.licence}
            # Not renamed while this shard's lock is held and the shard is not there.
            folder = building_folder(cache_dir, identity)
            folder.mkdir(exist_ok=True)
            write_features(folder / name, features, corpus, rows, identity, attributes)
        advance(len(rows))
    return building_folder(cache_dir, identity)


def _in_turn(numbers: Iterable[int], key: Path) -> Iterator[int]:
    """Give each shard while its lock is held; those that other runs are making come last."""
    left, told = list(numbers), False
    while left:
        taken = []
        for number in left:
            # Beside the folder, which gets another name.
            path = key.with_name(f"{key.name}.{number:05d}.lock")
            lock = acquire(path)
            if lock is None:
                taken.append(number)
                if not told:
                    told = True
                    logger.warning(
                        "%s: %s builds this cache, too, and has shard %d now. No shard is made "
                        "twice; this run waits for those of the other.",
                        *(key, describe_holder(path), number),
                    )
                continue
            try:
                yield number
            finally:
                lock.release()
        if taken:
            time.sleep(WAIT_SECONDS)
        left = taken


def building_folder(cache_dir: Path, identity: TeacherIdentity) -> Path:
    """Where the shards of a cache go: its `.partial`, or its own folder where that is there.

    It may lack shards (someone deleted a bad one), which are made there: other runs may train from
    the rest.
    """
    final = cache_dir / identity.key
    return final if final.is_dir() else cache_dir / f"{identity.key}.partial"


def missing_shards(partial: Path, corpus: Corpus, share: bool) -> list[int]:
    """Numbers of the shards that an unfinished cache still lacks."""
    count = len(corpus.shards)
    return [n for n in range(count) if not _done_with(partial / shard_name(n, count), share)]


def finish_cache(partial: Path) -> Path:
    """Give a complete cache its final name; of two processes that end together one does it.

    Args:
        partial: From `build_cache`.

    Returns:
        The folder of the cache.
    """
    final = partial.with_name(partial.name.removesuffix(".partial"))
    try:
        if not final.is_dir():
            os.rename(partial, final)
    except FileNotFoundError:
        if not final.is_dir():
            raise
    return final


def shard_names(corpus: Corpus) -> list[str]:
    """File names of a complete cache of `corpus`, in the order of its shards."""
    return [shard_name(number, len(corpus.shards)) for number in range(len(corpus.shards))]


def shard_name(number: int, count: int) -> str:
    """File name of the features of shard `number` of `count`."""
    return f"features-{number:05d}-of-{count:05d}.h5"


def write_features(
    path: Path,
    features: np.ndarray,
    corpus: Corpus,
    rows: np.ndarray,
    identity: TeacherIdentity,
    attributes: dict[str, Any],
) -> None:
    """Write one shard's features under a temporary name, sync, and rename.

    Its lock is held, so that drafts of it are of a killed or failed build, and are removed.

    Args:
        path: Final name.
        features: (n, n_views, 16, d_T) float16; `features` of the file is the first view, `views`
            (n, n_views - 1, 16, d_T) the others, if there are any.
        corpus: Gives slide_id, x, y of each row.
        rows: (n,) rows of the corpus.
        identity: Stored as attributes and checked on opening.
        attributes: Further attributes.
    """
    for stale in path.parent.glob(f"{path.stem}.tmp*"):
        stale.unlink(missing_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    index = corpus.index
    with h5py.File(temporary, "w") as file:
        chunk = (1, *features.shape[2:])
        file.create_dataset("features", data=features[:, 0], chunks=chunk)
        if features.shape[1] > 1:
            file.create_dataset("views", data=features[:, 1:], chunks=(1, *chunk))
        names = index.slide_names[index.slide[rows]]
        file.create_dataset("slide_id", data=names.astype(object), dtype=h5py.string_dtype())
        file.create_dataset("x", data=index.x[rows])
        file.create_dataset("y", data=index.y[rows])
        for name, value in (vars(identity) | attributes).items():
            file.attrs[name] = value
        file.attrs["format"] = "xmag-teacher-features"
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["created_by"] = f"xmag_hf {__version__}"
        file.flush()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class TeacherFeatures:
    """Read access to a complete cache, by row of the corpus. Picklable: files open on first use.

    Args:
        folder: Of one key.
        corpus: That it must belong to.
        identity: That it must carry.
        fetch: For a cache elsewhere: gives the local path of a file by its name, called when the
            shard is first read, and only then is that file checked. None for files in `folder`.

    Raises:
        DistillationError: A file is missing, stale or belongs to other pairs; the file, the value
            and the remedy are named.
    """

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        identity: TeacherIdentity,
        fetch: Callable[[str], Path] | None = None,
    ) -> None:
        self.folder = folder
        self.starts = corpus.shard_starts
        self.paths = [folder / name for name in shard_names(corpus)]
        self._fetch = fetch
        self._check = functools.partial(_check_file, corpus=corpus, identity=identity)
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        if fetch is not None:
            self.paths[0] = fetch(self.paths[0].name)  # says how wide the features are
        dims = {self._check(path, n) for n, path in enumerate(self.paths[: 1 if fetch else None])}
        if len(dims) != 1:
            raise DistillationError(f"{folder}: shards differ in feature width: {sorted(dims)}.")
        self.teacher_dim: int = dims.pop()
        self.views = CACHED_VIEWS[_kept_views(identity)]  # dihedral views, 0 to 7, that are kept

    def __getitem__(self, row: int) -> np.ndarray:
        """(16, d_T) float16 of one pair as it lies in the corpus."""
        return self.view(row, 0)

    def view(self, row: int, number: int) -> np.ndarray:
        """(16, d_T) float16 of one pair in its dihedral view `self.views[number]`."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        if shard not in self._files:
            path = self.paths[shard]
            if self._fetch is not None and shard > 0:
                path = self._fetch(path.name)
                self._check(path, shard)
            # Rows are read once an epoch, in random order: HDF5's own cache would only fill memory.
            self._files[shard] = h5py.File(path, "r", rdcc_nbytes=0)
            if len(self._files) > MOST_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        file, row = self._files[shard], row - self.starts[shard]
        if number == 0:
            return file["features"][row]  # type: ignore[index]
        return file["views"][row, number - 1]  # type: ignore[index]

    @property
    def licence(self) -> str:
        """Licence of the teacher, as its card said when the features were made."""
        with h5py.File(self.paths[0], "r") as file:
            return str(file.attrs["licence"])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(n, 16, d_T) float16 of several pairs."""
        return np.stack([self[int(row)] for row in rows])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # an open HDF5 file must not cross a fork


def _seen_as(teacher_view: str, views: int) -> str:
    """What the identity adds: nothing at 20x and one view, so that older caches keep their key."""
    seen = {"20x": "", "5x": ENLARGED}[teacher_view]
    return seen + (ALL_VIEWS.format(views) if views > 1 else "")


# What `_seen_as` may have added -> number of views.
_ENDINGS = {_seen_as(view, n): n for view in TEACHER_VIEWS for n in CACHED_VIEWS}


def _ending(normalisation: str) -> str:
    return max(filter(normalisation.endswith, _ENDINGS), key=len)


def _kept_views(identity: TeacherIdentity) -> int:
    return _ENDINGS[_ending(identity.normalisation)]


def _sharing(share: bool) -> str:
    return "within shards" if share else "none"


def _done_with(path: Path, share: bool) -> bool:
    """Whether a shard of an unfinished cache is there, made the same way."""
    return file_attributes(path).get("sharing") == _sharing(share)


def file_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a file of the cache; none if it is absent or damaged."""
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except OSError:
        return {}


def _check_file(path: Path, number: int, corpus: Corpus, identity: TeacherIdentity) -> int:
    """Raise unless the file belongs to this shard and identity; return d_T."""
    remedy = f"Delete {path} and run again: only that shard is made anew."
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DistillationError(f"{path}: missing or damaged ({error}). {remedy}") from error
    with file:
        if file.attrs.get("format_version") != FORMAT_VERSION:
            found = file.attrs.get("format_version")
            raise DistillationError(
                f"{path}: format_version is {found}, this reads {FORMAT_VERSION}. {remedy}"
            )
        for name, expected in vars(identity).items():
            if file.attrs.get(name) != expected:
                raise DistillationError(
                    f"{path}: {name} is {file.attrs.get(name)!r}, expected {expected!r}. {remedy}"
                )
        rows = np.arange(corpus.shard_starts[number], corpus.shard_starts[number + 1])
        index = corpus.index
        slide_ids = np.array(file["slide_id"].asstr()[:], dtype=object)  # type: ignore[union-attr]
        same = (
            len(slide_ids) == len(rows)
            and np.array_equal(slide_ids, index.slide_names[index.slide[rows]])
            and np.array_equal(file["x"][:], index.x[rows])  # type: ignore[index]
            and np.array_equal(file["y"][:], index.y[rows])  # type: ignore[index]
        )
        shape = file["features"].shape  # type: ignore[union-attr]
        more = _kept_views(identity) - 1
        found_more = file["views"].shape[1] if "views" in file else 0  # type: ignore[union-attr]
        if found_more != more:
            raise DistillationError(
                f"{path}: {found_more + 1} dihedral views, expected {more + 1}. {remedy}"
            )
        if not same or shape[:2] != (len(rows), CELLS):
            raise DistillationError(
                f"{path}: its {shape[0]} rows are not the {len(rows)} pairs of "
                f"{corpus.shards[number]}. {remedy}"
            )
        return int(shape[2])

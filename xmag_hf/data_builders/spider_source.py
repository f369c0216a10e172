"""Where SPIDER's files lie: tar parts on the Hub or in a folder, or the unpacked folder.

The parts are read as one stream, once, for the place of each member; after that an image is a seek
and a read. Nothing is unpacked.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import logging
import os
import re
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import errors, snapshot_download

from xmag_hf.slides import sha256_head

logger = logging.getLogger(__name__)

LICENCE = "CC-BY-NC-4.0"
METADATA = "metadata.json"
IMAGES = "images"
# Of the HTTP client, whichever it is, when a network breaks in the middle.
NETWORK_ERROR: type[Exception] = getattr(errors, "HTTPError", OSError)

Location = tuple[int, int] | str  # (offset, bytes) in the joined parts, or a file name
Progress = Callable[[str, int, int], None]  # (stage, done, in all)


class SpiderError(ValueError):
    """SPIDER cannot be had or used as asked; the message names what, where and the remedy."""


# --- readers: picklable, and without open files, so that forked loaders may share them ----------


@dataclass(frozen=True)
class FolderReader:
    """Reads images of an unpacked folder."""

    folder: Path

    def read(self, location: Location) -> bytes:
        """The bytes of the file `location`.

        Raises:
            ValueError: It is not there any more, or a link to nothing.
            OSError: The disk, not the file.
        """
        try:
            return (self.folder / str(location)).read_bytes()
        except FileNotFoundError as error:
            raise ValueError("no such file") from error


class PartsReader:
    """Reads the parts of a tar as if they were joined.

    Attributes:
        paths: In the order of their numbers.
        size: Bytes of all together.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        self.sizes = [path.stat().st_size for path in self.paths]
        self._starts = [0, *itertools.accumulate(self.sizes)]
        self.size = self._starts[-1]

    def read(self, location: Location) -> bytes:
        """The bytes at `location`, (offset, size); fewer at the end of the last part."""
        offset, left = location
        blocks = []
        while isinstance(offset, int) and isinstance(left, int) and left and offset < self.size:
            number = self._number(offset)
            here = offset - self._starts[number]
            with self.paths[number].open("rb", buffering=0) as file:
                file.seek(here)
                block = file.read(min(left, self.sizes[number] - here))
            if not block:
                raise SpiderError(
                    f"{self.paths[number]} has become shorter while it was read. Leave the source "
                    "alone until the run is over, and run it again."
                )
            blocks.append(block)
            offset, left = offset + len(block), left - len(block)
        return b"".join(blocks)

    def part_at(self, offset: int) -> Path:
        """The part that holds a byte of the joined stream."""
        return self.paths[min(self._number(min(offset, self.size - 1)), len(self.paths) - 1)]

    def _number(self, offset: int) -> int:
        return bisect.bisect_right(self._starts, max(offset, 0)) - 1


class _JoinedStream(io.RawIOBase):
    """The parts as one seekable file, for `tarfile`."""

    def __init__(self, reader: PartsReader):
        self._reader, self._at = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._reader.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        block = self._reader.read((self._at, len(buffer)))
        buffer[: len(block)] = block
        self._at += len(block)
        return len(block)


@dataclass(frozen=True)
class OpenSource:
    """A source whose files are known.

    Attributes:
        metadata: Content of metadata.json.
        locations: File name of an image -> where its bytes are.
        reader: Reads them.
    """

    metadata: bytes
    locations: dict[str, Location]
    reader: FolderReader | PartsReader


# --- finding it -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpiderSource:
    """Files of one organ, found but not yet read.

    Attributes:
        organ: Which.
        name: For messages and the card.
        parts: Of the tar, in order; empty for an unpacked folder.
        folder: Unpacked; None for parts.
        revision: Hub commit; None for local files.
    """

    organ: str
    name: str
    parts: tuple[Path, ...] = ()
    folder: Path | None = None
    revision: str | None = None

    @property
    def identity(self) -> str:
        """sha256, hex, over metadata.json, or over names, sizes and first MiB of the parts."""
        if self.folder is not None:
            return hashlib.sha256((self.folder / METADATA).read_bytes()).hexdigest()
        heads = "".join(f"{path.name} {sha256_head(path)}\n" for path in self.parts)
        return hashlib.sha256(heads.encode()).hexdigest()

    def open(self, progress: Progress | None = None) -> OpenSource:
        """Read the list of files.

        Args:
            progress: Called with ("index", bytes done, bytes in all).

        Raises:
            SpiderError: A part is truncated or no tar, a member climbs out of the folder, or
                metadata.json is absent.
        """
        if self.folder is not None:
            return _open_folder(self.folder)
        return _open_parts(self.organ, self.parts, progress)


def find_source(
    organ: str, folder: str | Path | None = None, *, revision: str | None = None
) -> SpiderSource:
    """Find an organ's files, downloading them if no folder is given.

    Args:
        organ: `breast`, `colorectal`, `skin` or `thorax`.
        folder: Holds `spider-<organ>.tar.00` and so on, or `SPIDER-<organ>/metadata.json`, or is
            that folder. None takes `histai/SPIDER-<organ>` from the Hub; parts that are complete
            in the Hub's cache are not fetched again, a half-fetched one goes on.
        revision: Of the Hub repository.

    Raises:
        SpiderError: Nothing there, a part missing, or the Hub refuses; with the remedy.
    """
    if folder is None:
        paths, commit = _download(organ, revision)
        return SpiderSource(organ, f"histai/SPIDER-{organ}", paths, revision=commit)
    if revision is not None:
        raise SpiderError(f"{folder}: a local folder has no revision={revision!r}; leave it out.")
    folder = Path(folder)
    if not folder.is_dir():
        raise SpiderError(f"{folder} is no folder. Name the one that holds SPIDER-{organ}.")
    parts = _numbered([path.name for path in folder.iterdir()], organ, str(folder))
    if parts:
        return SpiderSource(organ, str(folder), tuple(folder / name for name in parts))
    for candidate in (folder / f"SPIDER-{organ}", folder):
        if (candidate / METADATA).is_file():
            _refuse_other_organ(candidate.resolve().name, organ, str(folder))
            return SpiderSource(organ, str(candidate), folder=candidate)
    raise SpiderError(
        f"{folder}: neither spider-{organ}.tar.00 nor SPIDER-{organ}/{METADATA} in it. Name the "
        "folder that holds one of them, or leave the source out to download it."
    )


def _numbered(names: Sequence[str], organ: str, where: str) -> list[str]:
    """Names of the parts, in order; [] if there are none; a gap is an error."""
    pattern = re.compile(rf"spider-{organ}\.tar(?:\.(\d+))?", re.IGNORECASE)
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    whole = [match.string for match in matches if match[1] is None]
    numbered = {int(match[1]): match.string for match in matches if match[1] is not None}
    if not numbered:
        return whole[:1]
    missing = [number for number in range(max(numbered) + 1) if number not in numbered]
    if missing:
        names = [f"spider-{organ}.tar.{number:02d}" for number in missing]
        raise SpiderError(
            f"{where}: of the parts up to {numbered[max(numbered)]}, missing: {', '.join(names)}. "
            "Download them beside the others."
        )
    return [numbered[number] for number in sorted(numbered)]


def _refuse_other_organ(name: str, organ: str, where: str) -> None:
    if name.lower().startswith("spider-") and name.lower() != f"spider-{organ}":
        raise SpiderError(f"{where} holds {name}, asked for {organ}. Name the right one.")


# --- the Hub ----------------------------------------------------------------------------------


def _download(organ: str, revision: str | None) -> tuple[tuple[Path, ...], str]:
    """The parts of an organ in the Hub's cache, and the commit; no network if they are there."""
    repository = f"histai/SPIDER-{organ}"
    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            allow_patterns=f"spider-{organ}.tar*",
        )
    except errors.GatedRepoError as error:
        raise SpiderError(f"{repository}: access refused. {_how_to_get(repository)}") from error
    except errors.RevisionNotFoundError as error:
        raise SpiderError(f"{repository} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise SpiderError(
            f"{repository}: not there, or not to be seen without a login. {_how_to_get(repository)}"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, NETWORK_ERROR) as error:
        raise SpiderError(
            f"{repository}: the Hub cannot be reached ({type(error).__name__}: {error}) and the "
            "local cache does not have it. Run the same command again where there is a network (a "
            f"download goes on where it was), or give a folder as source. {_how_to_get(repository)}"
        ) from error
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    parts = _numbered(names, organ, repository)
    if not parts:
        raise SpiderError(
            f"{repository} holds no spider-{organ}.tar.NN. Its layout has changed: download and "
            "unpack it, and give the folder as source."
        )
    return tuple(Path(folder) / name for name in parts), Path(folder).name


def _how_to_get(repository: str) -> str:
    return (
        f"SPIDER is gated: accept its licence ({LICENCE}) on "
        f"https://huggingface.co/datasets/{repository}, then log in with `hf auth login` or set "
        "HF_TOKEN."
    )


# --- the unpacked folder ----------------------------------------------------------------------


def _open_folder(folder: Path) -> OpenSource:
    images = folder / IMAGES
    if not images.is_dir():
        raise SpiderError(f"{folder} has no folder {IMAGES}. Unpack the whole of SPIDER's tar.")
    locations: dict[str, Location] = {}
    inside = images.resolve()
    with os.scandir(images) as entries:
        for entry in entries:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                raise SpiderError(
                    f"{entry.path}: a link to {Path(entry.path).resolve()} climbs out of the "
                    "folder. Put the image itself there."
                )
            locations[sys.intern(entry.name)] = entry.name
    return OpenSource((folder / METADATA).read_bytes(), locations, FolderReader(images))


# --- the tar ----------------------------------------------------------------------------------


def _open_parts(organ: str, paths: Sequence[Path], progress: Progress | None) -> OpenSource:
    """Index the joined parts in one pass over the members' headers."""
    reader = PartsReader(paths)
    locations: dict[str, Location] = {}
    metadata: Location | None = None
    for name, offset, size in _members(reader, progress):
        parts = PurePosixPath(name).parts
        if parts:
            _refuse_other_organ(parts[0], organ, str(paths[0]))
        # As when unpacking, a member that comes again replaces the earlier one.
        if len(parts) == 2 and parts[1] == METADATA:
            metadata = (offset, size)
        elif len(parts) == 3 and parts[1] == IMAGES:
            locations[sys.intern(parts[2])] = (offset, size)
    if short := _shorter(reader):
        # A loss of whole blocks can go unseen above; the image at the cut then does not decode.
        logger.warning("SPIDER-%s: shorter than the other parts, so truncated? %s", organ, short)
    if metadata is None:
        raise SpiderError(
            f"{paths[0]}: no SPIDER-{organ}/{METADATA} in the tar. It is not SPIDER's: download "
            "it again."
        )
    return OpenSource(reader.read(metadata), locations, reader)


def _members(reader: PartsReader, progress: Progress | None):
    """(name, offset, size) of each regular file of the tar.

    Raises:
        SpiderError: The stream breaks off or breaks, or a member could leave the folder.
    """
    stream = io.BufferedReader(_JoinedStream(reader))
    archive, member = None, None
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - closed with the stream
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined] - millions: names are enough
            _refuse_climbing(member, reader.part_at(member.offset))
            if member.isreg():
                yield member.name, member.offset_data, member.size
            if progress is not None:
                progress("index", min(member.offset_data + member.size, reader.size), reader.size)
    # ValueError and OSError: what a header of random bytes can provoke in tarfile.
    except (tarfile.TarError, EOFError, ArithmeticError, OSError, ValueError) as error:
        if isinstance(error, SpiderError):
            raise
        raise _broken(reader, archive.offset if archive else 0, str(error)) from error  # type: ignore[attr-defined]
    # `tarfile` takes a header it cannot read, and a missing end, for the end of the archive.
    end = archive.offset  # type: ignore[attr-defined]
    if reader.read((end, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        raise _broken(reader, end, "no member header there, and no end of the archive")
    while end < reader.size:
        block = reader.read((end, 1 << 20))
        if block.count(0) != len(block):
            raise _broken(reader, end, "data after the end of the archive")
        end += len(block)


def _refuse_climbing(member: tarfile.TarInfo, part: Path) -> None:
    if member.issym() or member.islnk():
        raise SpiderError(
            f"{part}: member {member.name!r} is a link (to {member.linkname!r}); SPIDER has none. "
            "Do not trust this file: download it again from its page."
        )
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", member.name):
        raise SpiderError(
            f"{part}: member {member.name!r} climbs out of the folder. Do not trust this file: "
            "download it again from its page."
        )
    if member.size < 0 or not (member.isreg() or member.isdir()):
        raise SpiderError(
            f"{part}: member {member.name!r} is neither a file nor a folder. Do not trust this "
            "file: download it again from its page."
        )


def _broken(reader: PartsReader, offset: int, reason: str) -> SpiderError:
    """An error naming the part that is most likely to blame."""
    short = _shorter(reader)
    hint = f"Shorter than the others: {short}. " if short else ""
    return SpiderError(
        f"{reader.part_at(offset)}: the tar breaks at byte {offset:,} of {reader.size:,}: {reason}."
        f" A part is truncated or missing. {hint}Compare the sizes with those on the Hub and "
        "download the part again."
    )


def _shorter(reader: PartsReader) -> str:
    """Parts before the last that are shorter than others, '' if none: truncated, most likely."""
    # A tar is cut into equal parts and a rest.
    usual = max(reader.sizes[:-1] if len(reader.sizes) > 2 else reader.sizes)
    return ", ".join(
        f"{path.name} ({size:,} bytes; others have {usual:,})"
        for path, size in zip(reader.paths[:-1], reader.sizes[:-1], strict=True)
        if size < usual
    )

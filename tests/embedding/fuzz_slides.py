"""`python fuzz_slides.py FOLDER FIRST LAST BASE...`: plan and read mutated slides, one a number.

Its own process: a decoder may crash it. Prints the number before each slide, and `done` at the end;
the reader (`survivors`) starts it again behind a number that killed it. A slide that takes longer
than `SECONDS` ends the process by a signal; memory is limited.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10
MEMORY = 4 << 30
VALUES = (0, 1, 2, 3, 7, 255, 256, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Base:
    """A slide that is mutated, and where in it headers are."""

    content: bytes
    header: tuple[int, ...]  # byte positions: file header, directories, values of tags
    entries: tuple[int, ...]  # where directory entries begin
    entry_bytes: int


def base_of(path: Path) -> Base:
    """Read a slide's directories with tifffile."""
    import tifffile

    content = path.read_bytes()
    header, entries = set(range(16)), []
    with tifffile.TiffFile(path) as file:
        size = 20 if file.is_bigtiff else 12
        start = 8 if file.is_bigtiff else 2
        pages = list(file.pages) + [sub for page in file.pages for sub in page.pages or ()]
        for page in pages:
            entries += [page.offset + start + n * size for n in range(len(page.tags))]
            header |= set(range(page.offset, page.offset + start + len(page.tags) * size + 8))
            for tag in page.tags:
                header |= set(range(tag.valueoffset, tag.valueoffset + min(tag.valuebytecount, 64)))
    return Base(content, tuple(sorted(p for p in header if p < len(content))), tuple(entries), size)


def mutated(base: Base, draw: random.Random) -> bytes:
    """One to four changes, nearly all of them in headers."""
    content = bytearray(base.content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        kind = draw.randrange(8)
        if kind <= 2:  # a number of a directory entry: type, count or value
            at = draw.choice(base.entries) + draw.choice((0, 2, 4, base.entry_bytes - 4))
            width = draw.choice((1, 2, 4))
            value = draw.choice(VALUES) if draw.random() < 0.7 else draw.getrandbits(32)
            content[at : at + width] = value.to_bytes(8, "little")[:width]
        elif kind == 3:
            content[draw.choice(base.header)] = draw.getrandbits(8)
        elif kind == 4:
            content[draw.choice(base.header)] ^= 1 << draw.randrange(8)
        elif kind == 5:  # two entries change places, or one is twice there
            a, b = draw.choice(base.entries), draw.choice(base.entries)
            content[a : a + base.entry_bytes] = content[b : b + base.entry_bytes]
        elif kind == 6 and draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
        else:  # somewhere in the pixels
            at = draw.randrange(len(content) or 1)
            content[at : at + draw.randrange(64)] = draw.randbytes(draw.randrange(64))
        content.extend(bytes(max(0, 32 - len(content))))
        if len(content) < len(base.content):
            content.extend(bytes(len(base.content) - len(content)) if draw.random() < 0.5 else b"")
            break
    return bytes(content)


def embed_all(folder: Path, first: int, last: int, paths: list[Path]) -> None:
    """What `xmag embed` does with each slide, but for the encoder."""
    from xmag_hf.embedding.options import EmbedOptions
    from xmag_hf.embedding.plan import PatchGeometry, plan_slide
    from xmag_hf.embedding.read import read_patches
    from xmag_hf.embedding.sources import SlideSource, reason_of
    from xmag_hf.slides import SlideError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    bases = [base_of(path) for path in paths]
    geometry = PatchGeometry(64, 0.5, 0, 64, 0.5, 0.0)
    options = EmbedOptions(tissue=0.0, threads=1)
    said: collections.Counter[str] = collections.Counter()
    for number in range(first, last):
        print(number, flush=True)
        draw = random.Random(number)
        path = folder / f"fuzz{os.getpid()}.tif"
        path.write_bytes(mutated(bases[number % len(bases)], draw))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: machines are shared
        signal.alarm(100 * SECONDS)  # for what hangs without computing
        source = SlideSource(path, slide_id=f"number-{number}")
        try:
            plan = plan_slide(source, geometry, options)
            patches = sum(len(batch.rows) for batch in read_patches(plan, batch_size=8))
            said["read" if patches else "no patches"] += 1
        except SlideError as error:
            said[type(error).__name__] += 1
            if "number-" not in str(error):
                raise
        except Exception as error:  # noqa: BLE001 - the product catches it too; counted apart
            said[f"{type(error).__name__} ({reason_of(source.slide_id, error)[:90]})"] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    path.unlink(missing_ok=True)
    print("done", dict(said), flush=True)


def survivors(
    folder: Path, first: int, last: int, bases: list[Path]
) -> tuple[list[tuple[int, int]], list[str]]:
    """Run numbers `first` to `last` in child processes.

    Returns:
        (number, return code) of slides that killed their process, and what the children said.
    """
    here = Path(__file__).resolve()
    search = os.pathsep.join(map(str, (here.parent, here.parents[1], here.parents[2])))
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    dead, words = [], []
    while first < last:
        command = [sys.executable, str(here), str(folder), str(first), str(last)]
        child = subprocess.run(
            [*command, *map(str, bases)], capture_output=True, text=True, env=environment
        )
        lines = child.stdout.split("\n")[:-1]
        if child.returncode == 0:
            return dead, [*words, lines[-1]]
        first = int(lines[-1]) + 1
        dead.append((first - 1, child.returncode))
        words.append(child.stderr[-500:])
    return dead, words


if __name__ == "__main__":
    embed_all(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [Path(p) for p in sys.argv[4:]]
    )

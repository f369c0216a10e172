"""Open what holds a slide: OpenSlide's formats, and plain PNG and JPEG images."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from xmag_hf.slides import Slide, SlideOpenError, SlideScaleError, open_slide

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
IMAGE_VENDOR = "image"
# What a slide can provoke. Damaged files reach decoders that raise whatever they please
# (struct.error, EOFError, RecursionError, ...), and one file must not end a night's run: its
# reason names the kind of error.
SLIDE_FAULTS = (Exception,)


def reason_of(slide_id: str, error: BaseException) -> str:
    """Why a slide failed, in one line that names it; our own errors name it themselves."""
    if type(error).__module__.startswith("xmag_hf"):
        return str(error)
    if isinstance(error, MemoryError) and not str(error):
        return f"{slide_id}: not enough memory for what its file asks for."
    return f"{slide_id}: {type(error).__name__}: {error}"


def status_of(error: BaseException) -> str:
    """`refused` for a scale that is missing, implausible or too coarse; else `failed`."""
    return "refused" if isinstance(error, SlideScaleError) else "failed"


@dataclass(frozen=True)
class SlideSource:
    """A slide to embed.

    Attributes:
        path: The file.
        slide_id: Name of its bag; default the file's stem.
        mpp: um/px of level 0 if the file's own must be overruled.
        patient_id: Carried into the summary.
        tissue_geojson: Polygons that say where tissue is, instead of finding it.
    """

    path: Path
    slide_id: str = ""
    mpp: float | None = None
    patient_id: str = ""
    tissue_geojson: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "slide_id", self.slide_id or self.path.stem)


def open_source(
    path: str | os.PathLike[str], mpp: float | None = None, *, slide_id: str | None = None
) -> Slide:
    """Open a slide, or a plain image as a slide of one level.

    Args:
        path: What OpenSlide reads, or a PNG or JPEG (by its suffix), which is held in memory.
        mpp: um/px of level 0; images have none of their own.
        slide_id: Name in messages; default the file's stem.

    Returns:
        The open slide.

    Raises:
        SlideOpenError: Missing, damaged, or of no known format.
        SlideScaleError: No um/px, or an implausible one.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return open_slide(path, mpp, slide_id=slide_id)
    slide_id = slide_id or path.stem
    handle = openslide.ImageSlide(_load_image(path, slide_id))
    slide = Slide(path, handle, slide_id, mpp)  # type: ignore[arg-type]
    slide.vendor = IMAGE_VENDOR
    return slide


def changed_at(path: Path) -> float:
    """When a slide last changed: its file, or one of those beside it that hold its pixels.

    Args:
        path: The file; of MRXS, VMS, VMU and DICOM the others are looked at too.

    Returns:
        Seconds, by the clock of the file system. A copy counts by when it was made, also where it
        keeps the date of its original.

    Raises:
        OSError: A file cannot be looked at.
    """
    files, kind = [path], path.suffix.lower()
    if kind == ".mrxs" and path.with_suffix("").is_dir():
        files += path.with_suffix("").iterdir()
    elif kind in (".vms", ".vmu"):  # lines of KEY=NAME
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        files += [path.parent / line.partition("=")[2].strip() for line in lines]
    elif kind == ".dcm":
        files += path.parent.glob("*.dcm")
    times = [file.stat() for file in files if file.is_file()]
    return max(max(time.st_mtime, time.st_ctime) for time in times)


def _load_image(path: Path, slide_id: str) -> Image.Image:
    """An RGB or RGBA image, decoded whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
    except FileNotFoundError:
        raise SlideOpenError(
            f"{slide_id}: no file at {path}. Check the path, or drop the slide."
        ) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SlideOpenError(
            f"{slide_id}: {path} is too large for a plain image ({error}). Convert it to a tiled "
            "TIFF."
        ) from error
    except Exception as error:  # noqa: BLE001 - Pillow's decoders: SyntaxError, EOFError, ...
        raise SlideOpenError(
            f"{slide_id}: {path} cannot be decoded: {error}. Copy or download it again."
        ) from error
    if image.mode.startswith("I"):  # 16 bit grey: keep the upper eight
        grey = np.clip(np.asarray(image, dtype=np.int64) // 256, 0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")

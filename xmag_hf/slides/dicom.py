"""Which series a DICOM file is of: a slide is a series, with a file for each level."""

from __future__ import annotations

import warnings
from pathlib import Path

import openslide

SERIES_INSTANCE_UID = 0x0020000E
WHOLE_SLIDE_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage


def series_uid(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file, by pydicom where it is installed, else by OpenSlide.

    pydicom stops at the UID. OpenSlide reads the header of every file in the folder, and knows
    slides only.

    Args:
        path: The file.

    Returns:
        The UID; None if there is none to be read, or the file is no whole slide image.
    """
    try:
        from pydicom.filereader import read_partial
    except ImportError:
        return _by_openslide(path)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard's letter
            # A header may hold a megabyte for each thousand tiles, all behind the UID.
            found = read_partial(file, lambda tag, vr, length: tag > SERIES_INSTANCE_UID)
            if found.SOPClassUID != WHOLE_SLIDE_IMAGE:
                return None  # a report or an annotation beside the slide; OpenSlide has none either
            return str(found.SeriesInstanceUID) or None
    except Exception:  # noqa: BLE001 - damaged files make pydicom raise whatever it pleases
        return None


def _by_openslide(path: Path) -> str | None:
    try:
        with openslide.OpenSlide(path) as slide:
            return slide.properties.get("dicom.SeriesInstanceUID")
    except (openslide.OpenSlideError, OSError):
        return None

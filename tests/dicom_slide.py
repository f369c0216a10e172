"""DICOM whole-slide images as scanners write them: a file a level, JPEG tiles, TILED_FULL."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 256


def write_dicom(
    path: Path,
    pixels: np.ndarray,
    mpp: float | None,
    *,
    series: str | None = None,
    kind: tuple[str, str, str] = ("ORIGINAL", "VOLUME", "NONE"),
) -> Path:
    """Write (H, W, 3) uint8 as a DICOM file; no pixel spacing if `mpp` is None.

    Files of one slide share `series` (a UID); None is a series of its own. `kind` is of the level:
    its further ones are DERIVED, VOLUME, RESAMPLED, its label ORIGINAL, LABEL, NONE.
    """
    height, width = pixels.shape[:2]
    slide = Dataset()
    slide.file_meta = FileMetaDataset()
    slide.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    slide.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    slide.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    slide.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    slide.SOPInstanceUID = slide.file_meta.MediaStorageSOPInstanceUID
    series = series or generate_uid()
    slide.SeriesInstanceUID = series
    slide.StudyInstanceUID = generate_uid(entropy_srcs=[series, "study"])
    slide.FrameOfReferenceUID = generate_uid(entropy_srcs=[series, "frame"])
    slide.Modality, slide.PatientID, slide.PatientName = "SM", "p", "p"
    slide.ImageType = [kind[0], "PRIMARY", *kind[1:]]
    slide.DimensionOrganizationType = "TILED_FULL"
    slide.SamplesPerPixel, slide.PhotometricInterpretation = 3, "YBR_FULL_422"
    slide.PlanarConfiguration, slide.PixelRepresentation = 0, 0
    slide.BitsAllocated, slide.BitsStored, slide.HighBit = 8, 8, 7
    slide.Rows, slide.Columns = TILE, TILE
    slide.TotalPixelMatrixColumns, slide.TotalPixelMatrixRows = width, height
    slide.TotalPixelMatrixFocalPlanes = 1
    optical = Dataset()
    optical.OpticalPathIdentifier, optical.ObjectiveLensPower = "1", 20
    slide.OpticalPathSequence = [optical]
    groups = Dataset()
    if mpp is not None:
        measures = Dataset()
        measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
        groups.PixelMeasuresSequence = [measures]
    slide.SharedFunctionalGroupsSequence = [groups]
    padded = np.pad(pixels, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    frames = [
        _jpeg(padded[y : y + TILE, x : x + TILE])
        for y in range(0, height, TILE)
        for x in range(0, width, TILE)
    ]
    slide.NumberOfFrames = len(frames)
    slide.PixelData = encapsulate(frames)
    slide["PixelData"].VR = "OB"
    slide.save_as(path, enforce_file_format=True)
    return path


def _jpeg(tile: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue()

"""A DICOM whole-slide image of one level, as scanners write it: JPEG tiles, TILED_FULL."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 256


def write_dicom(path: Path, pixels: np.ndarray, mpp: float | None) -> Path:
    """Write (H, W, 3) uint8 as a DICOM slide; no pixel spacing if `mpp` is None."""
    height, width = pixels.shape[:2]
    slide = Dataset()
    slide.file_meta = FileMetaDataset()
    slide.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    slide.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    slide.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    slide.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    slide.SOPInstanceUID = slide.file_meta.MediaStorageSOPInstanceUID
    slide.StudyInstanceUID, slide.SeriesInstanceUID = generate_uid(), generate_uid()
    slide.FrameOfReferenceUID = generate_uid()
    slide.Modality, slide.PatientID, slide.PatientName = "SM", "p", "p"
    slide.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
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

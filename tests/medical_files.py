"""Files of medicine, made in the tests."""

from __future__ import annotations

import io
from typing import Any

from numpy.typing import NDArray


def dicom(
    values: NDArray[Any], photometric: str = "MONOCHROME2", *, frames: int = 1, syntax: str = "", **tags: Any
) -> bytes:
    """Return a DICOM file of stored values: [H, W], [H, W, 3], or frames of these."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    one = values[0] if frames > 1 else values
    file.Rows, file.Columns = one.shape[:2]
    file.SamplesPerPixel = 3 if one.ndim == 3 else 1
    if one.ndim == 3:
        file.PlanarConfiguration = 0
    if frames > 1:
        file.NumberOfFrames = frames
    file.PhotometricInterpretation = photometric
    file.BitsAllocated = file.BitsStored = 8 * values.dtype.itemsize
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PixelData = values.tobytes()
    for key, value in tags.items():
        setattr(file, key, value)
    if syntax:
        file["PixelData"].is_undefined_length = True
    data = io.BytesIO()
    file.save_as(data, enforce_file_format=True)
    return data.getvalue()

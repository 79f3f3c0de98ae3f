"""DICOM: stored values to measured ones, the file's own window, and inverted greys."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.data.decode.extras import MEDICAL
from dinocli.data.decode.guards import size_fault
from dinocli.data.decode.raster import ArrayFile, UnfitArray, picture_layout
from dinocli.data.images import ImagesConfig

_PERCENT = (1, 99)  # percentiles of a frame that become black and white, if neither preset nor file states a window


def is_dicom(data: bytes) -> bool:
    """Recognize a DICOM file by the mark after its preamble."""
    return data[128:132] == b"DICM"


def count_frames(path: str) -> int:
    """Return the number of frames from the header of a file."""
    pydicom = import_module("pydicom")
    return int(
        pydicom.dcmread(path, specific_tags=["NumberOfFrames"], stop_before_pixels=True).get("NumberOfFrames") or 1
    )


def open_dicom(data: bytes, images: ImagesConfig, number: int = 1) -> ArrayFile | None:
    """Decode a frame of a DICOM file; None if the extra `medical` is not installed.

    Grey values are rescaled to the file's units, such as Hounsfield units, to which `images.window` refers. Without it
    the file's own window counts, then the percentiles of the frame. MONOCHROME1 is inverted. Colors are RGB, because
    pydicom has converted YBR already, whatever the tag still says.

    Args:
        data: Content of the file.
        images: Limits, window and channels.
        number: Number of the frame, from 1.

    Raises:
        UnfitArray: If the file holds no pixels, or they do not fit the settings or cannot be unpacked.

    Source: DICOM PS3.3, C.7.6.3, C.11.1 and C.11.2.
    """
    try:
        pydicom = import_module("pydicom")
    except ImportError:
        return None
    file: Any = pydicom.dcmread(io.BytesIO(data))
    frames = int(file.get("NumberOfFrames") or 1)
    if "PixelData" not in file:
        raise UnfitArray(f"no image: DICOM without pixels ({file.get('Modality') or 'of unknown modality'})")
    if not 0 < number <= frames:
        raise UnfitArray(f"no such page: {number}; the file has pages 1 to {frames}")
    if fault := size_fault((int(file.Columns), int(file.Rows)), images):
        raise UnfitArray(fault.reason)
    values = _unpack(file, number)
    if values.ndim == 3:
        layout = picture_layout("DICOM", values.shape[2], (0.0, 2.0 ** int(file.BitsStored) - 1), images.channels)
    else:
        values = _rescale(file, number, values)
        shown = _window(file, number) or _percentiles(file, values)
        layout = replace(
            picture_layout("DICOM", 1, shown, images.channels), inverted=file.PhotometricInterpretation == "MONOCHROME1"
        )
        values = values[..., None]
    height, width, bands = values.shape
    return ArrayFile("DICOM", height, width, bands, values.dtype, layout, lambda: values, pages=frames)


def _unpack(file: Any, number: int) -> NDArray[Any]:
    """Return the stored values of a frame, with palettes applied. [H, W] or [H, W, 3]"""
    pixels: Any = import_module("pydicom.pixels")
    try:
        values = pixels.pixel_array(file, index=number - 1)
        if file.PhotometricInterpretation == "PALETTE COLOR":
            colors = pixels.apply_color_lut(values, file)
            return (colors >> 8).astype(np.uint8) if colors.dtype.itemsize > 1 else colors
    except (RuntimeError, NotImplementedError) as error:
        kind = file.file_meta.TransferSyntaxUID.name
        raise UnfitArray(f"not read here: DICOM compressed as {kind}; {MEDICAL.pip}") from error
    return np.array(values)  # pydicom may keep the array, and return it to others too


def _find(file: Any, number: int, sequence: str, keyword: str) -> Any:
    """Return a value for a frame: from the frame's own group, the shared group, or the file. None if there is none."""
    own, shared = file.get("PerFrameFunctionalGroupsSequence"), file.get("SharedFunctionalGroupsSequence")
    for group in [*([own[number - 1]] if own and number <= len(own) else []), *(shared or [])[:1]]:
        if group.get(sequence) and keyword in group[sequence].value[0]:
            return group[sequence].value[0].get(keyword)
    return file.get(keyword)


def _rescale(file: Any, number: int, values: NDArray[Any]) -> NDArray[Any]:
    slope, intercept = (
        _find(file, number, "PixelValueTransformationSequence", key) for key in ("RescaleSlope", "RescaleIntercept")
    )
    if slope is not None or intercept is not None:
        scaled: NDArray[Any] = values * float(1 if slope is None else slope) + float(intercept or 0)
        return scaled.astype(np.float32)
    if file.get("ModalityLUTSequence"):
        looked_up: NDArray[Any] = import_module("pydicom.pixels").apply_modality_lut(values, file)
        return looked_up
    return values


def _window(file: Any, number: int) -> tuple[float, float] | None:
    """Return the values that become black and white by the first window that the file states."""
    stated = [_find(file, number, "FrameVOILUTSequence", key) for key in ("WindowCenter", "WindowWidth")]
    if None in stated or "" in stated:
        return None
    center, width = (float(value if isinstance(value, str | float | int) else value[0]) for value in stated)
    if _find(file, number, "FrameVOILUTSequence", "VOILUTFunction") == "LINEAR_EXACT":
        return (center - width / 2, center + width / 2) if width > 0 else None
    # The usual function counts whole values: the first is half a value below the center.
    return (center - width / 2, center + width / 2 - 1) if width > 1 else None


def _percentiles(file: Any, values: NDArray[Any]) -> tuple[float, float] | None:
    """Return the percentiles of a frame without its padding; the depth for 8 bits; None if all values are equal."""
    if int(file.BitsStored) <= 8 and values.dtype == np.uint8:
        return 0.0, 2.0 ** int(file.BitsStored) - 1
    inside = values[values != file.PixelPaddingValue] if "PixelPaddingValue" in file else values
    if not inside.size:
        return None
    low, high = np.percentile(inside, _PERCENT).tolist()
    return (low, high) if low < high else None

"""Slices of NIfTI volumes, in the units that the file states."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np

from dinocli.data.decode.raster import ArrayFile, UnfitArray, picture_layout


def count_slices(path: str) -> int:
    """Return the number of slices along the third and all further axes, from the header."""
    return math.prod(import_module("nibabel").load(path).shape[2:])


def open_slice(path: str, number: int, channels: int) -> ArrayFile:
    """Read a slice along the third axis, turned as viewers show it: first axis to the right, second axis upwards.

    Only the slice is read; in a compressed file, everything before it is unpacked too.

    Args:
        path: A `.nii` or `.nii.gz` file.
        number: Number of the slice, from 1; further axes, such as time, change slowest.
        channels: Requested number of channels.

    Raises:
        UnfitArray: If there is no slice of this number, or its values are not real numbers or colors.
    """
    # The array proxy scales with slope and intercept. `get_fdata` would keep the whole volume, as float64.
    volume: Any = import_module("nibabel").load(path)
    further = volume.shape[2:]
    if not 0 < number <= math.prod(further):
        raise UnfitArray(f"no such page: {number}; the file has pages 1 to {math.prod(further)}")
    values = np.asarray(volume.dataobj[(slice(None), slice(None), *np.unravel_index(number - 1, further, order="F"))])
    if values.dtype.names:  # colors are records of bytes
        values = np.stack([values[name] for name in values.dtype.names], -1)
    if values.dtype.kind not in "buif":
        raise UnfitArray(f"no image: the volume holds {values.dtype}; expected real numbers or colors")
    values = np.rot90(values if values.ndim == 3 else values[..., None])
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    height, width, bands = values.shape
    layout = picture_layout("NIfTI", bands, None, channels)
    return ArrayFile("NIFTI", height, width, bands, values.dtype, layout, lambda: values)

"""The fast JPEG decoders of torchvision and torchcodec, on the host and on a device."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dinocli.core.errors import reason_of
from dinocli.data.decode.pixels import Pixels

if TYPE_CHECKING:
    from torch import Tensor, device


@cache
def _jpeg_decoder(tagged: bool) -> Callable[[Any], Any] | None:
    """Return the fastest JPEG decoder, from a tensor of bytes to a [3, H, W] tensor; None to fall back to Pillow.

    It takes 1.2 ms per photo, Pillow 1.6 ms.

    Args:
        tagged: True if the file may hold an orientation. torchcodec would apply it, but `turned` does so for all files.
    """
    try:
        import_module("torchvision.io")
        # torchvision's Python wrapper warns at each call that torchcodec replaces it. Today both are equally fast.
        native = import_module("torch").ops.image.decode_jpeg
        return lambda data: native(data, 3, False)
    except Exception:  # not installed, or built for another torch (OSError, RuntimeError)
        try:
            return None if tagged else import_module("torchcodec.decoders").decode_jpeg
        except Exception:
            return None


def has_fast_jpeg() -> bool:
    """Check if torch's libraries decode JPEGs. If they are not installed, Pillow does."""
    return _jpeg_decoder(False) is not None


def decode_jpeg_fast(data: Any, tagged: bool) -> Pixels | None:
    """Decode a JPEG to RGB with torchvision or torchcodec; None if neither is installed or it fails. [H, W, 3]"""
    if not (decoder := _jpeg_decoder(tagged)):
        return None
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the bytes are not writable
            return decoder(torch.from_numpy(np.frombuffer(data, np.uint8))).permute(1, 2, 0).numpy()
    except Exception:  # fall back to Pillow
        return None


def decode_jpegs(data: list[Tensor], where: device) -> list[Tensor | None]:
    """Decode JPEGs with torchvision: by nvJPEG on a CUDA device, elsewhere one by one.

    The host waits for the work of the current CUDA stream, and until the last image is decoded.

    Args:
        data: Bytes of each file, on the host. [n] each, uint8
        where: Device of the pixels.

    Returns:
        Pixels as stored, not turned. [3, H, W] each, uint8. None for a file that the decoder refuses.

    Raises:
        torch.OutOfMemoryError: If the device runs out of memory.
        torch.AcceleratorError: If the device fails.
    """
    import torch

    try:
        if where.type == "cuda":
            # The decoder writes from a stream of its own into memory that this stream may still read.
            torch.cuda.current_stream(where).synchronize()
            with torch.cuda.device(where):  # or another device would get a context, which takes memory
                return torch.ops.image.decode_jpegs_cuda(data, _RGB, where)
        return [torch.ops.image.decode_jpeg(one, _RGB, False) for one in data]
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # RuntimeErrors too, but not of a file
        raise
    except RuntimeError:  # one of them is corrupt, and the decoder returns no other either
        if len(data) == 1:
            return [None]
        half = len(data) // 2
        return decode_jpegs(data[:half], where) + decode_jpegs(data[half:], where)


_RGB = 3  # torchvision's ImageReadMode


def why_no_jpegs(where: device) -> str | None:
    """Try to decode a JPEG on a device, and return the error in one line; None if it works."""
    import torch

    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG", subsampling=0)
    try:
        import_module("torchvision.io")
        (found,) = decode_jpegs([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], where)
    except Exception as error:  # not installed, or built for another torch (OSError, RuntimeError, AttributeError)
        return reason_of(error)
    return None if found is not None and found.shape == (3, 16, 16) else "torchvision was built without nvJPEG"

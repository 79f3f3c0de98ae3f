"""Images passed from Python: paths, Pillow images and arrays, read like the files of a folder."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.listing import Names
from dinocli.data.sources.open import Images
from dinocli.data.sources.regular import read_file

Given = str | os.PathLike[str] | Image | NDArray[Any]


@dataclass(frozen=True, eq=False)
class GivenImages(Images):
    """Image source of paths, Pillow images and arrays, in the order given."""

    given: Sequence[Given] = ()

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        one = self.given[index]
        if isinstance(one, Image):
            return one
        if not isinstance(one, np.ndarray):
            return read_file(Path(one), images)
        file = io.BytesIO()
        np.save(file, one, allow_pickle=False)
        return file.getvalue()


def given_images(images: Given | Sequence[Given]) -> GivenImages:
    """Return an image source of the given images, without opening their files.

    Args:
        images: One image or several. An image is a path, a Pillow image, or an array of numbers, which is read like a
            `.npy` file of it: [H, W, C], [C, H, W], or [H, W] for one channel. A four-dimensional array is a batch.

    Raises:
        DinoError: If there are no images, or one has another type.
    """
    alone = isinstance(images, str | os.PathLike | Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    if not alone and not isinstance(images, Sequence | np.ndarray):
        raise _other(images)
    given: list[Any] = [images] if alone else list(images)  # type: ignore[arg-type]
    if not given:
        raise DinoError(
            "the list of images is empty; expected at least one image",
            "pass a path, a Pillow image, an array, or a list of them",
        )
    names = Names.of([_name(one, i) for i, one in enumerate(given)])
    return GivenImages("the given images", Path(), names, [], np.full(len(given), -1, dtype=np.int32), given)


def given_pixels(image: Given, config: ImagesConfig) -> Pixels:
    """Read the pixels of one image. [H, W, C]

    Raises:
        DinoError: If the image cannot be read or has another type.
    """
    source = given_images(image)
    try:
        pixels = decode(source.read(0, config), config)
    except OSError as error:
        raise unreadable(source.names[0], error.strerror or str(error)) from error
    if isinstance(pixels, BadImage):
        raise unreadable(source.names[0], pixels.reason)
    return pixels


def unreadable(name: str, reason: str) -> DinoError:
    """Return the error for a given image that cannot be read."""
    folder = "is a directory" in reason.lower()
    return DinoError(
        f"{name} cannot be read: {reason}",
        f'pass a list of its files: sorted(Path("{name}").glob("*.jpg"))'
        if folder
        else "check that image, or remove it",
    )


def _name(one: object, index: int) -> str:
    """Return the name of an image in errors."""
    if isinstance(one, str | os.PathLike):
        return os.fsdecode(one)
    numbers = isinstance(one, np.ndarray) and one.dtype.kind in "uif"
    if not numbers and not isinstance(one, Image):
        raise _other(one)
    return str(getattr(one, "filename", "")) or f"input image {index}"


def _other(came: object) -> DinoError:
    name = type(came).__name__
    article = "an" if name[:1].lower() in "aeiou" else "a"
    what = f"an array of {came.dtype}" if isinstance(came, np.ndarray) else f"{article} {name}"
    normalized = name == "Tensor"
    return DinoError(
        f"{what} is not an image; expected a path, a Pillow image, or an array of numbers",
        "pass normalized tensors to encoder.features(images), or pixels as tensor.numpy()"
        if normalized
        else 'encoder("photo.jpg")',
    )

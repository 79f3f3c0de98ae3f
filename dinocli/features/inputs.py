"""Images passed from Python: paths, bytes, Pillow images, arrays and tensors, read like the files of a folder."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Data, Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.listing import Names
from dinocli.data.sources.open import Source, open_source, within
from dinocli.data.sources.parts import expand, read_image

Given = str | os.PathLike[str] | bytes | Image | NDArray[Any] | Tensor
_EXPECTED = "a path, the bytes of an image file, a Pillow image, an array of numbers, or a uint8 tensor"


@dataclass(frozen=True, eq=False)
class GivenImages(Images):
    """Image source of paths, bytes, Pillow images, arrays and uint8 tensors, in the order given."""

    given: Sequence[Given] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of the names and of all images that are not paths."""
        total = int(super().fingerprint, 16)
        for one in self.given:
            if not isinstance(one, str | os.PathLike):
                data = _data(one)
                total = zlib.crc32(data.tobytes() if isinstance(data, Image) else data, total)
        return f"{total:08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        return _read(self.given[index], images)


@dataclass(frozen=True, eq=False)
class DatasetImages(Images):
    """Image source of a torch data set with `len` and random access.

    An item is an image as `Given` describes, or a tuple that starts with one. Only names and number are known, so a run
    on another data set of the same length is taken for a resume: give it another run folder.
    """

    dataset: Any = None

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        item = self.dataset[index]
        one = item[0] if isinstance(item, tuple | list) else item
        _name(one, index)  # refuses what is not an image
        return _read(one, images)


def given_images(images: Given | Sequence[Given]) -> GivenImages:
    """Return an image source of the given images, without opening their files.

    Args:
        images: One image or several. An image is a path, the bytes of an image file, a Pillow image, or an array of
            numbers, which is read like a `.npy` file of it: [H, W, C], [C, H, W], or [H, W] for one channel. A uint8
            tensor is read like an array. A four-dimensional array or tensor is a batch.

    Raises:
        DinoError: If there are no images, or one has another type.
    """
    if isinstance(images, np.ndarray | Tensor):
        alone = images.ndim < 4
    else:
        alone = isinstance(images, str | os.PathLike | bytes | Image)
    if not alone and not isinstance(images, Sequence | np.ndarray | Tensor):
        raise _other(images)
    given: list[Any] = [images] if alone else list(images)  # type: ignore[arg-type]
    if not given:
        raise DinoError(
            "the list of images is empty; expected at least one image",
            "pass a path, a Pillow image, an array, or a list of them",
        )
    names = Names.of([_name(one, i) for i, one in enumerate(given)])
    return GivenImages("the given images", Path(), names, [], np.full(len(given), -1, dtype=np.int32), given)


def given_source(
    images: str | os.PathLike[str] | Sequence[Given] | Dataset[Any], config: ImagesConfig = DEFAULTS
) -> Source:
    """Return the source of many images.

    Args:
        images: A place as on the command line, a sequence of images, or a torch data set. The files of a place and
            of a sequence may hold several images; an item of a data set is one.
        config: Settings that say which files hold several images.

    Raises:
        DinoError: If the place does not exist, there are no images, or one has another type.
    """
    if isinstance(images, str | os.PathLike):
        return within(open_source(os.fspath(images)), config)
    if isinstance(images, Dataset):
        return _of_dataset(images)
    return _expand(given_images(images), config)


def _expand(source: GivenImages, config: ImagesConfig) -> GivenImages:
    """Return a source of the single images in the given files. A file that no setting takes stays, to be reported."""
    rows = [row for row, one in enumerate(source.given) if isinstance(one, str | os.PathLike)]
    parts: dict[int, list[str]] = {}
    for at, name in expand("", [source.names[row] for row in rows], config)[0]:
        parts.setdefault(rows[at], []).append(name)
    return given_images([one for row, whole in enumerate(source.given) for one in parts.get(row, [whole])])


def _of_dataset(dataset: Dataset[Any]) -> DatasetImages:
    name = type(dataset).__name__
    if not hasattr(dataset, "__len__"):
        raise DinoError(
            f"the data set {name} has no length; expected one with len() and random access",
            "pass one whose items have numbers, or name shards: shards/train-{000..999}.tar",
        )
    count = len(dataset)
    if not count:
        raise DinoError(f"the data set {name} is empty; expected at least one image", "check its path and split")
    names = Names.of([f"{name} {i}" for i in range(count)])
    return DatasetImages(f"the data set {name}", Path(), names, [], np.full(count, -1, dtype=np.int32), dataset)


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


def _read(one: Any, images: ImagesConfig) -> Data:
    return read_image(os.fsdecode(one), images) if isinstance(one, str | os.PathLike) else _data(one)


def _data(one: Any) -> bytes | Image:
    """Return an image that is not a path as a source returns it: the bytes of its file, or a Pillow image."""
    if isinstance(one, bytes | Image):
        return one
    file = io.BytesIO()
    np.save(file, one.cpu().numpy() if isinstance(one, Tensor) else one, allow_pickle=False)
    return file.getvalue()


def _name(one: object, index: int) -> str:
    """Return the name of an image in errors."""
    if isinstance(one, str | os.PathLike):
        return os.fsdecode(one)
    numbers = isinstance(one, np.ndarray) and one.dtype.kind in "uif"
    pixels = isinstance(one, Tensor) and one.dtype == torch.uint8
    if not numbers and not pixels and not isinstance(one, Image | bytes):
        raise _other(one)
    return str(getattr(one, "filename", "")) or f"input image {index}"


def _other(came: object) -> DinoError:
    name = type(came).__name__
    article = "an" if name[:1].lower() in "aeiou" else "a"
    what = f"{article} {name}"
    if isinstance(came, np.ndarray | Tensor):
        what = f"{'an array' if isinstance(came, np.ndarray) else 'a tensor'} of {came.dtype}"
    return DinoError(
        f"{what} is not an image; expected {_EXPECTED}",
        "pass normalized tensors to encoder.features(images), or pixels from 0 to 255 as tensor.to(torch.uint8)"
        if isinstance(came, Tensor)
        else 'encoder("photo.jpg")',
    )

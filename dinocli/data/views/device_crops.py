"""Crops of a batch of decoded images on their device, as two matrix products: one along each axis.

Pillow and torch resize along one axis, round to bytes, and resize along the other. So do these products, within two
levels of `crops.cut_into`. The weights of an axis also cut the image, and mirror it if it is stored mirrored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinocli.core.copies import send

_AT_ONCE = 2**26  # numbers at once: intermediate results take a GB at most
# EXIF orientations as steps: transpose the stored picture, then reverse its rows, then its columns.
_STEPS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class Stored(NamedTuple):
    """Decoded image of a batch.

    Attributes:
        pixels: Pixels as stored, but transposed if `turn` says so. [C, H, W], uint8
        mirrored: True if its rows, and if its columns, are in reverse order.
        boxes: Top, left, height and width of each crop in the upright image, on the host. [P, 4]
        place: Place in the batch.
    """

    pixels: Tensor
    mirrored: tuple[bool, bool]
    boxes: Tensor
    place: int

    @classmethod
    def of(cls, pixels: Tensor, turn: int, boxes: Tensor, place: int) -> Stored:
        """Return an image from its stored pixels [C, H, W] and its EXIF orientation, 1 to 8."""
        transpose, *mirrored = _STEPS[turn]
        return cls(pixels.mT if transpose else pixels, (mirrored[0], mirrored[1]), boxes, place)


def cut_batch(groups: Sequence[Tensor], images: list[Stored], resamples: Sequence[str], dtype: torch.dtype) -> None:
    """Cut the crops of images and resize them with antialiasing.

    Args:
        groups: Crops to fill, in groups of one size. The places of other images stay unchanged. [V, B, H, H, C], uint8
        images: Images with the boxes of all crops, in the order of the groups.
        resamples: `bicubic` or `bilinear` for each crop.
        dtype: Type of the products. float16 rounds by up to a fifth of a level.
    """
    device = groups[0].device
    linear = send(torch.tensor([resample == "bilinear" for resample in resamples]), device)
    for part in _parts(images, sum(len(group) * group.shape[2] for group in groups)):
        sizes = [image.pixels.shape[1:] for image in part]
        sides = (-(-max(lengths) // 8) * 8 for lengths in zip(*sizes, strict=True))  # tensor cores need multiples of 8
        pixels = torch.zeros(len(part), 3, *sides, dtype=dtype, device=device)
        for room, image, (height, width) in zip(pixels, part, sizes, strict=True):
            room[:, :height, :width].copy_(image.pixels)
        places = send(torch.tensor([image.place for image in part]), device)
        boxes = send(torch.stack([image.boxes for image in part]).float(), device)
        ends = send(torch.tensor([[*image.pixels.shape[1:], *image.mirrored] for image in part]), device)[:, None]
        first = 0
        for group in groups:
            views, size = slice(first, first + len(group)), group.shape[2]
            rows, columns = (
                _weights(boxes[:, views, axis::2], ends[..., axis::2], linear[views], (size, side)).to(dtype)
                for axis, side in enumerate(pixels.shape[2:])
            )
            group.index_copy_(1, places, _resize(pixels, rows, columns))
            first += len(group)


def _parts(images: list[Stored], columns: int) -> Iterator[list[Stored]]:
    """Split images into parts of similar sizes, each within the budget of numbers after padding."""
    part: list[Stored] = []
    height = width = 0
    for image in sorted(images, key=lambda image: tuple(image.pixels.shape)):
        height, width = max(height, image.pixels.shape[1]), max(width, image.pixels.shape[2])
        if part and 3 * (len(part) + 1) * height * (width + columns) > _AT_ONCE:
            yield part
            part, (height, width) = [], image.pixels.shape[1:]
        part.append(image)
    if part:
        yield part


def _weights(boxes: Tensor, ends: Tensor, linear: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the weights of stored pixels in the pixels of crops along an axis. [N, V, size, side]

    Args:
        boxes: First pixel and length of each crop in the upright image. [N, V, 2]
        ends: Length of each image, and whether its pixels are in reverse order. [N, 1, 2]
        linear: True for linear instead of cubic interpolation. [V]
        shape: Length of a crop, and padded length of the images.

    Source: Pillow's resize, whose kernels widen with the scale; cubic with a = -0.5.
    """
    size, side = shape
    start, length = boxes[..., None, None].unbind(2)  # [N, V, 1, 1]
    end, mirrored = ends[..., None, None].unbind(2)
    stored = torch.arange(side, device=boxes.device)
    place = torch.where(mirrored.bool(), end - 1 - stored, stored) - start  # [N, V, 1, side]
    scale = length / size
    center = (torch.arange(size, device=boxes.device)[:, None] + 0.5) * scale
    d = ((place + 0.5 - center) / scale.clamp_min(1)).abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    cubic = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    weights = torch.where(linear[:, None, None], (1 - d).clamp_min(0), cubic)
    weights = torch.where((place >= 0) & (place < length), weights, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _resize(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the weights of both axes. [N, 3, H, W], [N, V, size, H], [N, V, size, W] -> [V, N, size, size, 3], uint8"""
    views, size = rows.shape[1:3]
    along = pixels.flatten(1, 2) @ columns.flatten(1, 2).mT  # [N, 3 H, V size]
    along = along.round_().clamp_(0, 255).unflatten(1, (3, -1)).unflatten(3, (views, size))
    along = along.permute(0, 3, 2, 1, 4).flatten(3)  # [N, V, H, 3 size]
    crops = (rows @ along).round_().clamp_(0, 255)  # [N, V, size, 3 size]
    return crops.unflatten(3, (3, size)).permute(1, 0, 2, 4, 3).to(torch.uint8)

"""Worker side: draw every number of an image's views, and cut its crops out of one decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from dinocli.config import Config
from dinocli.data.decode import Pixels
from dinocli.data.masking import MaskConfig

Probability = Field(ge=0, le=1)
_LONG = 8  # times as long as wide, beyond which an image is cut before it is resized
Floats = NDArray[np.float64]
# What `F.interpolate(antialias=True)` calls, which knows no place for the result.
_RESIZE: dict[str, Any] = {
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
}


class JitterConfig(Config):
    """Color jitter: with `probability`, each of the four in a random order, by a factor drawn around 1 (hue: around 0).

    Attributes:
        probability: Of any jitter at all.
        brightness: Half-width of the factor's range, as are `contrast` and `saturation`.
        hue: Largest turn, as a fraction of the circle.
    """

    probability: float = Probability
    brightness: float = Field(ge=0, le=1)
    contrast: float = Field(ge=0, le=1)
    saturation: float = Field(ge=0, le=1)
    hue: float = Field(ge=0, le=0.5)


class ViewConfig(Config):
    """How a view of an image is made; what is absent does not happen.

    Attributes:
        size: Side of the square crop, in pixels.
        scale: Smallest and largest area of the crop, as a fraction of the image's.
        flip: Probability of a horizontal flip.
        jitter: Color jitter.
        gray: Probability of losing the colors.
        blur: Probability of a Gaussian blur, its radius drawn between 0.1 and 2 pixels.
        solarize: Probability of inverting all above half brightness.
        resample: How the crop is resized; both are antialiased.
    """

    size: int = Field(ge=8, le=4096)
    scale: tuple[float, float]
    flip: float = Field(0.0, ge=0, le=1)
    jitter: JitterConfig | None = None
    gray: float = Field(0.0, ge=0, le=1)
    blur: float = Field(0.0, ge=0, le=1)
    solarize: float = Field(0.0, ge=0, le=1)
    resample: Literal["bicubic", "bilinear"] = "bicubic"

    @field_validator("scale")
    @classmethod
    def _is_a_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("two fractions of the area were wanted, the smaller first")
        return scale


class LowResolutionConfig(Config):
    """Smaller crops at the start of a run: the same parts of the images in fewer pixels, for less work.

    Attributes:
        epochs: How long, from the first.
        global_size: Side of the global crops meanwhile, in pixels.
        local_size: Side of the local ones; absent, they keep theirs.

    Source: FastDINOv2 (arXiv 2507.03779), which trains three quarters of the epochs at half the side.
    """

    epochs: int = Field(ge=1)
    global_size: int = Field(ge=8, le=4096)
    local_size: int | None = Field(None, ge=8, le=4096)


class ViewsConfig(Config):
    """The views of an image.

    Attributes:
        mean: Of the channels, in 0 to 1; as many numbers as there are channels.
        std: Of the channels.
        global_1: The first global view.
        global_2: The second; a loss between views wants it, a classifier does not.
        local: The local views, all alike; absent, there are none.
        locals: How many local views.
        mask: Which part of the global views is hidden from the student; absent, nothing is.
        low_resolution: Smaller crops in the first epochs; absent, all epochs have the same.
    """

    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    global_1: ViewConfig
    global_2: ViewConfig | None = None
    local: ViewConfig | None = None
    locals: int = Field(0, ge=0)
    mask: MaskConfig | None = None
    low_resolution: LowResolutionConfig | None = None

    def phases(self, steps_per_epoch: int) -> list[tuple[int, ViewsConfig]]:
        """The views by the step that they begin with: one kind, or the smaller ones and then these.

        An image's crops are cut at the same places of it in either, with the same changes of color.
        """
        low = self.low_resolution
        if low is None:
            return [(0, self)]
        full = self.model_copy(update={"low_resolution": None})
        sizes = {"global_1": low.global_size, "global_2": low.global_size, "local": low.local_size}
        views = ((name, getattr(self, name), size) for name, size in sizes.items())
        smaller = {name: view.model_copy(update={"size": size}) for name, view, size in views if view and size}
        return [(0, full.model_copy(update=smaller)), (low.epochs * steps_per_epoch, full)]

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def color_keys(self) -> list[str]:
        """The keys, below `views.`, that ask for what is done to colors, and so to three channels alone."""
        views = {"global_1": self.global_1, "global_2": self.global_2, "local": self.local}
        keys = []
        for name, view in views.items():
            jitter = view.jitter if view else None
            keys += [f"{name}.jitter.{key}" for key in ("saturation", "hue") if jitter and getattr(jitter, key)]
            keys += [f"{name}.gray"] if view and view.gray else []
        return keys

    @property
    def globals(self) -> list[ViewConfig]:
        """The global views in order."""
        return [view for view in (self.global_1, self.global_2) if view]

    @property
    def all(self) -> list[ViewConfig]:
        """All views in order, global ones first."""
        return self.globals + ([self.local] * self.locals if self.local else [])


class Draws(NamedTuple):
    """Random numbers of V views of B images that the batch side needs; where nothing happens they are the identity.

    A NamedTuple of tensors, because the data loader knows how to pin and move one.

    Attributes:
        flip: [V, B], bool
        factors: Brightness, contrast, saturation and hue. [V, B, 4]
        order: Which of the four comes first, second, third, fourth. [V, B, 4], uint8
        gray: [V, B], bool
        radius: Of the blur in pixels; 0 for none. [V, B]
        solarize: [V, B], bool
    """

    flip: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor
    radius: Tensor
    solarize: Tensor


# The numbers a view takes from its image's generator: 10 tries of (area, ratio), (top, left), flip, jitter or not, 4
# factors, 4 that are ranked into an order, gray, blur or not, radius, solarize. All are drawn whatever a recipe
# switches off, so that a switch moves nothing else.
_TRIES, _REST = 10, 14
BOX = 2 * _TRIES + 2
NUMBERS = BOX + _REST

Box = tuple[int, int, int, int]  # top, left, height, width


class Tries(NamedTuple):
    """What a view's box is made of, whatever the image's size.

    Attributes:
        areas: As fractions of the image's; the first try that fits is taken.
        ratios: Width by height.
        corner: How far down and right the box lies in the room that it leaves, in [0, 1).
    """

    areas: list[float]
    ratios: list[float]
    corner: list[float]


def uniforms(seed: int, epoch: int, index: int, views: int) -> tuple[Floats, np.random.Generator]:
    """The numbers in [0, 1) that make an image's views, and the generator they came from. [V, NUMBERS]

    They depend on nothing else than the arguments: not on the number of workers or processes, nor on a resume.
    """
    generator = np.random.default_rng((seed, epoch, index))
    return generator.random((views, NUMBERS)), generator


def crop_tries(numbers: Floats, scale: Floats) -> list[list[Tries]]:
    """All of many images' boxes that can be told before their sizes are known, in one go.

    Args:
        numbers: Uniform in [0, 1). [B, V, NUMBERS]
        scale: Smallest and largest area of a view, as a fraction of the image's. [V, 2]

    Returns:
        The tries of each view of each image. [B][V]
    """
    uniform = numbers[..., : 2 * _TRIES].reshape(*numbers.shape[:2], _TRIES, 2)
    areas = scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * uniform[..., 0]  # [B, V, tries]
    ratios = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * uniform[..., 1])  # [B, V, tries]
    corners = numbers[..., 2 * _TRIES : BOX]
    images = zip(areas.tolist(), ratios.tolist(), corners.tolist(), strict=True)
    return [[Tries(*view) for view in zip(*image, strict=True)] for image in images]


def crop_boxes(tries: Sequence[Tries], height: int, width: int) -> list[Box]:
    """Where each view is cut: areas uniform in `scale`, ratios log-uniform in 3/4 to 4/3, ten tries.

    Plain numbers, as the first or second try mostly fits and arrays of ten are made in more time than that takes.

    Args:
        tries: Of each view.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        Top, left, height, width of each view.

    Source: torchvision RandomResizedCrop.get_params.
    """
    return [_box(one, height, width) for one in tries]


def _box(tries: Tries, height: int, width: int) -> Box:
    pixels = height * width
    for fraction, ratio in zip(tries.areas, tries.ratios, strict=True):
        area = pixels * fraction
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            down, right = tries.corner
            return math.floor(down * (height - h + 1)), math.floor(right * (width - w + 1)), h, w
    # No try fits in a very long image: then its middle is taken, as long as the ratio allows.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width / (3 / 4))))
    return (height - h) // 2, (width - w) // 2, h, w


def draws(numbers: Floats, views: Sequence[ViewConfig]) -> Draws:
    """What the batch side does to each view.

    Args:
        numbers: Uniform in [0, 1). [B, V, NUMBERS]
        views: Their recipe. V of them.
    """
    flip, jitter, factors, order, gray, blur, radius, solarize = np.split(
        numbers.swapaxes(0, 1)[..., BOX:], [1, 2, 6, 10, 11, 12, 13], axis=-1
    )
    chance = {
        name: np.array([getattr(v, name) for v in views])[:, None] for name in ("flip", "gray", "blur", "solarize")
    }
    jitters = [v.jitter or JitterConfig(probability=0, brightness=0, contrast=0, saturation=0, hue=0) for v in views]
    spread = np.array([[j.brightness, j.contrast, j.saturation, j.hue] for j in jitters])[:, None]  # [V, 1, 4]
    center = np.array([1.0, 1.0, 1.0, 0.0])
    jittered = jitter < np.array([j.probability for j in jitters])[:, None, None]
    return Draws(
        flip=torch.from_numpy(flip[..., 0] < chance["flip"]),
        factors=torch.from_numpy(np.where(jittered, center + spread * (2 * factors - 1), center).astype(np.float32)),
        order=torch.from_numpy(order.argsort(-1).astype(np.uint8)),
        gray=torch.from_numpy(gray[..., 0] < chance["gray"]),
        radius=torch.from_numpy(
            np.where(blur < chance["blur"][..., None], 0.1 + 1.9 * radius, 0)[..., 0].astype(np.float32)
        ),
        solarize=torch.from_numpy(solarize[..., 0] < chance["solarize"]),
    )


def cut_into(out: Tensor, pixels: Pixels, box: Box, resample: str = "bicubic") -> None:
    """Cut a box out of an image and resize it with antialiasing.

    Args:
        out: Place of the crop, within 2 levels of the resize in float64. Pillow is as near up to 12; 13.0 rounds
            differently, by up to 12 levels at sharp edges of photos. [1, C, height, width], uint8
        pixels: [H, W, C]
        box: Top, left, height, width.
        resample: `bicubic` or `bilinear`.
    """
    top, left, height, width = box
    # uint8 with the channels last in memory, as decoders give them, is what torch has its fast kernel for. numpy cuts
    # in a third of the time.
    image = torch.from_numpy(pixels[top : top + height, left : left + width].transpose(2, 0, 1)[None])
    size = out.shape[2:]
    if (height, width) == size:
        out.copy_(image)
    else:
        _RESIZE[resample](image, size, False, None, None, out=out)


def cut(pixels: Pixels, box: Box, size: tuple[int, int], resample: str = "bicubic") -> Tensor:
    """What `cut_into` does, into new memory. [C, height, width], uint8"""
    out = torch.empty((1, pixels.shape[2], *size), dtype=torch.uint8, memory_format=torch.channels_last)
    cut_into(out, pixels, box, resample)
    return out[0]


def shrink(pixels: Pixels, side: int) -> Pixels:
    """An image with its short side at `side` pixels; one that is no larger stays as it is. [H, W, C]"""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= side:
        return pixels
    size = (round(height * side / short), round(width * side / short))
    return cut(pixels, (0, 0, height, width), size).permute(1, 2, 0).numpy()


def resize_and_center(pixels: Pixels, resize: int, crop: int) -> Tensor:
    """The evaluation's view: the short side to `resize` pixels, then the square in the middle. [C, crop, crop], uint8

    Source: torchvision Resize and CenterCrop, as facebookresearch/dino@7c446df eval_knn.py uses them.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    # Of a very long image all but the middle would be thrown away: it is cut off first, far outside what is kept.
    if max(height, width) > _LONG * short:
        top, left = max(0, (height - _LONG * short) // 2), max(0, (width - _LONG * short) // 2)
        pixels = pixels[top : top + _LONG * short, left : left + _LONG * short]
        height, width = pixels.shape[:2]
    size = (resize * height // short, resize * width // short)
    image = cut(pixels, (0, 0, height, width), size)
    top, left = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    return image[:, top : top + crop, left : left + crop]

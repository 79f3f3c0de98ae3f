"""Worker side: draw every number of an image's views, and cut its crops out of one decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from dinocli.config import Config
from dinocli.data.decode import Pixels

Probability = Field(ge=0, le=1)
_LONG = 8  # times as long as wide, beyond which an image is cut before it is resized
Floats = NDArray[np.float64]
_RESIZE = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa.out, "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out}


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


class ViewsConfig(Config):
    """The views of an image.

    Attributes:
        mean: Of the three channels, in 0 to 1.
        std: Of the three channels.
        global_1: The first global view.
        global_2: The second; a loss between views wants it, a classifier does not.
        local: The local views, all alike; absent, there are none.
        locals: How many local views.
    """

    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    global_1: ViewConfig
    global_2: ViewConfig | None = None
    local: ViewConfig | None = None
    locals: int = Field(0, ge=0)

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
BOX, _REST = 22, 14
NUMBERS = BOX + _REST


def uniforms(seed: int, epoch: int, index: int, views: int) -> tuple[Floats, np.random.Generator]:
    """The numbers in [0, 1) that make an image's views, and the generator they came from. [V, NUMBERS]

    They depend on nothing else than the arguments: not on the number of workers or processes, nor on a resume.
    """
    generator = np.random.default_rng((seed, epoch, index))
    return generator.random((views, NUMBERS)), generator


def crop_boxes(numbers: Floats, height: int, width: int, scale: Floats) -> NDArray[np.int64]:
    """Where each view is cut: areas uniform in `scale`, ratios log-uniform in 3/4 to 4/3, ten tries.

    Args:
        numbers: Uniform in [0, 1). [V, 22]
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        scale: Smallest and largest area, as a fraction of the image's. [V, 2]

    Returns:
        Top, left, height, width. [V, 4]

    Source: torchvision RandomResizedCrop.get_params.
    """
    tries = numbers[:, :20].reshape(-1, 10, 2)
    area = height * width * (scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * tries[..., 0])  # [V, 10]
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * tries[..., 1])  # [V, 10]
    w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]  # [V]
    top, left = np.floor(numbers[:, 20] * (height - h + 1)), np.floor(numbers[:, 21] * (width - w + 1))
    # No try fits in a very long image: then its middle is taken, as long as the ratio allows.
    middle_w = min(width, max(1, round(height * 4 / 3)))
    middle_h = min(height, max(1, round(width / (3 / 4))))
    middle = [(height - middle_h) // 2, (width - middle_w) // 2, middle_h, middle_w]
    boxes = np.stack([top, left, h, w], 1).astype(np.int64)
    return np.where(fits.any(1)[:, None], boxes, np.array(middle, dtype=np.int64))


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


def cut_into(out: Tensor, image: Tensor, box: Sequence[int], resample: str = "bicubic") -> None:
    """Cut a box out of an image and resize it with antialiasing.

    Args:
        out: Takes the crop, within 2 levels of what Pillow makes of the same box. [1, 3, height, width], uint8
        image: [1, 3, H, W], uint8
        box: Top, left, height, width.
        resample: `bicubic` or `bilinear`.
    """
    top, left, height, width = box
    image = image[:, :, top : top + height, left : left + width]
    if image.shape == out.shape:
        out.copy_(image)
        return
    # What `F.interpolate(antialias=True)` calls, with a place for the result: no second copy of each crop. uint8 with
    # the channels last in memory, as decoders give them, is what torch has its fast kernel for.
    _RESIZE[resample](image, out.shape[2:], False, None, None, out=out)


def cut(pixels: Pixels, box: Sequence[int], size: tuple[int, int], resample: str = "bicubic") -> Tensor:
    """What `cut_into` does, of pixels [H, W, 3] and into new memory. [3, height, width], uint8"""
    out = torch.empty((1, 3, *size), dtype=torch.uint8, memory_format=torch.channels_last)
    cut_into(out, torch.from_numpy(pixels).permute(2, 0, 1)[None], box, resample)
    return out[0]


def shrink(pixels: Pixels, side: int) -> Pixels:
    """An image with its short side at `side` pixels; one that is no larger stays as it is. [H, W, 3]"""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= side:
        return pixels
    size = (round(height * side / short), round(width * side / short))
    return cut(pixels, (0, 0, height, width), size).permute(1, 2, 0).numpy()


def resize_and_center(pixels: Pixels, resize: int, crop: int) -> Tensor:
    """The evaluation's view: the short side to `resize` pixels, then the square in the middle. [3, crop, crop], uint8

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

"""Worker side of augmentation: random draws for an image's views, and crops from a single decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from dinocli.core.config import Config
from dinocli.data.decode.pixels import Pixels
from dinocli.data.views.masking import MaskConfig

Probability = Field(ge=0, le=1)
Spread = Annotated[float, Field(ge=1e-6)]  # a thousandth of a grey level is 4e-6; pixels are divided by it in float32
_LONG = 8  # ratio of long to short side above which an image is cut before it is resized
Floats = NDArray[np.float64]
# Kernels behind `F.interpolate(antialias=True)`, which itself takes no `out` argument.
_RESIZE: dict[str, Any] = {
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
}


class JitterConfig(Config):
    """Color jitter: four operations in random order, each by a factor drawn around 1 (hue: around 0).

    Attributes:
        probability: Probability of any jitter at all.
        brightness: Half-width of the factor's range, like `contrast` and `saturation`.
        hue: Largest hue shift, as a fraction of the circle.
    """

    probability: float = Probability
    brightness: float = Field(ge=0, le=1)
    contrast: float = Field(ge=0, le=1)
    saturation: float = Field(ge=0, le=1)
    hue: float = Field(ge=0, le=0.5)


class ViewConfig(Config):
    """Augmentation of a view. Optional steps are off by default.

    Attributes:
        size: Side of the square crop, in pixels.
        scale: Smallest and largest area of the crop, as fractions of the image.
        flip: Probability of a horizontal flip.
        gray: Probability of conversion to grey.
        blur: Probability of a Gaussian blur, with a radius drawn between 0.1 and 2 pixels.
        solarize: Probability of inverting all values above half brightness.
        resample: Interpolation of the crop's resize, always antialiased.
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
            raise ValueError("expected two fractions of the area, the smaller first")
        return scale


class LowResolutionConfig(Config):
    """Smaller crops at the start of a run: the same parts of the images in fewer pixels, for less compute.

    Attributes:
        epochs: Number of epochs with smaller crops, from the first.
        global_size: Side of the smaller global crops, in pixels.
        local_size: Side of the smaller local crops, in pixels. If None, local crops keep their size.

    Source: FastDINOv2 (arXiv 2507.03779), which trains three quarters of the epochs at half the side.
    """

    epochs: int = Field(ge=1)
    global_size: int = Field(ge=8, le=4096)
    local_size: int | None = Field(None, ge=8, le=4096)


class MixedSizesConfig(Config):
    """Crop sizes of some steps of a run.

    Attributes:
        global_size: Side of the global crops, in pixels.
        local_size: Side of the local crops, in pixels. If None, local crops keep their size.
        share: Share of the steps with these sizes, relative to the shares of other sizes.
    """

    global_size: int = Field(ge=8, le=4096)
    local_size: int | None = Field(None, ge=8, le=4096)
    share: float = Field(gt=0)


@dataclass(frozen=True)
class SizeDraw:
    """Draw of the crop sizes of each step. It depends on seed and step alone, so all processes draw the same.

    Attributes:
        seed: Seed of the run, so that all processes draw the same sizes.
        shares: Probability of each size; they sum to 1.
    """

    seed: int
    shares: tuple[float, ...]

    def __call__(self, step: int) -> int:
        """Return the index of the sizes of a step."""
        return int(np.random.default_rng((self.seed, step, _SIZES)).choice(len(self.shares), p=self.shares))


# No image has this number, so the draw shares no random numbers with the views of an image.
_SIZES = 2**63 - 3


class ViewsConfig(Config):
    """Views of an image.

    Attributes:
        mean: Mean of each channel, in [0, 1]. Its length is the number of channels.
        std: Standard deviation of each channel, in the same units.
        global_2: Second global view. A loss between views needs it; a classifier does not.
        local: Augmentation of every local view. If None, there are none.
        locals: Number of local views.
        mask: Masking of the student's global views. If None, nothing is masked.
        low_resolution: Smaller crops in the first epochs. If None, all epochs use the same sizes.
        mixed: Crop sizes that are drawn anew for each step, instead of those of the views. If empty, sizes stay.
        fixed: Number of epochs with views of their own; later epochs repeat these views in turn. If None, every epoch
            draws new views.
    """

    mean: tuple[float, ...]
    std: tuple[Spread, ...]
    global_1: ViewConfig
    global_2: ViewConfig | None = None
    local: ViewConfig | None = None
    locals: int = Field(0, ge=0)
    mask: MaskConfig | None = None
    low_resolution: LowResolutionConfig | None = None
    mixed: tuple[MixedSizesConfig, ...] = ()
    fixed: int | None = Field(None, ge=1)

    def phases(self, steps_per_epoch: int) -> list[tuple[int, ViewsConfig]]:
        """Return pairs of first step and views: one phase, or low resolution followed by full size.

        Both phases cut an image at the same places, with the same changes of color.
        """
        low = self.low_resolution
        if low is None:
            return [(0, self)]
        full = self.model_copy(update={"low_resolution": None})
        return [(0, full._resized(low.global_size, low.local_size)), (low.epochs * steps_per_epoch, full)]

    @property
    def mixes(self) -> list[tuple[float, ViewsConfig]]:
        """Pairs of share and views, for sizes that are drawn for each step; the shares sum to 1. Else empty."""
        plain, total = self.model_copy(update={"mixed": ()}), sum(each.share for each in self.mixed)
        return [(each.share / total, plain._resized(each.global_size, each.local_size)) for each in self.mixed]

    @property
    def variants(self) -> list[ViewsConfig]:
        """Views of each size that a run uses."""
        return [those for _, those in self.mixes or self.phases(1)]

    def _resized(self, global_size: int, local_size: int | None) -> ViewsConfig:
        sizes = {"global_1": global_size, "global_2": global_size, "local": local_size}
        views = ((name, getattr(self, name), size) for name, size in sizes.items())
        return self.model_copy(
            update={name: view.model_copy(update={"size": size}) for name, view, size in views if view and size}
        )

    def clean_size(self, scale: float) -> int:
        """Return the side of clean crops that are `scale` times as large as the global crops, in pixels."""
        return round(scale * self.global_1.size)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    @property
    def color_keys(self) -> list[str]:
        """Keys below `views.` that request color operations, which need three channels."""
        views = {"global_1": self.global_1, "global_2": self.global_2, "local": self.local}
        keys = []
        for name, view in views.items():
            jitter = view.jitter if view else None
            keys += [f"{name}.jitter.{key}" for key in ("saturation", "hue") if jitter and getattr(jitter, key)]
            keys += [f"{name}.gray"] if view and view.gray else []
        return keys

    @property
    def globals(self) -> list[ViewConfig]:
        """Global views in order."""
        return [view for view in (self.global_1, self.global_2) if view]

    @property
    def all(self) -> list[ViewConfig]:
        """All views in order, global ones first."""
        return self.globals + ([self.local] * self.locals if self.local else [])


class Draws(NamedTuple):
    """Random draws of V views of B images for the batch side. Skipped operations have identity values.

    Its fields are also the names of arrays in a slot of the loader.

    Attributes:
        flip: True for a horizontal flip. [V, B], bool
        factors: Factors of brightness, contrast, saturation and hue. [V, B, 4]
        order: Indices of the four operations, in order. [V, B, 4], uint8
        gray: True for conversion to grey. [V, B], bool
        radius: Blur radius in pixels; 0 for none. [V, B]
        solarize: True for solarization. [V, B], bool
    """

    flip: Tensor
    factors: Tensor
    order: Tensor
    gray: Tensor
    radius: Tensor
    solarize: Tensor

    def flips_only(self, views: int) -> Draws:
        """Return the draws of the first `views` views with every operation but the flip at its identity."""
        first = Draws(*(values[:views] for values in self))
        return first._replace(
            factors=first.factors.new_tensor([1.0, 1.0, 1.0, 0.0]).expand_as(first.factors),
            gray=torch.zeros_like(first.gray),
            radius=torch.zeros_like(first.radius),
            solarize=torch.zeros_like(first.solarize),
        )


# Numbers per view from its image's generator: 10 tries of (area, ratio), (top, left), flip, jitter or not, 4 factors, 4
# that are ranked into an order, gray, blur or not, radius, solarize. All are drawn even if a recipe disables some, so
# that disabling one operation changes no other.
_TRIES, _REST = 10, 14
BOX = 2 * _TRIES + 2
NUMBERS = BOX + _REST

Box = tuple[int, int, int, int]  # top, left, height, width


class Tries(NamedTuple):
    """Random part of a view's crop box, independent of the image's size.

    Attributes:
        areas: Areas as fractions of the image. The first try that fits is used.
        ratios: Width divided by height.
        corner: Position down and to the right within the free room, in [0, 1).
    """

    areas: list[float]
    ratios: list[float]
    corner: list[float]


def uniforms(seed: int, epoch: int, index: int, views: int) -> tuple[Floats, np.random.Generator]:
    """Draw the numbers in [0, 1) for an image's views; return them and their generator. [V, NUMBERS]

    They depend only on the arguments, not on the number of workers or processes, nor on a resume.
    """
    generator = np.random.default_rng((seed, epoch, index))
    return generator.random((views, NUMBERS)), generator


def partner_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator for the frame that shares a sample with an image's own. It repeats no other draw."""
    return np.random.default_rng((seed, epoch, index, _PARTNER))


# The masks of an image's views come from generators that end in 1 plus the index of the view.
_PARTNER = 2**63 - 5


def crop_tries(numbers: Floats, scale: Floats) -> list[list[Tries]]:
    """Compute the size-independent part of the crop boxes of many images at once.

    Args:
        numbers: Uniform numbers in [0, 1). [B, V, NUMBERS]
        scale: Smallest and largest area of each view, as fractions of the image. [V, 2]

    Returns:
        Tries of each view of each image. [B][V]
    """
    uniform = numbers[..., : 2 * _TRIES].reshape(*numbers.shape[:2], _TRIES, 2)
    areas = scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * uniform[..., 0]  # [B, V, tries]
    ratios = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * uniform[..., 1])  # [B, V, tries]
    corners = numbers[..., 2 * _TRIES : BOX]
    images = zip(areas.tolist(), ratios.tolist(), corners.tolist(), strict=True)
    return [[Tries(*view) for view in zip(*image, strict=True)] for image in images]


def crop_boxes(tries: Sequence[Tries], height: int, width: int) -> list[Box]:
    """Return the crop box of each view: areas uniform in `scale`, ratios log-uniform in 3/4 to 4/3, ten tries.

    Plain numbers are faster than arrays here: the first or second try mostly fits, and arrays of ten take longer.

    Args:
        tries: Tries of each view.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        Top, left, height and width of each crop.

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
    # No try fits into a very long image. Use its center, as long as the ratio allows.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width / (3 / 4))))
    return (height - h) // 2, (width - w) // 2, h, w


def draws(numbers: Floats, views: Sequence[ViewConfig]) -> Draws:
    """Convert uniform numbers to the draws that the batch side applies to each view.

    Args:
        numbers: Uniform numbers in [0, 1). [B, V, NUMBERS]
        views: Augmentation of each of the V views.
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
        out: Crop to fill, within 2 levels of a resize in float64. Pillow is as close up to version 12. Version 13.0
            rounds differently, by up to 22 levels at sharp edges of photos. [1, C, height, width], uint8
        pixels: Image. [H, W, C]
        box: Top, left, height and width of the cut.
        resample: `bicubic` or `bilinear`.
    """
    top, left, height, width = box
    # torch's fast kernel needs uint8 with the channels last in memory, as decoders return it. numpy cuts in a third of
    # torch's time.
    image = torch.from_numpy(pixels[top : top + height, left : left + width].transpose(2, 0, 1)[None])
    size = out.shape[2:]
    if (height, width) == size:
        out.copy_(image)
    else:
        _RESIZE[resample](image, size, False, None, None, out=out)


def cut(pixels: Pixels, box: Box, size: tuple[int, int], resample: str = "bicubic") -> Tensor:
    """Cut and resize as `cut_into` does, into new memory. [C, height, width], uint8"""
    out = torch.empty((1, pixels.shape[2], *size), dtype=torch.uint8, memory_format=torch.channels_last)
    cut_into(out, pixels, box, resample)
    return out[0]


def shrink(pixels: Pixels, side: int) -> Pixels:
    """Downscale an image to a short side of `side` pixels; smaller ones stay unchanged. [H, W, C]"""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= side:
        return pixels
    size = (round(height * side / short), round(width * side / short))
    return cut(pixels, (0, 0, height, width), size).permute(1, 2, 0).numpy()


def resize_and_center(pixels: Pixels, resize: int, crop: int) -> Tensor:
    """Make the evaluation view: short side to `resize` pixels, then center crop. [C, crop, crop], uint8

    Source: torchvision Resize and CenterCrop, as facebookresearch/dino@7c446df eval_knn.py uses them.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    # Cut off the ends of a very long image before the resize. They are far outside the center crop.
    if max(height, width) > _LONG * short:
        top, left = max(0, (height - _LONG * short) // 2), max(0, (width - _LONG * short) // 2)
        pixels = pixels[top : top + _LONG * short, left : left + _LONG * short]
        height, width = pixels.shape[:2]
    size = (resize * height // short, resize * width // short)
    image = cut(pixels, (0, 0, height, width), size)
    top, left = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    return image[:, top : top + crop, left : left + crop]


def resize_for(size: int) -> int:
    """Return the short side to resize to before a crop of `size`: 256 for 224, and in this proportion for others."""
    return round(size * 256 / 224)

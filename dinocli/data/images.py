"""Image settings of a preset: limits of accepted files, and conversion of deep images to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator

from dinocli.core.config import Config, change
from dinocli.core.errors import DinoError

Range = tuple[float, float]
Window = Range | tuple[Range, ...] | None


class ImagesConfig(Config):
    """Limits of accepted images, and conversion of deep ones to 8 bits.

    Attributes:
        channels: Number of channels. 3 converts colors and greys to RGB, 1 to grey. For any other number, files must
            have exactly as many.
        reduce_above: Megapixels above which a JPEG is decoded at 1/2, 1/4 or 1/8 size, if that enlarges no crop.
        max_megapixels: Largest accepted image. Larger ones are mistakes or attacks.
        max_aspect: Largest accepted ratio of the long side to the short side.
        min_side: Smallest accepted side in pixels; refuses one-pixel images.
        max_megabytes: Largest accepted file.
        truncated: Accept files that end early, with the missing part grey, instead of refusing them.
        pages: Images of a TIFF or DICOM of several pages: the first, all, or one with the pages as its channels.
        every: Seconds between the frames of a video that are read as images. If None, videos are not read.
        pair_within: Longest time in seconds between the two frames of a video from which the two global views are cut
            in training. If None, both are cut from the same frame.
        tile: Side in pixels of the tiles of slides and pyramidal TIFFs. If None, slides are not read.
        level: Level of the pyramid that is cut into tiles; 0 is the largest.
        key: Name of the array in HDF5 and NPZ files whose rows are images. If empty, these files are not read.
        window: Values of 16-, 32-bit and float images that become black and white, or one pair per channel. If None,
            the bit depth decides.
    """

    channels: int = Field(3, ge=1, le=32)
    reduce_above: float = Field(2.0, ge=0)
    max_megapixels: float = Field(150.0, gt=0)
    max_aspect: float = Field(100.0, ge=1)
    min_side: int = Field(2, ge=1)
    max_megabytes: float = Field(500.0, gt=0)
    truncated: bool = False
    pages: Literal["first", "all", "channels"] = "first"
    every: float | None = Field(None, gt=0)
    pair_within: float | None = Field(None, gt=0)
    tile: int | None = Field(None, ge=8)
    level: int = Field(0, ge=0)
    key: str = ""
    window: Window = None

    @field_validator("window")
    @classmethod
    def _is_a_range(cls, window: Window, info: ValidationInfo) -> Window:
        pairs = [] if window is None else np.reshape(window, (-1, 2)).tolist()
        if not all(low < high for low, high in pairs):
            raise ValueError("expected two values, the smaller first")
        if window and isinstance(window[0], tuple) and len(window) != info.data.get("channels"):
            raise ValueError("expected two values, or as many pairs as images.channels")
        return window

    @field_validator("pair_within")
    @classmethod
    def _reaches_another_frame(cls, within: float | None, info: ValidationInfo) -> float | None:
        if within is None or "every" not in info.data:  # an error of images.every is reported instead
            return within
        every = info.data["every"]
        if every is None:
            raise ValueError(f"without images.every, videos are not read; it needs images.every={within:g}")
        if within < every:
            raise ValueError(
                f"images.every={every:g} reads no two frames within {within:g} seconds; it needs "
                f"images.pair_within={every:g}"
            )
        return within

    @property
    def unpaired(self) -> ImagesConfig:
        """Settings for reading images one by one, as all commands except training do."""
        return self.model_copy(update={"pair_within": None})

    @property
    def windows(self) -> NDArray[np.float64] | None:
        """Values that become black and white in each channel. [C, 2]"""
        return None if self.window is None else np.broadcast_to(np.array(self.window, float), (self.channels, 2))

    def changed(self, overrides: Iterable[str], *, for_training: bool = False) -> ImagesConfig:
        """Return a copy with single values changed.

        Args:
            overrides: Assignments `images.key=value`, as in `--set`.
            for_training: True if the images will be trained on. Only then may `images.pair_within` be set.

        Raises:
            DinoError: If a key does not begin with `images.`, a value is not valid, or the key has no effect.
        """
        data: dict[str, Any] = {"images": self.model_dump(mode="json", exclude_none=True)}
        for override in overrides:
            if not override.strip().startswith("images."):
                raise DinoError(
                    f"--set {override} has no effect here; expected images.KEY=VALUE", "--set images.window='[0, 4095]'"
                )
            change(data, override)
        found = ImagesConfig.parse(data["images"], "--set images")
        if found.pair_within is not None and not for_training:
            raise DinoError(
                f"--set images.pair_within={found.pair_within:g} has no effect here: only training cuts pairs of views",
                "remove it",
            )
        return found


DEFAULTS = ImagesConfig()


def megabytes_over(size: int, limit: float) -> str:
    """Describe a size over its limit, with enough digits to differ from it: `0.0104 megabytes, over 0.01`.

    Args:
        size: Size in bytes, larger than the limit.
        limit: Limit in megabytes.
    """
    exact = size / 1e6
    rounded = (f"{exact:.{digits}f}" for digits in range(7))
    shown = next((text for text in rounded if limit < float(text) and abs(float(text) - exact) < 0.05 * exact), exact)
    return f"{shown} megabytes, over {limit:g}"

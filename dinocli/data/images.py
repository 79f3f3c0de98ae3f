"""Images: which files are taken for such, and how deep ones become 8 bits, as a preset has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator

from dinocli.config import Config, change
from dinocli.errors import DinoError

Range = tuple[float, float]
Window = Range | tuple[Range, ...] | None


class ImagesConfig(Config):
    """Which images are taken, and how deep ones become 8 bits.

    Attributes:
        channels: Of every image. At 3 all that has colors or greys becomes RGB, at 1 grey; at any other number a file
            has to have so many.
        reduce_above: Megapixels from which a JPEG is decoded smaller, by 2, 4 or 8, where no crop is enlarged by that.
        max_megapixels: Larger are refused: they are mistakes or attacks.
        max_aspect: Times as long as wide; longer are refused.
        min_side: In pixels; refuses one-pixel images.
        max_megabytes: Of the file.
        truncated: Take files that end early, the missing part grey, instead of refusing them.
        window: Values of 16-, 32-bit and float images that become black and white, or a pair of them a channel;
            absent: by bit depth.
    """

    channels: int = Field(3, ge=1, le=32)
    reduce_above: float = Field(2.0, ge=0)
    max_megapixels: float = Field(150.0, gt=0)
    max_aspect: float = Field(100.0, ge=1)
    min_side: int = Field(2, ge=1)
    max_megabytes: float = Field(500.0, gt=0)
    truncated: bool = False
    window: Window = None

    @field_validator("window")
    @classmethod
    def _is_a_range(cls, window: Window, info: ValidationInfo) -> Window:
        pairs = [] if window is None else np.reshape(window, (-1, 2)).tolist()
        if not all(low < high for low, high in pairs):
            raise ValueError("two values were wanted, the smaller first")
        if window and isinstance(window[0], tuple) and len(window) != info.data.get("channels"):
            raise ValueError("two values were wanted, or as many pairs as images.channels")
        return window

    @property
    def windows(self) -> NDArray[np.float64] | None:
        """What becomes black and white in each channel. [C, 2]"""
        return None if self.window is None else np.broadcast_to(np.array(self.window, float), (self.channels, 2))

    def changed(self, overrides: Iterable[str]) -> ImagesConfig:
        """The same with single values changed.

        Args:
            overrides: `images.key=value`, as `--set` has them.

        Raises:
            DinoError: One is not of `images`, or not valid.
        """
        data: dict[str, Any] = {"images": self.model_dump(mode="json", exclude_none=True)}
        for override in overrides:
            if not override.strip().startswith("images."):
                raise DinoError(
                    f"--set {override} has no effect here; expected images.KEY=VALUE", "--set images.window='[0, 4095]'"
                )
            change(data, override)
        return ImagesConfig.parse(data["images"], "--set images")


DEFAULTS = ImagesConfig()

"""Released weights in the form that the rest of the package reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dinocli.features.encoder import Channels
from dinocli.models.architecture import BackboneConfig

IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rename(key: str, rules: Sequence[tuple[str, str]]) -> str:
    """Apply all replacements of regular expressions to a key, in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


class Preprocessing(NamedTuple):
    """Images that weights expect.

    Attributes:
        size: Side of the images, in pixels.
        mean: Mean of each channel in the training data, from 0 to 1.
        std: Standard deviation of each channel in the training data.
    """

    size: int
    mean: Channels
    std: Channels


@dataclass(frozen=True)
class Released:
    """Contents of a file or folder of released weights.

    Attributes:
        backbone: Backbone weights under timm's keys.
        architecture: Architecture that these weights fit.
        preprocessing: Images that the weights expect.
        mask_token: Token that replaces masked patches, if the weights include one. [1, D]
        notes: Assumptions for the user to check.
    """

    backbone: dict[str, Tensor]
    architecture: BackboneConfig
    preprocessing: Preprocessing
    mask_token: Tensor | None = None
    notes: tuple[str, ...] = ()

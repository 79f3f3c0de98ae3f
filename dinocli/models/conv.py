"""Convolutional networks of timm as backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.models.backbone import Backbone, Facet, MaskedPatches, Tokens


class ConvBackbone(Backbone):
    """Convolutional timm network: its patches are the positions of its map, its class token is their average."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.num_features)
        self.patch_size = int(model.feature_info[-1]["reduction"])

    def last_tokens(self, images: Tensor, last: int, masked: MaskedPatches | None = None) -> list[Tokens]:
        if masked is not None:
            raise DinoError(
                "views.mask needs a vision transformer; a convolutional network has no patches to mask",
                "--set views.mask=none",
            )
        if last != 1:
            raise DinoError(
                f"--blocks {last} is not supported: a convolutional network gives only its output", "--blocks 1"
            )
        features = self.model.forward_features(images)  # [B, D, h, w]
        if features.ndim != 4 or features.shape[1] != self.width:
            raise DinoError(
                f"{type(self.model).__name__} returns {'x'.join(map(str, features.shape))} values; expected a map of "
                f"{self.width} channels",
                "use one such as resnet50",
            )
        patches = features.flatten(2).transpose(1, 2)  # [B, N, D]
        return [Tokens(patches.mean(1), patches[:, :0], patches, (features.shape[-2], features.shape[-1]))]

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        if tuple(layers) != (-1,) or facet != "token":
            raise DinoError(
                "a convolutional network gives only its output: no other layer, and no query, key or value",
                "--layer -1 --facet token",
            )
        (tokens,) = self.last_tokens(images, 1)
        return tokens.patches.unflatten(1, tokens.grid)

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        raise DinoError(
            "attention maps need a vision transformer; this backbone is a convolutional network",
            "use a checkpoint of a ViT preset such as vits16",
        )

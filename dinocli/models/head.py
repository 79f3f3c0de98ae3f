"""Heads: the projection head, an MLP with a bottleneck and mostly prototypes, and a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.config import Config
from dinocli.core.errors import DinoError


class HeadConfig(Config):
    """Shape of a head.

    Attributes:
        prototypes: Number of outputs K. If None, the head ends in the bottleneck at unit length.
        hidden: Width of the MLP's hidden layers.
        bottleneck: Width of the features that are compared with the prototypes.
        layers: Number of linear layers in the MLP, including the one into the bottleneck.
        batch_norm: BatchNorm before each GELU.
        norm_last_layer: If True, the prototypes' norms stay 1, so that logits are cosines. This is more stable; False
            can score higher. None without prototypes.
        weight_norm: If True, direction and length of each prototype are separate parameters. If False, the prototypes
            are a plain linear layer, as in DINOv3.
        freeze_last_layer_epochs: Number of initial epochs in which the student's prototypes do not move.
    """

    prototypes: int | None = Field(None, ge=2)
    hidden: int = Field(ge=1)
    bottleneck: int = Field(ge=1)
    layers: int = Field(ge=1)
    batch_norm: bool = False
    norm_last_layer: bool | None = None
    weight_norm: bool = True
    freeze_last_layer_epochs: int = Field(0, ge=0)

    @property
    def outputs(self) -> int:
        """Number of outputs: prototypes, or the width of the bottleneck."""
        return self.prototypes or self.bottleneck

    def build(self, width: int) -> Head:
        """Build a head with fresh weights for features of size `width`."""
        return Head(self, width)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> tuple[HeadConfig, int]:
        """Infer the shape of a head, and the width of its input, from weights under the original's keys.

        Raises:
            DinoError: If the weights are not those of a DINO head.
        """
        linears = [value for key, value in weights.items() if key.startswith("mlp") and value.ndim == 2]
        if not linears or "last_layer.weight_v" not in weights:
            raise DinoError(
                f"a head has the keys {', '.join(list(weights)[:3])}; expected mlp and last_layer.weight_v",
                "remove the head",
            )
        prototypes, bottleneck = weights["last_layer.weight_v"].shape
        first = weights.get("mlp.0.weight", linears[0])
        config = cls(
            prototypes=prototypes,
            hidden=first.shape[0],
            bottleneck=bottleneck,
            layers=len(linears),
            batch_norm=any(key.endswith("running_mean") for key in weights),
            norm_last_layer=True,
        )
        return config, first.shape[1]


class Head(nn.Module):
    """Head from features [S, D] to logits [S, K], or to the bottleneck at unit length if it has no prototypes.

    The keys of its weights are the original's (`mlp.0.weight`, `last_layer.weight_v`).

    Source: facebookresearch/dino@7c446df vision_transformer.py, DINOHead.
    """

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        self.freeze_last_layer_epochs = config.freeze_last_layer_epochs
        widths = [width, *[config.hidden] * (config.layers - 1), config.bottleneck]
        layers: list[nn.Module] = []
        for i in range(config.layers):
            linear = nn.Linear(widths[i], widths[i + 1])
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if i < config.layers - 1:
                layers += [nn.BatchNorm1d(config.hidden)] if config.batch_norm else []
                layers.append(nn.GELU())
        # The original's one-layer head is a plain Linear, without the index that Sequential adds to its keys.
        self.mlp = nn.Sequential(*layers) if config.layers > 1 else layers[0]
        self.outputs = config.outputs
        self.last_layer: nn.Module
        if config.prototypes is None:
            self.last_layer = nn.Identity()
        elif config.weight_norm:
            self.last_layer = Prototypes(config.bottleneck, config.prototypes, train_norm=not config.norm_last_layer)
        else:
            self.last_layer = nn.Linear(config.bottleneck, config.prototypes, bias=False)
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(self.squeezed(features))  # [S, outputs]

    def squeezed(self, features: Tensor) -> Tensor:
        """Return the bottleneck features at unit length, to compare with the prototypes. [S, bottleneck]"""
        return F.normalize(self.mlp(features), dim=-1)


class ClassifierHead(nn.Module):
    """Linear classifier from features [S, D] to logits [S, classes]. It starts at zero: all classes equally likely."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.outputs = classes
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits


class Prototypes(nn.Module):
    """K directions with lengths that may be learned: logits are `length * cosine` of normalized input."""

    def __init__(self, width: int, prototypes: int, *, train_norm: bool) -> None:
        super().__init__()
        # The default of nn.Linear: in the original, the initialization of the other layers does not reach this one.
        self.weight_v = nn.Parameter(torch.empty(prototypes, width).uniform_(-(width**-0.5), width**-0.5))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=train_norm)

    def forward(self, features: Tensor) -> Tensor:
        # One fused kernel: the backward of normalize and multiply takes four times as long at K = 65,536.
        return F.linear(features, torch._weight_norm(self.weight_v, self.weight_g, 0))

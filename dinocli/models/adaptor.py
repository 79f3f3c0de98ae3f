"""Adaptor: a small network from a student's tokens to the width of a teacher's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from dinocli.core.config import Config


class LinearAdaptorConfig(Config):
    """A single linear layer."""

    kind: Literal["linear"]

    def build(self, width: int, out: int) -> nn.Sequential:
        """Build the adaptor from `width` to `out` numbers per token, with fresh weights."""
        return _start(nn.Sequential(nn.Linear(width, out)))


class MLPAdaptorConfig(Config):
    """Linear layers with LayerNorm and GELU before each but the first.

    Attributes:
        hidden: Width between the layers.
        layers: Number of linear layers.

    Source: the form of RADIO's heads (arXiv 2312.06709), without their residual connections.
    """

    kind: Literal["mlp"]
    hidden: int = Field(ge=1)
    layers: int = Field(ge=2)

    def build(self, width: int, out: int) -> nn.Sequential:
        """Build the adaptor from `width` to `out` numbers per token, with fresh weights."""
        modules: list[nn.Module] = [nn.Linear(width, self.hidden)]
        for i in range(1, self.layers):
            last = i == self.layers - 1
            modules += [nn.LayerNorm(self.hidden), nn.GELU(), nn.Linear(self.hidden, out if last else self.hidden)]
        return _start(nn.Sequential(*modules))


AdaptorConfig = Annotated[LinearAdaptorConfig | MLPAdaptorConfig, Field(discriminator="kind")]


def _start(adaptor: nn.Sequential) -> nn.Sequential:
    for module in adaptor:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return adaptor

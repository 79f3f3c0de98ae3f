"""Choice of the backbone's trained weights: all, the last blocks, or low-rank additions (LoRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dinocli.core.config import Config
from dinocli.core.errors import DinoError
from dinocli.models.backbone import Backbone


class TrainAll(Config):
    """All weights are trained."""

    kind: Literal["all"]


class TrainLast(Config):
    """Only the last blocks and the final norm are trained.

    Attributes:
        blocks: Number of last blocks.
    """

    kind: Literal["last"]
    blocks: int = Field(ge=1)


class TrainLora(Config):
    """Only a low-rank addition to the attention's joint projection and the MLP of each block is trained.

    The moving average is of the merged weights, so that it is a plain network.

    Attributes:
        rank: Rank of each addition.
        alpha: Numerator of the factor alpha / rank on each addition. If None, the factor is 1.

    Source: arXiv 2106.09685.
    """

    kind: Literal["lora"]
    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)


Trained = Annotated[TrainAll | TrainLast | TrainLora, Field(discriminator="kind")]
ALL_WEIGHTS = TrainAll(kind="all")
# Linear layers of a block in timm's transformers: queries, keys and values, joint or apart; MLP, or gated MLP.
_ADAPTED = (
    *(f"attn.{name}" for name in ("qkv", "q_proj", "k_proj", "v_proj")),
    *(f"mlp.{name}" for name in ("fc1", "fc2", "fc1_g", "fc1_x", "w12", "w3")),
)


class LowRank(nn.Module):
    """Parametrization W + (alpha / rank) B A of a linear layer's weight W, which stays fixed.

    It changes `weight` itself and not the layer's call, because attention reads `qkv.weight` in parts. B starts at 0,
    so that the network does not change at first; A starts as in the reference implementation (microsoft/LoRA).
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float | None) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.factor = 1.0 if alpha is None else alpha / rank
        self.a = nn.Parameter(torch.empty(rank, columns, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:  # [out, in] -> [out, in]
        return torch.addmm(weight, self.b, self.a, alpha=self.factor)


def train_only(backbone: Backbone, trained: TrainAll | TrainLast | TrainLora) -> None:
    """Freeze the weights of a backbone that are not trained, in place; for LoRA, add those that are.

    Args:
        backbone: Backbone of the student, with its initial weights.
        trained: Choice of the trained weights.

    Raises:
        DinoError: If the backbone has no blocks, fewer than `last` needs, no linear layers for LoRA, or
            layers of a rank below LoRA's.
    """
    if isinstance(trained, TrainAll):
        return
    kind, blocks = type(backbone.model).__name__, backbone.blocks
    if not blocks:
        raise DinoError(
            f"backbone.learning.trained is {trained.kind!r}, which needs a transformer with blocks; {kind} has none",
            "--train all, or --set 'backbone.learning.trained={kind=\"all\"}'",
        )
    before = {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}
    backbone.requires_grad_(False)
    if isinstance(trained, TrainLast):
        if trained.blocks > len(blocks):
            raise DinoError(
                f"backbone.learning.trained.blocks is {trained.blocks}; {kind} has {len(blocks)} blocks",
                f"--set backbone.learning.trained.blocks={max(1, len(blocks) // 3)}",
            )
        first = len(blocks) - trained.blocks + 1
        for name, parameter in backbone.model.named_parameters():
            parameter.requires_grad_(name in before and backbone.level(name) >= first)
        return
    adapted = [layer for block in blocks for layer in _adapted_layers(block)]
    if not adapted:
        raise DinoError(
            f"LoRA found no linear layers attn.qkv or mlp.fc1 in the blocks of {kind}", "--train last-1, or --train all"
        )
    most = min(min(layer.weight.shape) for layer in adapted)
    if trained.rank > most:
        raise DinoError(
            f"backbone.learning.trained.rank is {trained.rank}; the layers of {kind} have a rank of at most {most}",
            f"--set backbone.learning.trained.rank={min(16, most)}",
        )
    for layer in adapted:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, trained.rank, trained.alpha))
        layer.parametrizations.weight.original.requires_grad_(False)


def _adapted_layers(block: nn.Module) -> Iterator[Any]:
    for name, layer in block.named_modules():
        if name in _ADAPTED and isinstance(layer, nn.Linear):
            yield layer


def effective_weights(network: nn.Module, like: nn.Module) -> list[Tensor]:
    """Return a network's weights, merged with any low-rank additions, in the order of another's parameters.

    Args:
        network: Network that may have low-rank additions.
        like: Network of the same architecture without any.
    """
    if not any(isinstance(module, LowRank) for module in network.modules()):
        return list(network.parameters())
    weights: list[Tensor] = []
    for name, _ in like.named_parameters():
        module, _, leaf = name.rpartition(".")
        weights.append(getattr(network.get_submodule(module), leaf))
    return weights

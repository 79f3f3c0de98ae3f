"""Probes: linear classifiers that are trained together, each at a rate of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import LinearRule, SGDConfig
from dinocli.engine.trainer import Trainer
from dinocli.schedules import Clock, Constant, Rate

_MOMENTUM = 0.9
# Numbers of weights in one product. Many small classifiers are quicker in one than one after another (ten classes: four
# times); of large ones the product takes as long, and to put them together takes time besides (a thousand: a quarter).
_AT_ONCE = 2**20


class Probes(Method):
    """A linear classifier for each rate, all on the same features; they share batches and nothing else.

    Args:
        width: D.
        classes: How many there are.
        rates: Learning rates, as shares of what the schedule says.
        seed: Of the start.
    """

    def __init__(self, width: int, classes: int, rates: Sequence[float], seed: int) -> None:
        super().__init__()
        self.rates = rates
        # Of all rates the same start, so that nothing but the rate tells them apart.
        start = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.weights = nn.ParameterList([start.clone() for _ in rates])
        self.biases = nn.ParameterList([torch.zeros(classes) for _ in rates])

    def scores(self, x: Tensor) -> Tensor:
        """Of each class, by each classifier. [B, D] -> [B, rates, classes]"""
        return torch.cat(list(self._products(x)), dim=1)

    def _products(self, x: Tensor) -> Iterator[Tensor]:
        """The scores of as many classifiers at a time as are quicker together than alone. [B, some, classes]"""
        classes, width = self.weights[0].shape
        step = max(1, _AT_ONCE // (classes * width))
        for first in range(0, len(self.rates), step):
            some = slice(first, first + step)
            weights, biases = torch.cat(list(self.weights[some])), torch.cat(list(self.biases[some]))
            yield F.linear(x, weights, biases).unflatten(1, (-1, classes))

    def forward(self, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = part
        losses: list[Tensor] = []
        for scores in self._products(x):
            each = F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(scores.shape[1]), reduction="none")
            losses += each.view(len(y), -1).mean(0).unbind()
        return {f"lr_{rate}": loss for rate, loss in zip(self.rates, losses, strict=True)}

    def param_groups(self) -> list[ParamGroup]:
        return [
            ParamGroup([w, b], decay=False, lr_scale=rate)
            for rate, w, b in zip(self.rates, self.weights, self.biases, strict=True)
        ]


def trainer(probes: Probes, schedule: Rate, clock: Clock, batch_size: int) -> Trainer:
    """SGD with momentum on batches of a size, at a rate for a batch of 256 that follows a schedule."""
    config = SGDConfig(
        kind="sgd",
        momentum=_MOMENTUM,
        lr=schedule,
        lr_rule=LinearRule(kind="linear", batch=256),
        weight_decay=Constant(kind="constant", value=0.0),
    )
    return Trainer(probes, config, clock, batch_size=batch_size)


@torch.no_grad()
def scores_of(probes: Probes, x: Tensor) -> list[NDArray[np.float32]]:
    """Of each classifier in turn, what it gives each class. [rates] times [B, classes]"""
    return [scores.cpu().numpy() for scores in probes.scores(x).unbind(1)]

"""Probes: linear classifiers that are trained together, each at a rate of its own."""

from __future__ import annotations

from collections.abc import Sequence

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
        """Of each class, by each classifier, in one product. [B, D] -> [B, rates, classes]"""
        return F.linear(x, torch.cat(list(self.weights)), torch.cat(list(self.biases))).unflatten(
            1, (len(self.rates), -1)
        )

    def forward(self, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = part
        scores = self.scores(x)
        losses = F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(len(self.rates)), reduction="none")
        return {f"lr_{rate}": loss for rate, loss in zip(self.rates, losses.view(len(y), -1).mean(0), strict=True)}

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

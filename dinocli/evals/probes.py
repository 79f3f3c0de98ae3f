"""Linear probes trained together, one per learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import LinearRule, SGDConfig
from dinocli.engine.schedules import Clock, Constant, Rate
from dinocli.engine.trainer import Trainer

_MOMENTUM = 0.9
# Largest number of weights in one matrix product. Small classifiers are faster when concatenated into one product (four
# times for ten classes). Large ones are not, and concatenation adds time (a quarter for a thousand classes).
_MAX_WEIGHTS = 2**20


class Probes(Method):
    """One linear classifier per learning rate; all are trained on the same batches.

    Args:
        width: Feature dimension D.
        classes: Number of outputs of each classifier.
        rates: Learning rates, which multiply the schedule.
        seed: Seed of the initial weights.
    """

    def __init__(self, width: int, classes: int, rates: Sequence[float], seed: int) -> None:
        super().__init__()
        self.rates = rates
        # All rates share the initial weights, so that only the rate differs.
        start = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.weights = nn.ParameterList([start.clone() for _ in rates])
        self.biases = nn.ParameterList([torch.zeros(classes) for _ in rates])

    def scores(self, x: Tensor) -> Tensor:
        """Return the class scores of each classifier. [B, D] -> [B, rates, classes]"""
        return torch.cat(list(self._score_groups(x)), dim=1)

    def _score_groups(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the class scores of one group of classifiers after another. [B, group, classes]"""
        classes, width = self.weights[0].shape
        step = max(1, _MAX_WEIGHTS // (classes * width))
        for first in range(0, len(self.rates), step):
            group = slice(first, first + step)
            weights, biases = torch.cat(list(self.weights[group])), torch.cat(list(self.biases[group]))
            yield F.linear(x, weights, biases).unflatten(1, (-1, classes))

    def forward(self, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = part
        losses: list[Tensor] = []
        for scores in self._score_groups(x):
            each = F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(scores.shape[1]), reduction="none")
            losses += each.view(len(y), -1).mean(0).unbind()
        return {f"lr_{rate}": loss for rate, loss in zip(self.rates, losses, strict=True)}

    def param_groups(self) -> list[ParamGroup]:
        return [
            ParamGroup([w, b], decay=False, lr_scale=rate)
            for rate, w, b in zip(self.rates, self.weights, self.biases, strict=True)
        ]


def trainer(probes: Probes, schedule: Rate, clock: Clock, batch_size: int) -> Trainer:
    """Return a trainer that runs SGD with momentum; the scheduled learning rate is for a batch of 256."""
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
    """Return the class scores of each classifier as arrays. [rates] times [B, classes]"""
    return [scores.cpu().numpy() for scores in probes.scores(x).unbind(1)]

"""Target rules: teacher logits to the distribution that the student is to predict."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dinocli.config import Config
from dinocli.distributed import mean_over_processes
from dinocli.schedules import Clock, Schedule


class CenteringConfig(Config):
    """Centering and sharpening.

    Attributes:
        momentum: How much of the old center a step keeps.
        temperature: Of the teacher; low values sharpen.
    """

    kind: Literal["centering"]
    momentum: float = Field(ge=0, le=1)
    temperature: Schedule

    def build(self, prototypes: int) -> Centering:
        """The rule with its center at zero."""
        return Centering(self, prototypes)


class Centering(nn.Module):
    """softmax((logits - center) / temperature), where the center is a moving average of the logits' mean.

    Centering keeps one prototype from winning everywhere, sharpening keeps all from winning equally; together they
    keep training from collapsing.

    Source: arXiv 2104.14294, section 3.1; facebookresearch/dino@7c446df main_dino.py, DINOLoss.
    """

    center: Tensor

    def __init__(self, config: CenteringConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("center", torch.zeros(prototypes))
        self._mean: Tensor | None = None

    def forward(self, logits: Tensor, clock: Clock) -> Tensor:  # [G, B, K] -> [G, B, K]
        """Targets of this step, made with the center of the steps before."""
        logits = logits.to(self.center.dtype)
        self._mean = logits.mean((0, 1))  # [K], of the raw logits
        return ((logits - self.center) / self.config.temperature.at(clock)).softmax(-1)

    def update(self) -> None:
        """Move the center by what the step saw, in all processes; once a step, when the step is done."""
        if self._mean is not None:
            self.center.lerp_(mean_over_processes(self._mean), 1 - self.config.momentum)
            self._mean = None

"""What the engine can train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dinocli.schedules import Clock


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that the optimizer treats alike.

    Attributes:
        params: The parameters.
        decay: Whether weight decay applies.
        lr_scale: Factor on the learning rate.
        frozen_epochs: Epochs at the start in which they get no gradient, and so no decay and no moments either.
    """

    params: list[nn.Parameter]
    decay: bool = True
    lr_scale: float = 1.0
    frozen_epochs: int = 0


class Method(nn.Module, ABC):
    """A way of learning: losses for a batch, parameters to move, and what else changes after a step."""

    @abstractmethod
    def forward(self, batch: Any, clock: Clock) -> dict[str, Tensor]:
        """The losses of a batch by name; their sum is what is minimized."""

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """The parameters to move."""

    def after_step(self, clock: Clock) -> None:
        """Change what no gradient reaches; called when the optimizer has moved the parameters."""

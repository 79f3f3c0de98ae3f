"""What the engine can train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        modules: For each, which module of the method it belongs to, for what bounds a module as a whole; none, where
            there is one.
    """

    params: list[nn.Parameter]
    decay: bool = True
    lr_scale: float = 1.0
    frozen_epochs: int = 0
    modules: list[str] = field(default_factory=list)


class Method(nn.Module, ABC):
    """A way of learning: losses for a batch, parameters to move, and what else changes after a step."""

    def parts(self, batch: Any, count: int, clock: Clock) -> Sequence[Any]:
        """What a step is made of: `count` parts of a batch, of the same size, whose gradients are added up.

        What must be worked out of the whole batch is worked out here. In one part a batch is itself.

        Raises:
            ValueError: The method cannot part its batches.
        """
        if count != 1:
            raise ValueError(f"{type(self).__name__} takes its batches whole; {count} parts were asked for")
        return [batch]

    @abstractmethod
    def forward(self, part: Any) -> dict[str, Tensor]:
        """The losses of a part by name; their sum is what is minimized."""

    def watch(self, parts: Sequence[Any], losses: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor | float]:
        """More figures of a step, for those that are logged; its parameters have not moved yet."""
        return {}

    def units(self) -> list[nn.Module]:
        """What may be held in shards, each gathered as a whole when it is called: inner modules before outer ones.

        Raises:
            ValueError: The method knows none.
        """
        raise ValueError(f"{type(self).__name__} does not say what of it may lie in shards")

    def lasting(self) -> list[str]:
        """Names of its modules whose weights come from outside and never change: no state needs to keep them."""
        return []

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """The parameters to move."""

    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Change what no gradient reaches; called when the optimizer has moved the parameters.

        Args:
            clock: Of the step.
            done: Whether it was done; where it was not, no parameter may change. Buffers are put back by the engine.
                [], bool
        """

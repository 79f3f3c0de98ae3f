"""Interface of the methods that the engine trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dinocli.engine.schedules import Clock


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with the same optimizer settings.

    Attributes:
        decay: If True, weight decay applies.
        lr_scale: Factor on the learning rate.
        frozen_epochs: Initial epochs without a gradient, and so without weight decay and moments too.
        modules: Module of the method for each parameter, for clipping per module. If empty, there is only one.
    """

    params: list[nn.Parameter]
    decay: bool = True
    lr_scale: float = 1.0
    frozen_epochs: int = 0
    modules: list[str] = field(default_factory=list)


class Method(nn.Module, ABC):
    """Training method: the losses of a batch, the parameters to train, and the updates after a step."""

    def parts(self, batch: Any, count: int, clock: Clock) -> Sequence[Any]:
        """Split a batch into `count` parts of the same size, whose gradients the engine accumulates.

        Compute here all that depends on the whole batch. With one part, the default returns the batch itself.

        Raises:
            ValueError: If the method cannot split its batches.
        """
        if count != 1:
            raise ValueError(f"{type(self).__name__} cannot split its batches into {count} parts")
        return [batch]

    @abstractmethod
    def forward(self, part: Any) -> dict[str, Tensor]:
        """Return the losses of a part, by name; their sum is minimized."""

    def metrics(self, parts: Sequence[Any], losses: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor | float]:
        """Return further figures of a logged step, before the optimizer moves the parameters."""
        return {}

    def units(self) -> list[nn.Module]:
        """Return the modules to shard, inner ones before outer ones; each is gathered as a whole when it is called.

        Raises:
            ValueError: If the method does not support sharding.
        """
        raise ValueError(f"{type(self).__name__} does not support sharding")

    def frozen_modules(self) -> list[str]:
        """Return the names of frozen submodules with external weights, which checkpoints omit."""
        return []

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """Return the parameters to train."""

    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Update the state that has no gradient; called after the optimizer has moved the parameters.

        Args:
            clock: Clock of the step, not yet advanced.
            done: False if the step was skipped; then no parameter may change. The engine restores buffers. It stays on
                the device: reading it makes the host wait. [], bool
        """

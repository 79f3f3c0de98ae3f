"""Interface of the methods that the engine trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
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
        frozen_epochs: Number of initial epochs in which the optimizer skips these parameters, weight decay included.
        modules: Name of each parameter's module, for clipping per module. If empty, all belong to one module.
        hidden: For each parameter, True if it is the matrix of a hidden layer, which Muon moves. If empty, none is.
    """

    params: list[nn.Parameter]
    decay: bool = True
    lr_scale: float = 1.0
    frozen_epochs: int = 0
    modules: list[str] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], find_settings: Callable[[str], tuple[str, float, int]]
) -> list[ParamGroup]:
    """Group the trained parameters by equal settings. Biases and one-dimensional parameters have no weight decay.

    Args:
        named: Parameters with their names; those that require no gradient are ignored.
        find_settings: Function from a name to module, factor on the learning rate, and frozen epochs.
    """
    groups: dict[tuple[bool, float, int], ParamGroup] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and not name.endswith(".bias")
        module, rate, frozen = find_settings(name)
        group = groups.setdefault((decay, rate, frozen), ParamGroup([], decay, rate, frozen))
        group.params.append(parameter)
        group.modules.append(module)
        group.hidden.append(parameter.ndim == 2 and "last_layer" not in name)
    return list(groups.values())


class Method(nn.Module, ABC):
    """Training method: the losses of a batch, the parameters to train, and the updates after a step."""

    def prepare(self, batch: Any) -> Any:
        """Return a batch with everything that the step reads from the host: tensors on the device from here on.

        Called once per step, before `parts`. The default returns the batch as it is.
        """
        return batch

    def parts(self, batch: Any, count: int, clock: Clock) -> Sequence[Any]:
        """Split a prepared batch into `count` parts of the same size, whose gradients the engine accumulates.

        Whatever depends on the whole batch must be computed here. The default supports only one part, the batch itself.

        Raises:
            ValueError: If the method cannot split its batches.
        """
        if count != 1:
            raise ValueError(f"{type(self).__name__} cannot split its batches into {count} parts")
        return [batch]

    def form(self, clock: Clock) -> Hashable:
        """Return what of the clock changes the operators of a step, apart from frozen parameters; None if nothing."""
        return None

    def before_step(self, clock: Clock) -> None:
        """Update the state that depends on the step's number alone; called before anything else of the step.

        A step that is skipped later keeps these changes.
        """

    @abstractmethod
    def forward(self, part: Any) -> dict[str, Tensor]:
        """Return the losses of a part, by name; their sum is minimized."""

    def metrics(self, parts: Sequence[Any], losses: Mapping[str, Tensor], clock: Clock) -> dict[str, Tensor | float]:
        """Return additional metrics of a logged step; called before the optimizer's step."""
        return {}

    def units(self) -> list[nn.Module]:
        """Return the modules to shard, inner ones before outer ones; each is gathered when it is called.

        Raises:
            ValueError: If the method does not support sharding.
        """
        raise ValueError(f"{type(self).__name__} does not support sharding")

    def frozen_modules(self) -> list[str]:
        """Return the names of frozen submodules, which checkpoints omit because their weights come from elsewhere."""
        return []

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """Return the parameters to train."""

    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Update the state that has no gradient, such as moving averages; called after the optimizer's step.

        Args:
            clock: Clock of the step, not yet advanced.
            done: False if the step was skipped. Then no parameter may change here; the engine restores buffers. The
                value is on the device, and reading it makes the host wait. [], bool
        """

"""State of a trainer as named tensors: everything that it needs to resume exactly."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dinocli.core.distributed import placed_as, whole
from dinocli.engine.method import Method
from dinocli.engine.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return parameters, buffers, the optimizer's moments and counts, the numbers of skipped steps, and any loss scale.

    The method's `frozen_modules` are omitted. So is the clock, and any random state: random draws depend only on seed
    and step. Sharded tensors are gathered, so all processes must call this together.
    """
    method = trainer.method
    frozen = _list_frozen_prefixes(method)
    tensors = {f"method/{k}": whole(v) for k, v in method.state_dict().items() if not k.startswith(frozen)}
    names: dict[Tensor, str] = {p: name for name, p in method.named_parameters()}
    for p, slots in trainer.optimizer.state.items():
        tensors |= {f"optimizer/{names[p]}/{slot}": whole(value) for slot, value in slots.items()}
    if trainer.scale:
        tensors |= {"loss_scale/factor": trainer.scale.factor, "loss_scale/streak": trainer.scale.streak}
    return tensors | {"skipped": trainer.skipped}


def restore(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors that `state_of` returned.

    Raises:
        KeyError: If a name is missing or unknown.
        RuntimeError: If a tensor is missing or has another shape.
    """
    method = trainer.method
    own = method.state_dict()
    stored = {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}
    frozen = {k: v for k, v in own.items() if k.startswith(_list_frozen_prefixes(method))}
    method.load_state_dict(frozen | {k: placed_as(v, own[k]) if k in own else v for k, v in stored.items()})
    trainer.optimizer.state.clear()  # SGD's moments exist before its first step
    restore_moments(trainer, tensors)
    trainer.skipped.copy_(tensors["skipped"])
    if trainer.scale and "loss_scale/factor" in tensors:  # absent if another device computed in another precision
        trainer.scale.factor.copy_(tensors["loss_scale/factor"])
        trainer.scale.streak.copy_(tensors["loss_scale/streak"])


def restore_moments(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Load the optimizer's moments and counts from the tensors that `state_of` returned, and nothing else.

    Raises:
        KeyError: If the method has no parameter of a name.
    """
    parameters = dict(trainer.method.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            name, slot = key.removeprefix("optimizer/").rsplit("/", 1)
            p = parameters[name]
            # Moments are sharded like their parameter; a count is a single number in every process.
            trainer.optimizer.state[p][slot] = placed_as(value, p) if value.shape == p.shape else value.to(p.device)


def _list_frozen_prefixes(method: Method) -> tuple[str, ...]:
    """Return the prefixes of the tensors that checkpoints omit."""
    return tuple(f"{name}." for name in method.frozen_modules())

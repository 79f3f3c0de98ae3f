"""What a trainer holds, as named tensors: all that it needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dinocli.distributed import placed_as, whole
from dinocli.engine.method import Method
from dinocli.engine.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers, the optimizer's moments and counts, and how many steps were left out.

    What the method says is `lasting` stays where it came from. The clock is not among them, and no random numbers are:
    what is drawn depends on seed and step. What lies in shards is gathered, for which all processes must ask.
    """
    method = trainer.method
    given = _lasting(method)
    tensors = {f"method/{k}": whole(v) for k, v in method.state_dict().items() if not k.startswith(given)}
    names: dict[Tensor, str] = {p: name for name, p in method.named_parameters()}
    for p, slots in trainer.optimizer.state.items():
        tensors |= {f"optimizer/{names[p]}/{slot}": whole(value) for slot, value in slots.items()}
    return tensors | {"skipped": trainer.skipped}


def restore(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_of` gave.

    Raises:
        KeyError: A name is missing, or has no place.
        RuntimeError: A tensor is missing or has another shape.
    """
    method = trainer.method
    own, parameters = method.state_dict(), dict(method.named_parameters())
    given = _lasting(method)
    stored = {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}
    stays = {k: v for k, v in own.items() if k.startswith(given)}
    method.load_state_dict(stays | {k: placed_as(v, own[k]) if k in own else v for k, v in stored.items()})
    trainer.optimizer.state.clear()
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            name, slot = key.removeprefix("optimizer/").rsplit("/", 1)
            p = parameters[name]
            # Moments lie as their parameter does; a count is a single number everywhere.
            trainer.optimizer.state[p][slot] = placed_as(value, p) if value.shape == p.shape else value.to(p.device)
    trainer.skipped.copy_(tensors["skipped"])


def _lasting(method: Method) -> tuple[str, ...]:
    """What the names of tensors begin with that no state keeps."""
    return tuple(f"{name}." for name in method.lasting())

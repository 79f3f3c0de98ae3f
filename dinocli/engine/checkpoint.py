"""What a trainer holds, as named tensors: all that it needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dinocli.engine.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers, the optimizer's moments and counts, and how many steps were left out.

    The clock is not among them, and no random numbers are: what is drawn depends on seed and step.
    """
    tensors = {f"method/{name}": value for name, value in trainer.method.state_dict().items()}
    names: dict[Tensor, str] = {p: name for name, p in trainer.method.named_parameters()}
    for p, slots in trainer.optimizer.state.items():
        tensors |= {f"optimizer/{names[p]}/{slot}": value for slot, value in slots.items()}
    return tensors | {"skipped": trainer.skipped}


def restore(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_of` gave.

    Raises:
        KeyError: A name is missing, or has no place.
        RuntimeError: A tensor is missing or has another shape.
    """
    method = trainer.method
    method.load_state_dict({k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")})
    parameters = dict(method.named_parameters())
    trainer.optimizer.state.clear()
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            name, slot = key.removeprefix("optimizer/").rsplit("/", 1)
            p = parameters[name]
            trainer.optimizer.state[p][slot] = value.to(p.device)
    trainer.skipped.copy_(tensors["skipped"])

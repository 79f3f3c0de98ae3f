"""Casts of a module's weights under autocast in one launch, instead of one per weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinocli.core.distributed import in_shards


def call_with_cast_weights(module: nn.Module, values: Tensor, *arguments: Any) -> Tensor:
    """Call a module with the weights of its linear layers in the precision of autocast.

    Autocast would cast each weight and each bias alone, and each of their gradients back. The values are the same. A
    compiled module is called as it is, because the compiler fuses casts, and so is one with sharded weights, which are
    gathered inside of the call.

    Args:
        module: Module whose weights are cast.
        values: First argument, whose device and autocast state apply.
        arguments: Arguments after `values`.
    """
    device = values.device.type
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    owners = _find_weights(module) if active and module._compiled_call_impl is None else []
    if not owners:
        output: Tensor = module(values, *arguments)
        return output
    weights = [owner._parameters[name] for owner, name in owners]
    cast = _Cast.apply(torch.get_autocast_dtype(device), *weights)
    try:
        for (owner, name), weight in zip(owners, cast, strict=True):
            owner._parameters[name] = weight
        output = module(values, *arguments)
    finally:
        for (owner, name), weight in zip(owners, weights, strict=True):
            owner._parameters[name] = weight
    return output


def _find_weights(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the linear layers and the names of their weights, if all are to be cast from float32."""
    linears: list[nn.Module] = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    owners = [(layer, name) for layer in linears for name, weight in layer._parameters.items() if weight is not None]
    weights = [owner._parameters[name] for owner, name in owners]
    found = [weight for weight in weights if weight is not None]
    is_plain = all(weight.dtype == torch.float32 for weight in found) and not in_shards(found)
    return owners if is_plain else []


class _Cast(torch.autograd.Function):
    """Copies of tensors in a lower precision, whose gradients are cast back together too."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        cast = _cast_all(weights, dtype)
        frozen = (copy for copy, trained in zip(cast, ctx.needs_input_grad[1:], strict=True) if not trained)
        ctx.mark_non_differentiable(*frozen)
        return cast

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [grad for grad in grads if grad is not None]
        cast = iter(_cast_all(present, torch.float32))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if cast:
        torch._foreach_copy_(cast, list(tensors))
    return tuple(cast)

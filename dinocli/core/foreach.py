"""Operations over many tensors in few kernel launches, with factors that stay on the device.

torch fuses an operation over a list of tensors only if the factors are numbers on the host; a list of factors on the
device costs a launch per tensor. Most tensors of a network are small: copying them into one tensor and back costs five
launches for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers in a tensor that is copied. A CPU has no launches to save: copying what has 2**19 took three times as long.
_SMALL, _SMALL_ON_CPU = 2**19, 2**14


def scale(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its own factor, in place.

    Args:
        tensors: n tensors of any shape.
        factors: Factors, on the device of the tensors. [n]
    """
    each = factors.unbind()
    small, large = _split_by_size(tensors)
    if large:
        torch._foreach_mul_([tensors[i] for i in large], [each[i] for i in large])
    if small:
        some = [tensors[i] for i in small]
        joined = _join(some)
        joined.mul_(torch.cat([each[i].expand(tensors[i].numel()) for i in small]))
        _copy_back(joined, some)


def move(tensors: Sequence[Tensor], towards: Sequence[Tensor], weight: Tensor) -> None:
    """Move each tensor towards another by the same weight, in place: by 0 not at all, by 1 all the way.

    Args:
        tensors: n tensors of any shape.
        towards: n tensors of the same shapes.
        weight: Weight of `towards`, on the device of the tensors. []
    """
    small, large = _split_by_size(tensors)
    if large:
        torch._foreach_lerp_([tensors[i] for i in large], [towards[i] for i in large], [weight] * len(large))
    if small:
        some = [tensors[i] for i in small]
        joined = _join(some)
        joined.lerp_(_join([towards[i] for i in small]), weight)
        _copy_back(joined, some)


def _split_by_size(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return the places of small tensors, and those of large ones. A copy needs tensors of one dtype and device."""
    first = tensors[0]
    alike = all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    most = _SMALL_ON_CPU if first.device.type == "cpu" else _SMALL
    small = [i for i, t in enumerate(tensors) if alike and t.numel() <= most]
    if len(small) < 2:
        small = []
    return small, sorted(set(range(len(tensors))) - set(small))


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _copy_back(joined: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = joined.split([t.numel() for t in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

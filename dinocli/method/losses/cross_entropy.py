"""Cross-entropy of logits against target distributions; the gradient overwrites the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from dinocli.core.device import exactly

CHUNK_LOGITS = 2**24  # per chunk; two copies in float32 take 128 MiB, and larger chunks are not faster


class Chunk(NamedTuple):
    """Logits whose loss is computed together. Only one chunk at a time is copied, in the wider precision.

    Attributes:
        where: Index of the chunk in the first dimension of all logits: logits[where] is [..., K].
        targets: Distributions to compare with each of these logits, or that can be expanded to them. If empty, the
            logits do not count. [..., K] each
        weights: Weights of these logits. If None, all are 1. [...]
    """

    where: int | slice
    targets: Sequence[Tensor]
    weights: Tensor | None = None


def cross_entropy(logits: Tensor, chunks: Iterable[Chunk], temperature: float, share: float = 1) -> Tensor:
    """Compute the weighted sum of the cross-entropies of softmax(logits / temperature) against the targets.

    Args:
        logits: [..., K] Overwritten with their gradient if they require one, except in float16.
        chunks: Chunks that together cover all logits exactly once.
        temperature: Divisor of the logits.
        share: Factor on the sum.

    Returns:
        The sum, in at least float32 even under autocast. []
    """
    if logits.dtype == torch.float16:
        # The gradient is computed before the loss is scaled, and float16 would round most of it to 0.
        logits = logits.float()
    loss: Tensor = _CrossEntropy.apply(logits, chunks, temperature, share)
    return loss


def entropy(p: Tensor) -> Tensor:  # [..., K] -> [...]
    """Compute the entropy of distributions, in nats."""
    return torch.special.entr(p).sum(-1)


class _CrossEntropy(torch.autograd.Function):
    """Loss whose gradient is computed in the forward pass, so that no second tensor of the logits' size is stored.

    For logits with n targets whose sum is T, and s = logits / temperature, the cross-entropies add up to
    n logsumexp(s) - T s. The gradient of this sum is (n softmax(s) - T) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chunks: Iterable[Chunk], temperature: float, share: float) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=wide)
        # Autocast would compute the product of targets and logits in low precision.
        with exactly(logits.device):
            for where, targets, weights in chunks:
                total += _compute_chunk(
                    logits[where], targets, weights, temperature, share, gradient=ctx.needs_input_grad[0]
                )
        if ctx.needs_input_grad[0]:
            ctx.gradient = logits
            # Now torch raises an error if another operation has saved these overwritten logits for its own gradient.
            increment_version(logits)
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of this loss can be computed only once: it was written over the logits")
        return gradient.mul_(grads[0]), None, None, None


def _compute_chunk(
    logits: Tensor,  # [..., K]
    targets: Sequence[Tensor],
    weights: Tensor | None,
    temperature: float,
    share: float,
    *,
    gradient: bool,
) -> Tensor:
    """Return the sum over a chunk without `share`, and write its gradient with `share` over the logits. []"""
    if not targets:
        if gradient:
            logits.zero_()
        return logits.new_zeros(())
    wide = torch.promote_types(logits.dtype, torch.float32)
    summed = sum(targets[1:], targets[0].to(wide))  # [..., K]
    scaled = logits.to(wide) / temperature
    terms = len(targets) * scaled.logsumexp(-1) - torch.linalg.vecdot(summed, scaled)  # [...]
    if gradient:
        # Not exp(s - logsumexp(s)), which loses small differences between large logits to rounding.
        slope = scaled.softmax(-1).mul_(len(targets)).sub_(summed).mul_(share / temperature)
        logits.copy_(slope if weights is None else slope.mul_(weights.unsqueeze(-1)))
    return (terms if weights is None else terms * weights).sum()

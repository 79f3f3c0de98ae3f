"""Cross-entropy of logits against distributions, with its gradient written over the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from dinocli.precision import exactly


class Chunk(NamedTuple):
    """Logits that are worked out at once; of theirs alone there are copies, in the wider precision.

    Attributes:
        where: Which they are, by the first dimension of all logits: logits[where] is [..., K].
        targets: Distributions that each of them is compared with, one after another; none, and they do not count.
            [..., K] each
        weights: How much each of them counts; absent, all count 1. [...]
    """

    where: int | slice
    targets: Sequence[Tensor]
    weights: Tensor | None = None


def cross_entropy(logits: Tensor, chunks: Iterable[Chunk], temperature: float, share: float = 1) -> Tensor:
    """The weighted sum of the cross-entropies of softmax(logits / temperature) against its targets.

    Args:
        logits: [..., K] Where a gradient is wanted they are used up: it is written over them.
        chunks: All logits, each in one of them.
        temperature: Divides the logits.
        share: Multiplies the sum.

    Returns:
        The sum, in at least float32 whatever autocast says. []
    """
    loss: Tensor = _CrossEntropy.apply(logits, chunks, temperature, share)
    return loss


def entropy(p: Tensor) -> Tensor:  # [..., K] -> [...]
    """Of distributions, in nats."""
    return torch.special.entr(p).sum(-1)


class _CrossEntropy(torch.autograd.Function):
    """The loss, with its gradient worked out beside it: so that of a student's K logits nothing else is ever kept.

    Logits that meet n targets have, with these targets' sum T and s the logits over the temperature, cross-entropies
    that add up to n logsumexp(s) - T s; their gradient is (n softmax(s) - T) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chunks: Iterable[Chunk], temperature: float, share: float) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=wide)
        # Under autocast the product of targets and logits would be coarse.
        with exactly(logits.device):
            for where, targets, weights in chunks:
                total += _worked_out(
                    logits[where], targets, weights, temperature, share, gradient=ctx.needs_input_grad[0]
                )
        if ctx.needs_input_grad[0]:
            ctx.gradient = logits
            # Whoever else has kept these logits for its own gradient is told by torch that they are gone.
            increment_version(logits)
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of this loss can be asked for once; it was written over the logits")
        return gradient.mul_(grads[0]), None, None, None


def _worked_out(
    logits: Tensor,  # [..., K]
    targets: Sequence[Tensor],
    weights: Tensor | None,
    temperature: float,
    share: float,
    *,
    gradient: bool,
) -> Tensor:
    """The sum over a chunk [], `share` apart; its gradient, `share` and all, is written over its logits."""
    if not targets:
        if gradient:
            logits.zero_()
        return logits.new_zeros(())
    wide = torch.promote_types(logits.dtype, torch.float32)
    summed = sum(targets[1:], targets[0].to(wide))  # [..., K]
    scaled = logits.to(wide) / temperature
    terms = len(targets) * scaled.logsumexp(-1) - torch.linalg.vecdot(summed, scaled)  # [...]
    if gradient:
        # Not exp(s - logsumexp(s)), which rounds away what small logits differ by.
        slope = scaled.softmax(-1).mul_(len(targets)).sub_(summed).mul_(share / temperature)
        logits.copy_(slope if weights is None else slope.mul_(weights.unsqueeze(-1)))
    return (terms if weights is None else terms * weights).sum()

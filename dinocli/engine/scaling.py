"""Loss scaling, which keeps gradients in float16 from being rounded to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from dinocli.core.distributed import local

_FIRST, _GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0**10, 2.0, 0.5, 2000


class LossScale:
    """Factor on the loss, and so on every gradient, that follows the largest gradient which float16 can hold.

    It is halved after a step that is not finite, and doubled after 2,000 finite steps in a row. The host never reads
    it, and all processes of a run have the same one, because they skip the same steps.

    Attributes:
        factor: Factor of the next step, a power of two. []
        streak: Number of finite steps since it changed. [], int32

    Source: torch.amp.GradScaler, whose numbers these are. Its own step makes the host wait, and knows nothing of
    the trainer's reasons to skip a step.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), _FIRST, device=device)
        self.streak = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide all gradients by the factor."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(local(grads), self.factor.reciprocal())

    def update(self, done: Tensor) -> None:
        """Set the factor of the next step; `done` is False if this one was skipped. [], bool"""
        torch._amp_update_scale_(self.factor, self.streak, (~done).float(), _GROWTH, _BACKOFF, _GROWTH_INTERVAL)

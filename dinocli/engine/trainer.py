"""Trainer: one step, and steps until told to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dinocli.engine.method import Method
from dinocli.engine.optim import OptimizerConfig, clip_gradients, drop_frozen, set_rates
from dinocli.schedules import Clock

OnStep = Callable[[Clock, dict[str, Tensor]], bool]


class Trainer:
    """Trains a method on batches.

    Attributes:
        clock: Steps done; the schedules read it.
        optimizer: Of torch's kind.
    """

    def __init__(
        self,
        method: Method,
        config: OptimizerConfig,
        clock: Clock,
        *,
        batch_size: int,
        precision: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self.method = method
        self.config = config
        self.clock = clock
        self.lr = config.lr_for(batch_size)
        self.precision = precision or contextlib.nullcontext()
        self.optimizer = config.build(method.param_groups())

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One step. The values returned stay on the device: reading one makes the host wait for it."""
        set_rates(self.optimizer, self.lr.at(self.clock), self.config.weight_decay.at(self.clock))
        with self.precision:
            terms = self.method(batch, self.clock)
            loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        grad_norm = clip_gradients(self.optimizer, self.config.clip)
        drop_frozen(self.optimizer, self.clock)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.clock)
        self.clock = self.clock.tick()
        return {"loss": loss.detach(), "grad_norm": grad_norm, **{k: v.detach() for k, v in terms.items()}}

    def fit(self, batches: Iterable[Any], steps: int, on_step: OnStep) -> None:
        """Train until the clock has done `steps` steps, the batches end, or `on_step` says stop.

        Args:
            batches: Batches in order, from where the clock stands.
            steps: Where to stop, counted from the start of the run.
            on_step: Called after each step with the clock and what the step returned; true stops.
        """
        if self.clock.step >= steps:
            return
        for batch in batches:
            values = self.step(batch)
            if on_step(self.clock, values) or self.clock.step >= steps:
                return

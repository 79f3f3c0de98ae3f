"""Trainer: one step, and steps until told to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinocli.distributed import all_of, local, mean_over_processes, rank, size
from dinocli.engine.method import Method
from dinocli.engine.optim import OptimizerConfig, clip_gradients, drop_frozen, move, set_rates
from dinocli.engine.parallel import Alone, Parallel
from dinocli.schedules import Clock

_ALONE = Alone()
Values = dict[str, Tensor | float]
OnStep = Callable[[Clock, Values], bool]


class Trainer:
    """Trains a method on batches.

    Args:
        method: What to train.
        config: How its parameters move.
        clock: Where to begin.
        batch_size: Images a step, of all processes together.
        accumulate: Parts in which the method takes a batch, one after another, to need less memory.
        precision: In which products are computed.
        seed: Of the random numbers that the networks draw; absent, they are drawn from torch's as it stands.
        guarded: Whether a step whose loss or gradient is not finite is left out altogether.
        parallel: How the processes of the run share the work.

    Attributes:
        clock: Steps done or left out; the schedules read it.
        optimizer: Of torch's kind.
        skipped: Steps that were left out so far, and how many of them were the last ones. On the device. [2]
    """

    def __init__(
        self,
        method: Method,
        config: OptimizerConfig,
        clock: Clock,
        *,
        batch_size: int,
        accumulate: int = 1,
        precision: contextlib.AbstractContextManager[Any] | None = None,
        seed: int | None = None,
        guarded: bool = False,
        parallel: Parallel = _ALONE,
    ) -> None:
        self.method = method
        self.parallel = parallel
        self._wrapped = parallel.wrap(method)
        self.config = config
        self.clock = clock
        self.lr = config.lr_for(batch_size)
        self.accumulate = accumulate
        self.precision = precision or contextlib.nullcontext()
        self.seed = seed
        self.guarded = guarded
        self.optimizer = config.build(method.param_groups())
        self.skipped = torch.zeros(2, dtype=torch.int64, device=next(method.parameters()).device)

    def step(self, batch: Any, *, watch: bool = False) -> Values:
        """One step. The values returned stay on the device: reading one makes the host wait for it.

        Args:
            batch: What the method takes: this process's share.
            watch: Whether to work out the method's further figures too, and all of them over the whole batch.
        """
        self._draw_anew()
        set_rates(self.optimizer, self.lr.at(self.clock), self.config.weight_decay.at(self.clock))
        before = [buffer.clone() for buffer in self.method.buffers()]
        with self.precision:
            parts = self.method.parts(batch, self.accumulate, self.clock)
        losses: dict[str, Tensor] = {}
        for i, part in enumerate(parts, 1):
            with self.parallel.adding(self._wrapped, last=i == len(parts)):
                with self.precision:
                    terms = self._wrapped(part)
                    loss = torch.stack(list(terms.values())).sum() / len(parts)
                loss.backward()
            losses = {name: losses.get(name, 0) + term.detach() / len(parts) for name, term in terms.items()}
        loss = torch.stack(list(losses.values())).sum()
        grad_norm = clip_gradients(self.optimizer, self.config.clip)
        done = all_of(torch.isfinite(loss + grad_norm)) if self.guarded else torch.ones_like(loss, dtype=torch.bool)
        figures = self.method.watch(parts, losses, self.clock) if watch else {}
        drop_frozen(self.optimizer, self.clock)
        move(self.optimizer, done)
        self.method.after_step(self.clock, done)
        for buffer, old in zip(self.method.buffers(), before, strict=True):
            buffer.copy_(torch.where(done, buffer, old))
        self.skipped += ~done
        self.skipped[1] *= ~done
        self.clock = self.clock.tick()
        values = {"loss": loss, "grad_norm": grad_norm, **losses, **figures}
        return _means(values) if watch else values

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

    def is_finite(self) -> bool:
        """Check parameters, buffers and moments, of shards this process's own; the host waits for the device.

        A gradient that is finite is not enough: a rate that is too high makes weights of it that are not.
        """
        moments = (value for slots in self.optimizer.state.values() for value in slots.values())
        tensors = local([*self.method.parameters(), *self.method.buffers(), *moments])
        floats = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
        if self.skipped.device.type == "cpu":  # ten times as fast there; elsewhere it would be a launch for each tensor
            ends = [end for t in floats for end in t.aminmax()]
        else:
            ends = [norm.to(self.skipped.device) for norm in torch._foreach_norm(floats, torch.inf)]
        return bool(torch.stack(ends).isfinite().all())

    def _draw_anew(self) -> None:
        """Let what the networks draw depend on seed and step alone, so that nothing of it must be kept to go on."""
        if self.seed is not None:
            # Each process has images of its own, and so draws of its own.
            entropy = (self.seed, self.clock.step, rank()) if rank() else (self.seed, self.clock.step)
            (mixed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
            torch.manual_seed(int(mixed))


def _means(values: Values) -> Values:
    """Figures over the images of all processes, in one message."""
    if size() == 1:
        return values
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    means = mean_over_processes(torch.stack([value.float() for value in tensors.values()]))
    return values | dict(zip(tensors, means.unbind(), strict=True))

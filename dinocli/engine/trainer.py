"""Trainer: one training step, and the loop over steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinocli.core.distributed import all_of, local, mean_over_processes, rank, size
from dinocli.engine.method import Method
from dinocli.engine.optim import OptimizerConfig, clip_gradients, drop_frozen, set_rates, step_unless_skipped
from dinocli.engine.parallel import Alone, Parallel
from dinocli.engine.scaling import LossScale
from dinocli.engine.schedules import Clock

_ALONE = Alone()
Values = dict[str, Tensor | float]
OnStep = Callable[[Clock, Values], None]


class Trainer:
    """Trainer of a method on batches.

    Args:
        method: Method to train.
        config: Optimizer and its schedules.
        clock: Step to start from.
        batch_size: Images per step, over all processes.
        accumulate: Number of parts of a batch whose gradients are accumulated, to save memory.
        precision: Context of the forward pass, such as autocast. If None, no context.
        seed: Seed of the networks' random draws. If None, they use torch's current random state.
        guarded: If True, skip steps with a loss or gradient that is not finite.
        scale: Scale of the loss, for products in float16; the trainer is then guarded. If None, no scaling.
        parallel: Parallelism over the processes of the run.

    Attributes:
        clock: Clock of the next step, which schedules read. Skipped steps count too.
        skipped: Numbers of skipped steps: in total, and in a row up to now. On the device. [2]
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
        scale: LossScale | None = None,
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
        self.guarded = guarded or scale is not None
        self.scale = scale
        self.optimizer = config.build(method.param_groups())  # after wrap(), which may replace the parameters
        self.skipped = torch.zeros(2, dtype=torch.int64, device=next(method.parameters()).device)

    def step(self, batch: Any, *, log: bool = False) -> Values:
        """Take one training step. The returned values stay on the device: reading one makes the host wait for it.

        Args:
            batch: This process's share of a batch, as the method takes it.
            log: If True, also compute the method's metrics, and average all values over the processes.
        """
        clock = self.clock
        self._seed_draws()
        self.method.before_step(clock)
        batch = self.method.prepare(batch)
        set_rates(self.optimizer, self.lr.at(clock), self.config.weight_decay.at(clock))
        values = self._run(batch, clock, log=log)
        self.clock = clock.tick()
        return _average_over_processes(values) if log else values

    def _run(self, batch: Any, clock: Clock, *, log: bool) -> Values:
        """Run the operators of a step. Whatever changes from step to step comes from tensors, or from `clock.value`."""
        # For a skipped step, whose forward pass has changed buffers too (BatchNorm's statistics, the center).
        before = [buffer.clone() for buffer in self.method.buffers()]
        with self.precision:
            parts = self.method.parts(batch, self.accumulate, clock)
        losses: dict[str, Tensor] = {}
        for i, part in enumerate(parts, 1):
            with self.parallel.adding(self._wrapped, last=i == len(parts)):
                with self.precision:
                    terms = self._wrapped(part)
                    loss = torch.stack(list(terms.values())).sum() / len(parts)
                (loss if self.scale is None else loss * self.scale.factor).backward()
            losses = {name: losses.get(name, 0) + term.detach() / len(parts) for name, term in terms.items()}
        loss = torch.stack(list(losses.values())).sum()
        if self.scale:
            self.scale.unscale(self.optimizer)
        grad_norm = self._clip()
        # All processes skip a step together; otherwise their weights would differ from here on.
        done = all_of(torch.isfinite(loss + grad_norm)) if self.guarded else torch.ones_like(loss, dtype=torch.bool)
        metrics = self.method.metrics(parts, losses, clock) if log else {}
        # After clipping, as in the original, so that `grad_norm` includes frozen parameters.
        drop_frozen(self.optimizer, clock)
        self._update(clock, done)
        self.method.after_step(clock, done)
        for buffer, old in zip(self.method.buffers(), before, strict=True):
            buffer.copy_(torch.where(done, buffer, old))
        scaling: Values = {"loss_scale": self.scale.factor.clone()} if self.scale else {}
        if self.scale:
            self.scale.update(done)
        self.skipped += ~done
        self.skipped[1] *= ~done
        return {"loss": loss, "grad_norm": grad_norm, **losses, **metrics, **scaling}

    def _clip(self) -> Tensor:
        """Clip the gradients, and return their total norm before clipping. []"""
        return clip_gradients(self.optimizer, self.config.clip)

    def _update(self, clock: Clock, done: Tensor) -> None:
        """Take the optimizer's step with the rates of its groups."""
        step_unless_skipped(self.optimizer, done)

    def fit(self, batches: Iterable[Any], steps: int, on_step: OnStep, due: Callable[[], bool] = lambda: False) -> None:
        """Train until the clock reaches `steps` or the batches end. This is the only training loop.

        Args:
            batches: Batches in order, starting at the clock's step. Training stops early if they end.
            steps: Step to stop at, counted from the start of the run.
            on_step: Function called after each step with the clock and the step's values.
            due: Function called before each step; it returns True if the step is to be logged.
        """
        if self.clock.step >= steps:
            return
        for batch in batches:
            values = self.step(batch, log=due())
            on_step(self.clock, values)
            if self.clock.step >= steps:
                return

    def is_finite(self) -> bool:
        """Check that parameters, buffers and moments are finite; the host waits for the device.

        Each process checks only its own shards of sharded tensors. Checking gradients is not enough: with too high a
        learning rate, a finite gradient leads to weights that are not finite.
        """
        moments = (value for slots in self.optimizer.state.values() for value in slots.values())
        tensors = local([*self.method.parameters(), *self.method.buffers(), *moments])
        floats = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
        if self.skipped.device.type == "cpu":  # ten times as fast on a CPU; a GPU would launch a kernel per tensor
            extremes = [extreme for t in floats for extreme in t.aminmax()]
        else:
            extremes = [norm.to(self.skipped.device) for norm in torch._foreach_norm(floats, torch.inf)]
        return bool(torch.stack(extremes).isfinite().all())

    def _seed_draws(self) -> None:
        """Seed the networks' random draws from seed and step alone, so that resuming needs no random state."""
        if self.seed is not None:
            # Each process has its own images, and so its own draws.
            entropy = (self.seed, self.clock.step, rank()) if rank() else (self.seed, self.clock.step)
            (mixed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
            torch.manual_seed(int(mixed))


def _average_over_processes(values: Values) -> Values:
    """Average values over all processes with a single all-reduce."""
    if size() == 1:
        return values
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    means = mean_over_processes(torch.stack([value.float() for value in tensors.values()]))
    return values | dict(zip(tensors, means.unbind(), strict=True))

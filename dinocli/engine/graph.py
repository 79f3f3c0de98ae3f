"""Training steps as CUDA graphs: the host launches all kernels of a step at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dinocli.engine.optim import AdamWConfig, step_with_tensors
from dinocli.engine.schedules import Clock, Schedule
from dinocli.engine.trainer import Trainer, Values

if TYPE_CHECKING:
    from dinocli.engine.fused import FusedAdamW

_PLAIN_STEPS = 3  # of each form before its capture: they create moments and caches, and compile kernels
_MOST_GRAPHS = 8  # steps of further forms, such as rare crop sizes, stay plain
_MOST_SCHEDULES = 64


class Numbers:
    """Values of schedules at the current step, in one tensor of fixed address on the device.

    A schedule gets its place when it is read for the first time, which is in a plain step, before any capture.
    """

    def __init__(self, device: torch.device) -> None:
        # In float64, as on the host: 1 minus a momentum near 1 needs more digits than float32 has.
        self._values = torch.zeros(_MOST_SCHEDULES, dtype=torch.float64, device=device)
        self._schedules: list[Schedule] = []

    def set(self, clock: Clock) -> None:
        """Copy the values at a step to the device, without waiting for it."""
        # A new tensor in each step: an earlier copy may not have run yet, and torch reuses pinned memory only after it.
        pinned = self._values.device.type == "cuda"
        values = torch.tensor([s.at(clock) for s in self._schedules], dtype=torch.float64, pin_memory=pinned)
        self._values[: len(values)].copy_(values, non_blocking=True)

    def of(self, schedule: Schedule, clock: Clock) -> Tensor:
        """Return the value of a schedule, on the device. []"""
        place = next((i for i, known in enumerate(self._schedules) if known is schedule), len(self._schedules))
        if place == len(self._schedules):
            self._schedules.append(schedule)
            self.set(clock)
        return self._values[place]


@dataclass(frozen=True)
class DeviceClock(Clock):
    """Clock whose values of schedules are tensors on the device.

    Attributes:
        numbers: Values at the clock's step.
    """

    numbers: Numbers = field(kw_only=True, compare=False)

    def value(self, schedule: Schedule) -> Tensor:
        return self.numbers.of(schedule, self)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Any  # the batch that it reads
    values: Values  # the values that it writes


class GraphTrainer(Trainer):
    """Trainer that captures its steps as CUDA graphs and replays them.

    A step has two parts. The host seeds the random draws, computes the values of schedules, and copies them and the
    batch into tensors of fixed addresses. The device then runs operators that read nothing but tensors. What changes
    these operators is the form of a step: whether it is logged, which groups are frozen, `Method.form`, and the shapes
    of the batch. Each form has its own graph, and all share memory. The first steps of a form are plain.

    Random draws are those of plain steps: a graph starts at the seed and the offset of torch's generator when it is
    replayed, and the trainer sets its seed before every step.

    The values that a step returns are overwritten by the next one of its form.

    Args:
        arguments: Arguments of `Trainer`, for one process and one part per batch.
        note: Callback that receives one line if steps cannot be captured. Training then continues with plain steps.
        options: Further arguments of `Trainer`.

    Attributes:
        fused: Clipping and AdamW in few launches; None if torch's own update the parameters.
    """

    def __init__(self, *arguments: Any, note: Callable[[str], None] = lambda line: None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._note = note
        self._numbers = Numbers(self.skipped.device)
        self._stream = torch.cuda.Stream(self.skipped.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, _Captured] = {}
        self._batches: dict[Hashable, Any] = {}  # that graphs read, by their shapes
        self._plain_steps: Counter[Hashable] = Counter()
        self._failed = False
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # only checked: torch's fused steps always keep their counts on the device
        self.fused = self._fuse()

    def _run(self, batch: Any, clock: Clock, *, log: bool) -> Values:
        if self._failed:
            return super()._run(batch, clock, log=log)
        clock = DeviceClock(clock.steps_per_epoch, clock.epochs, clock.step, numbers=self._numbers)
        self._numbers.set(clock)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
        form = log, self._list_frozen(clock), self.method.form(clock), shapes
        captured = self._graphs.get(form)
        if captured is None and self._is_due(form):
            captured = self._capture(form, shapes, batch, clock, log=log)
            if captured is None:
                return super()._run(batch, self.clock, log=log)
        if captured is None:
            return self._run_beside(batch, clock, log=log)
        for own, new in zip(_tensors(captured.batch), _tensors(batch), strict=True):
            own.copy_(new, non_blocking=True)
        captured.graph.replay()
        return dict(captured.values)

    def _clip(self) -> Tensor:
        return self.fused.clip() if self.fused and not self._failed else super()._clip()

    def _update(self, clock: Clock, done: Tensor) -> None:
        if not isinstance(clock, DeviceClock):
            super()._update(clock, done)
            return
        lr, weight_decay = clock.value(self.lr), clock.value(self.config.weight_decay)
        if self.fused:
            self.fused.step(lr, weight_decay, done)
        else:
            step_with_tensors(self.config, self.optimizer, lr, weight_decay, done)

    def _fuse(self) -> FusedAdamW | None:
        """Return the update by Triton's kernels if they support these parameters and work on this device."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not isinstance(self.config, AdamWConfig) or not all(p.is_cuda for p in parameters):
            return None
        try:
            from dinocli.engine import fused  # only here: torch brings Triton for CUDA alone
        except ImportError:
            return None
        if not all(fused.fits(p) for p in parameters):
            return None
        if fault := fused.why_not(self.skipped.device):
            self._note(f"note: Triton does not work here; torch updates the parameters: {fault}")
            return None
        return fused.FusedAdamW(self.optimizer, self.config)

    def _list_frozen(self, clock: Clock) -> frozenset[int]:
        epochs = {group["frozen_epochs"] for group in self.optimizer.param_groups}
        return frozenset(epoch for epoch in epochs if clock.epoch < epoch)

    def _is_due(self, form: Hashable) -> bool:
        """Count a step of a form; return True if its plain steps are done and there is room for its graph."""
        self._plain_steps[form] += 1
        return self._plain_steps[form] > _PLAIN_STEPS and len(self._graphs) < _MOST_GRAPHS

    def _run_beside(self, batch: Any, clock: Clock, *, log: bool) -> Values:
        """Run a plain step on the stream of the captures, as torch asks for before a capture."""
        main = torch.cuda.current_stream(self.skipped.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            values = super()._run(batch, clock, log=log)
        main.wait_stream(self._stream)
        return values

    def _capture(self, form: Hashable, shapes: Hashable, batch: Any, clock: Clock, *, log: bool) -> _Captured | None:
        """Capture a step of a form without running it; return None if CUDA refuses."""
        if shapes not in self._batches:
            self._batches[shapes] = _map_tensors(torch.clone, batch)
        own, graph = self._batches[shapes], torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate memory meanwhile, such as one that copies batches to the device.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                values = super()._run(own, clock, log=log)
        except RuntimeError as error:
            self._failed = True
            self._graphs.clear()
            self._batches.clear()
            self.optimizer.zero_grad(set_to_none=True)
            self._seed_draws()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._note(f"note: this step cannot be captured as a CUDA graph; training with plain steps: {reason}")
            return None
        if self.fused:
            self.fused.fill()
        self._graphs[form] = _Captured(graph, own, values)
        return self._graphs[form]


def _tensors(value: Any) -> Sequence[Tensor]:
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(collect, value)
    return found


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a batch with every tensor replaced by a function of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [_map_tensors(function, each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        mapped = {f.name: _map_tensors(function, getattr(value, f.name)) for f in fields(value)}
        return replace(value, **mapped)
    return value

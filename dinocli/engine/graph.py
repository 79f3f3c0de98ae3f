"""Training steps as CUDA graphs: the host launches all kernels of a step at once."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dinocli.core.errors import reason_of
from dinocli.engine.optim import AdamWConfig, step_with_tensors
from dinocli.engine.schedules import Clock, Schedule
from dinocli.engine.trainer import Trainer, Values

if TYPE_CHECKING:
    from dinocli.engine.fused import FusedAdamW

_PLAIN_STEPS = 3  # of each form before its capture: they create moments and caches, and compile kernels
# Largest difference between a graph's first step and the plain one, in parts: of loss and norm, and of the movement of
# each kind of values. Adam turns rounding into whole steps of the few values without a gradient, such as biases of
# keys. Differences below the last part of the values themselves are rounding.
_NEAR_VALUES, _NEAR_MOVES, _ROUNDING = 0.01, 0.1, 1e-6
_EXACT = "counts"  # the kind of values that must be equal
_ROOM = 2.2  # memory of a step that must be free before a capture: for the graphs, for plain steps, and a tenth
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

    Before its use, a new graph and a plain step run from the same state, and training continues from that of the plain
    step. If they differ, all graphs are dropped.

    Random draws are those of plain steps: a graph starts at the seed and the offset of torch's generator when it is
    replayed, and the trainer sets its seed before every step.

    The values that a step returns are overwritten by the next one of its form.

    Args:
        arguments: Arguments of `Trainer`, for one process and one part per batch, with a seed.
        note: Callback that receives one line if steps cannot be captured, a graph takes another step, or the memory is
            too small for graphs. Training then continues with plain steps.
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
        self._plainly = False  # True during steps that use only the operators of `Trainer`
        self._updating = False  # True once a step has begun to change parameters
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # only checked: torch's fused steps always keep their counts on the device
        self.fused = self._fuse()

    @property
    def keeps_graphs(self) -> bool:
        """True if graphs take memory."""
        return bool(self._graphs)

    def _run(self, batch: Any, clock: Clock, *, log: bool) -> Values:
        if self._failed:
            return super()._run(batch, clock, log=log)
        clock = DeviceClock(clock.steps_per_epoch, clock.epochs, clock.step, numbers=self._numbers)
        self._numbers.set(clock)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
        form = log, self._list_frozen(clock), self.method.form(clock), shapes
        if captured := self._graphs.get(form):
            return _replay(captured, batch)
        if self._is_due(form):
            return self._begin(form, shapes, batch, clock, log=log)
        return self._run_beside(batch, clock, log=log)

    def _begin(self, form: Hashable, shapes: Hashable, batch: Any, clock: Clock, *, log: bool) -> Values:
        """Capture a form, take a plain step, and keep the graph if it takes the same step from the same state."""
        if not self._capture(form, shapes, batch, clock, log=log):
            return super()._run(batch, self.clock, log=log)
        before = self._copy_state()
        by_graph = _read(_replay(self._graphs[form], batch)), self._copy_state()
        for kind, tensors in self._state().items():
            for tensor, old in zip(tensors, before[kind], strict=True):
                tensor.copy_(old)
        self._seed_draws()
        self._plainly = True
        try:
            values = self._with_enough_memory(lambda: Trainer._run(self, batch, self.clock, log=log), batch, log=log)
        finally:
            self._plainly = self._failed
        if not self._failed and (fault := _compare(by_graph, (_read(values), self._state()), before)):
            self._give_up(f"a CUDA graph differs from the plain step ({fault})")
        return values

    def _clip(self) -> Tensor:
        return self.fused.clip() if self.fused and not self._plainly else super()._clip()

    def _update(self, clock: Clock, done: Tensor) -> None:
        self._updating = True
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

        def run() -> Values:
            self._stream.wait_stream(main)
            try:
                with torch.cuda.stream(self._stream):
                    return Trainer._run(self, batch, clock, log=log)
            finally:
                main.wait_stream(self._stream)

        return self._with_enough_memory(run, batch, log=log)

    def _with_enough_memory(self, run: Callable[[], Values], batch: Any, *, log: bool) -> Values:
        """Run a plain step; if the memory is too small for it beside graphs, free these and run it again."""
        buffers = [buffer.clone() for buffer in self.method.buffers()]  # a forward pass may change them
        self._updating = False
        try:
            return run()
        except torch.OutOfMemoryError:
            if not self._graphs or self._updating:
                raise
            for buffer, old in zip(self.method.buffers(), buffers, strict=True):
                buffer.copy_(old)
            self._give_up(_NO_ROOM)
        return Trainer._run(self, batch, self.clock, log=log)

    def _capture(self, form: Hashable, shapes: Hashable, batch: Any, clock: Clock, *, log: bool) -> bool:
        """Capture a step of a form without running it; return False if CUDA refuses, or the memory is too small."""
        if not self._graphs and not _has_room(self.skipped.device):
            self._give_up(_NO_ROOM)
            return False
        if shapes not in self._batches:
            self._batches[shapes] = _map_tensors(torch.clone, batch)
        own, graph = self._batches[shapes], torch.cuda.CUDAGraph()
        main = torch.cuda.current_stream(self.skipped.device)
        try:
            # Other threads may allocate memory meanwhile, such as one that copies batches to the device.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                values = super()._run(own, clock, log=log)
        except RuntimeError as error:
            torch.cuda.set_stream(main)  # torch leaves the stream of the capture in place if its end fails too
            self._give_up(f"this step cannot be captured as a CUDA graph ({reason_of(error.__context__ or error)})")
            return False
        if self.fused:
            self.fused.fill()
        self._graphs[form] = _Captured(graph, own, values)
        return True

    def _give_up(self, reason: str) -> None:
        """Free all graphs, and train with plain steps from now on."""
        self._failed = self._plainly = True
        self._graphs.clear()
        self._batches.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self._seed_draws()
        self._note(f"note: {reason}; training with plain steps")

    def _copy_state(self) -> dict[str, list[Tensor]]:
        """Copy the state to the host: the device may have no room for it."""
        return {kind: [tensor.to("cpu", copy=True) for tensor in tensors] for kind, tensors in self._state().items()}

    def _state(self) -> dict[str, list[Tensor]]:
        """Return all tensors that a step may change, by kind: those of a kind move by similar lengths."""
        kinds: dict[str, list[Tensor]] = defaultdict(list)
        for p in self.method.parameters():
            kinds["weights" if p.requires_grad else "averages"].append(p.detach())
        for name, buffer in self.method.named_buffers():
            kinds[name if buffer.is_floating_point() else _EXACT].append(buffer)
        for slots in self.optimizer.state.values():
            for name, value in slots.items():
                if isinstance(value, Tensor):
                    kinds[_EXACT if name == "step" else name].append(value)
        kinds[_EXACT] += [self.skipped, *((self.scale.factor, self.scale.streak) if self.scale else ())]
        return kinds


_NO_ROOM = "the memory is too small for CUDA graphs beside other steps"


def _has_room(device: torch.device) -> bool:
    """Return True if the memory holds graphs, which keep that of a step, beside plain steps and evaluations."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    now = torch.cuda.memory_allocated(device)
    step = torch.cuda.max_memory_allocated(device) - now
    return free + torch.cuda.memory_reserved(device) - now >= _ROOM * step


def _replay(captured: _Captured, batch: Any) -> Values:
    for own, new in zip(_tensors(captured.batch), _tensors(batch), strict=True):
        own.copy_(new, non_blocking=True)
    captured.graph.replay()
    return dict(captured.values)


def _read(values: Values) -> dict[str, float]:
    return {name: float(values[name]) for name in ("loss", "grad_norm")}


_Step = tuple[dict[str, float], dict[str, list[Tensor]]]  # values that a step returned, and the state after it


def _compare(by_graph: _Step, plain: _Step, before: dict[str, list[Tensor]]) -> str:
    """Return what differs between two steps from one state; nothing if they are the same up to rounding."""
    for name, value in plain[0].items():
        if not math.isclose(by_graph[0][name], value, rel_tol=_NEAR_VALUES) and math.isfinite(value):
            return f"{name} {by_graph[0][name]:.6g} instead of {value:.6g}"
    for kind, tensors in plain[1].items():
        apart = moved = size = 0.0
        for tensor, one, old in zip(tensors, by_graph[1][kind], before[kind], strict=True):
            other, first = tensor.cpu().double(), old.double()
            apart += float((one.double() - other).square().sum())
            moved += float((other - first).square().sum())
            size += float(first.square().sum())
        allowed = 0.0 if kind == _EXACT else _NEAR_MOVES**2 * moved + _ROUNDING**2 * size
        if not apart <= allowed:
            return f"{kind} {math.sqrt(apart):.3g} away after a step of length {math.sqrt(moved):.3g}"
    return ""


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

"""Time of each part of a training step, measured by hooks from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from original import OriginalStep
from torch import nn

from dinocli.engine import trainer
from dinocli.engine.trainer import Trainer

PARTS = ("waiting", "teacher", "backbone", "head", "loss", "backward", "clip", "optimizer", "EMA", "other")


class Stopwatch:
    """Stopwatch that adds elapsed time to the current part of a step, the innermost if parts are nested."""

    def __init__(self, device: torch.device, now: Callable[[], float]) -> None:
        self.on_gpu, self.now = device.type == "cuda", now
        self.begin()

    def begin(self) -> None:
        self.spent, self.stack = dict.fromkeys(PARTS, 0.0), ["other"]
        self._last = self._time()

    def end(self) -> dict[str, float]:
        self._charge()
        return self.spent

    def _charge(self) -> None:
        now = self._time()
        self.spent[self.stack[-1]] += now - self._last
        self._last = now

    def _time(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.now()

    @contextlib.contextmanager
    def part(self, name: str, then: str | None = None) -> Iterator[None]:
        """Time a part; afterwards, time outside of any part counts as `then`, if given."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()
            self.stack[0] = then or self.stack[0]

    def _enter(self, name: str) -> None:
        self._charge()
        self.stack.append(name)

    def _leave(self) -> None:
        self._charge()
        self.stack.pop()

    def attach(self, stepper: Trainer | OriginalStep) -> None:
        """Install hooks that time the parts of a step."""
        self._call(torch.autograd, "backward", "backward", then="optimizer")
        if isinstance(stepper, OriginalStep):
            self._module(stepper.teacher, "teacher")
            self._module(stepper.student, "backbone")
            self._call(stepper.student, "logits", "head")
            self._module(stepper.loss, "loss")
            self._call(stepper, "_clip", "clip")
            self._call(stepper, "move_teacher", "EMA", then="other")
            return
        method: Any = stepper.method
        self._module(method.teacher, "teacher")
        self._module(method.student, "backbone")  # without its heads, which are timed below
        for head in method.student.heads.values():
            self._module(head, "head")
        for loss in method.losses.values():
            self._module(loss, "loss")
            self._call(loss, "targets_for", "loss")
        self._call(trainer, "clip_gradients", "clip")
        self._call(method, "after_step", "EMA", then="other")

    def _module(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self._enter(name))
        module.register_forward_hook(lambda *_: self._leave())

    def _call(self, owner: Any, attribute: str, name: str, then: str | None = None) -> None:
        function = getattr(owner, attribute)

        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name, then):
                return function(*args, **options)

        setattr(owner, attribute, timed)

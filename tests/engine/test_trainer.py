from __future__ import annotations

import torch
from torch import Tensor, nn

from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import SGDConfig
from dinocli.engine.trainer import Trainer
from dinocli.schedules import Clock, Constant


class Line(Method):
    """Fits one number to another; counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.after: list[int] = []

    def forward(self, batch: float, clock: Clock) -> dict[str, Tensor]:
        return {"near": (self.value - batch) ** 2, "small": 0 * self.value}

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup([self.value])]

    def after_step(self, clock: Clock) -> None:
        self.after.append(clock.step)


def trainer() -> Trainer:
    flat = Constant(kind="constant", value=0.25)
    config = SGDConfig(kind="sgd", momentum=0.0, lr=flat, weight_decay=Constant(kind="constant", value=0.0))
    return Trainer(Line(), config, Clock(10, 10), batch_size=1)


def test_a_step_tells_loss_parts_and_gradient_and_ticks() -> None:
    t = trainer()
    values = t.step(2.0)
    assert {k: v.item() for k, v in values.items()} == {"loss": 4.0, "near": 4.0, "small": 0.0, "grad_norm": 4.0}
    assert t.method.value.item() == 1.0
    assert (t.clock.step, t.method.after) == (1, [0])
    assert t.method.value.grad is None


def test_fit_stops_where_told() -> None:
    for steps, stop_at, done in ((5, 99, 5), (5, 3, 3), (0, 99, 0)):
        t, seen = trainer(), []

        def on_step(clock: Clock, values: dict, seen: list = seen, stop_at: int = stop_at) -> bool:
            seen.append(clock.step)
            return clock.step == stop_at

        t.fit(iter([2.0] * 20), steps, on_step)
        assert seen == list(range(1, done + 1))

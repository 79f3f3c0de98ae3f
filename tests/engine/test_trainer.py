from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dinocli.engine.method import Method, ParamGroup
from dinocli.engine.optim import AdamWConfig, LARSConfig, MuonConfig, OptimizerConfig, SGDConfig
from dinocli.engine.schedules import Clock, Constant
from dinocli.engine.trainer import Trainer


class Line(Method):
    """Method that fits one number to another, and records its calls of `after_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.after: list[int] = []

    def forward(self, part: float) -> dict[str, Tensor]:
        return {"near": (self.value - part) ** 2, "small": 0 * self.value}

    def param_groups(self) -> list[ParamGroup]:
        return [ParamGroup([self.value])]

    def after_step(self, clock: Clock, done: Tensor) -> None:
        self.after.append(clock.step)


def make_trainer() -> Trainer:
    flat = Constant(kind="constant", value=0.25)
    config = SGDConfig(kind="sgd", momentum=0.0, lr=flat, weight_decay=Constant(kind="constant", value=0.0))
    return Trainer(Line(), config, Clock(10, 10), batch_size=1)


def test_a_step_returns_losses_and_gradient_norm_and_advances_the_clock() -> None:
    t = make_trainer()
    values = t.step(2.0)
    assert {k: v.item() for k, v in values.items()} == {"loss": 4.0, "near": 4.0, "small": 0.0, "grad_norm": 4.0}
    assert t.method.value.item() == 1.0
    assert (t.clock.step, t.method.after) == (1, [0])
    assert t.method.value.grad is None


@pytest.mark.parametrize(("steps", "batches", "done"), [(5, 20, 5), (5, 3, 3), (0, 20, 0)])
def test_fit_stops_at_its_last_step_or_after_the_last_batch(steps: int, batches: int, done: int) -> None:
    t, finished, source = make_trainer(), [], iter([2.0] * batches)
    t.fit(source, steps, lambda clock, values: finished.append(clock.step))
    assert finished == list(range(1, done + 1))
    assert len(list(source)) == batches - done, "a batch was fetched and not used"


def test_fit_logs_the_steps_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    t, logged = make_trainer(), []
    step = t.step
    monkeypatch.setattr(t, "step", lambda batch, log: logged.append((t.clock.step, log)) or step(batch, log=log))
    t.fit(iter([2.0] * 4), 4, lambda clock, values: None, lambda: t.clock.step % 2 == 1)
    assert logged == [(0, False), (1, True), (2, False), (3, True)]


class Halves(Line):
    """Method that splits batches into parts, and sums its inputs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def parts(self, batch: Tensor, count: int, clock: Clock) -> list[Tensor]:
        return list(batch.chunk(count))

    def forward(self, part: Tensor) -> dict[str, Tensor]:
        self.total += part.sum()
        return {"near": ((self.value - part) ** 2).mean()}


def guarded_trainer(config: OptimizerConfig, accumulate: int = 1) -> Trainer:
    return Trainer(Halves(), config, Clock(10, 10), batch_size=4, accumulate=accumulate, guarded=True)


FLAT = Constant(kind="constant", value=0.25)
DECAY = Constant(kind="constant", value=0.1)
OPTIMIZERS = [
    SGDConfig(kind="sgd", momentum=0.9, lr=FLAT, weight_decay=DECAY),
    AdamWConfig(kind="adamw", betas=(0.9, 0.999), lr=FLAT, weight_decay=DECAY),
    LARSConfig(kind="lars", momentum=0.9, trust=0.1, lr=FLAT, weight_decay=DECAY),
    MuonConfig(kind="muon", momentum=0.9, matrix_rate=2, betas=(0.9, 0.999), lr=FLAT, weight_decay=DECAY),
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.kind)
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_advances_only_the_clock(config: OptimizerConfig, first: int, bad: float) -> None:
    good = torch.tensor([1.0, 2.0, 3.0, 5.0])
    one, other = guarded_trainer(config), guarded_trainer(config)
    for trainer, batches in ((one, [good] * 5), (other, [good] * first + [good + bad] * 2 + [good] * (5 - first))):
        for batch in batches:
            trainer.step(batch)
    assert one.method.value.item() == other.method.value.item() != 0
    assert one.method.total.item() == other.method.total.item() == 55
    state, others = (t.optimizer.state[t.method.value] for t in (one, other))
    assert {k: v.item() for k, v in state.items()} == {k: v.item() for k, v in others.items()}
    assert (one.clock.step, other.clock.step) == (5, 7)
    assert (one.skipped.tolist(), other.skipped.tolist()) == ([0, 0], [2, 0])


class Roots(Halves):
    """Method whose loss is finite at 0, but whose gradient is not."""

    def forward(self, part: Tensor) -> dict[str, Tensor]:
        return {"near": (self.value * part).abs().sqrt().mean()}


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    trainer = Trainer(Roots(), OPTIMIZERS[0], Clock(10, 10), batch_size=4, guarded=True)
    before = trainer.method.value.item()
    values = trainer.step(torch.zeros(4))
    assert values["loss"].isfinite()
    assert not values["grad_norm"].isfinite()
    assert trainer.method.value.item() == before
    assert trainer.skipped.tolist() == [1, 1]


def test_skipped_steps_are_counted_in_total_and_in_a_row() -> None:
    trainer = guarded_trainer(OPTIMIZERS[0])
    for value in (1.0, math.nan, 1.0, math.nan, math.nan):
        trainer.step(torch.tensor([value]))
    assert trainer.skipped.tolist() == [3, 2]


def test_gradients_of_parts_add_up_to_that_of_the_batch() -> None:
    batch = torch.tensor([1.0, 2.0, 3.0, 6.0])
    values = [guarded_trainer(OPTIMIZERS[0], n).step(batch) for n in (1, 2, 4)]
    assert [v["loss"].item() for v in values] == [12.5] * 3
    assert [v["grad_norm"].item() for v in values] == [6.0] * 3
    with pytest.raises(ValueError, match="cannot split its batches into 2 parts"):
        Trainer(Line(), OPTIMIZERS[0], Clock(1, 1), batch_size=1, accumulate=2).step(1.0)


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.kind)
def test_is_finite_detects_weights_that_are_not_finite(config: OptimizerConfig) -> None:
    """With a learning rate of nan the gradient is finite and the step is not skipped, but its weights are nan."""
    trainer = guarded_trainer(config)
    trainer.step(torch.tensor([1.0, 2.0]))
    assert trainer.is_finite()
    trainer.lr = Constant.model_construct(kind="constant", value=math.nan)
    trainer.step(torch.tensor([1.0, 2.0]))
    assert trainer.skipped.tolist() == [0, 0]
    assert not trainer.is_finite()


def test_is_finite_checks_buffers_and_moments_too() -> None:
    for spoil in (
        lambda t: t.method.total.fill_(math.inf),
        lambda t: t.optimizer.state[t.method.value]["exp_avg_sq"].fill_(math.inf),
    ):
        trainer = guarded_trainer(OPTIMIZERS[1])
        trainer.step(torch.tensor([1.0, 2.0]))
        assert trainer.is_finite()
        spoil(trainer)
        assert not trainer.is_finite()

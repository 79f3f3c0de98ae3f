from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import together
from test_trainer import OPTIMIZERS, Halves, guarded_trainer
from torch import Tensor

from dinocli.core.device import autocast
from dinocli.data.loader.batch import Batch
from dinocli.engine import scaling
from dinocli.engine.checkpoint import restore, state_of
from dinocli.engine.optim import ClipEach, OptimizerConfig
from dinocli.engine.parallel import DDP, Alone
from dinocli.engine.scaling import LossScale
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.preset import load_preset

CPU = torch.device("cpu")
GOOD = torch.tensor([1.0, 2.0, 3.0, 5.0])


def scaled_trainer(config: OptimizerConfig = OPTIMIZERS[0], *, accumulate: int = 1, parallel: Any = None) -> Trainer:
    options = {"batch_size": 4, "accumulate": accumulate, "scale": LossScale(CPU), "parallel": parallel or Alone()}
    return Trainer(Halves(), config, Clock(10, 10), **options)


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.kind)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaled_loss_changes_neither_weights_nor_what_is_logged(config: OptimizerConfig, accumulate: int) -> None:
    config = config.model_copy(update={"clip": ClipEach(kind="each_parameter", norm=0.3)})
    plain, scaled = guarded_trainer(config, accumulate), scaled_trainer(config, accumulate=accumulate)
    for i in range(4):
        one, other = plain.step(GOOD + i), scaled.step(GOOD + i)
        assert other.pop("loss_scale") == 2.0**10
        assert {k: v.item() for k, v in one.items()} == {k: v.item() for k, v in other.items()}, (
            "powers of two are exact"
        )
    assert plain.method.value.item() == scaled.method.value.item() != 0


def test_the_scale_halves_at_once_and_doubles_after_finite_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_GROWTH_INTERVAL", 3)
    trainer = scaled_trainer()
    bad = GOOD * math.inf
    factors = [trainer.step(batch)["loss_scale"].item() for batch in (GOOD, bad, bad, GOOD, GOOD, GOOD, GOOD)]
    assert factors == [2.0**n for n in (10, 10, 9, 8, 8, 8, 9)]
    assert trainer.scale.streak.item() == 1
    assert trainer.skipped.tolist() == [2, 0]


def test_an_overflow_of_scaled_gradients_skips_the_step_and_the_next_try_succeeds() -> None:
    class Narrow(Halves):
        """Method whose gradient passes through float16."""

        def forward(self, part: Tensor) -> dict[str, Tensor]:
            return {"near": ((self.value.half() - part.half()).float() * 100).mean()}

    trainer = Trainer(Narrow(), OPTIMIZERS[0], Clock(10, 10), batch_size=4, scale=LossScale(CPU))
    first = trainer.step(GOOD)
    assert first["loss"].isfinite(), "only the gradient overflows"
    assert not first["grad_norm"].isfinite()
    assert trainer.method.value.item() == 0
    second = trainer.step(GOOD)
    assert second["grad_norm"].item() == 100
    assert trainer.method.value.item() == -25
    assert trainer.skipped.tolist() == [1, 0]


def test_a_resumed_trainer_has_the_same_scale() -> None:
    one, other = scaled_trainer(), scaled_trainer()
    for batch in (GOOD, GOOD * math.nan, GOOD):
        one.step(batch)
    state = {name: value.clone() for name, value in state_of(one).items()}
    assert (state["loss_scale/factor"].item(), state["loss_scale/streak"].item()) == (512, 1)
    restore(other, state)
    assert (other.scale.factor.item(), other.scale.streak.item()) == (512, 1)
    assert one.step(GOOD)["grad_norm"].equal(other.step(GOOD)["grad_norm"])

    plain = guarded_trainer(OPTIMIZERS[0])
    assert not any(name.startswith("loss_scale") for name in state_of(plain)), "other precisions store none"
    restore(plain, state)  # on a device with bfloat16
    restore(other, state_of(plain))  # and back
    assert other.scale.factor.item() == 512


def skip_in_one_process() -> tuple[list[float], list[int], float]:
    from dinocli.core.distributed import rank

    trainer = scaled_trainer(parallel=DDP())
    for bad in (False, True, False):
        trainer.step(GOOD * (math.inf if bad and rank() == 1 else 1))
    return [trainer.scale.factor.item()], trainer.skipped.tolist(), trainer.method.value.item()


def test_all_processes_halve_the_scale_if_one_overflows() -> None:
    first, second = together(2, skip_in_one_process)
    assert first == second
    assert first[:2] == ([512.0], [1, 0])
    alone = scaled_trainer()
    for _ in range(2):
        alone.step(GOOD)
    assert first[2] == pytest.approx(alone.method.value.item())


def correlated_views(step: int) -> Batch:
    """Return views of eight images that differ from one another; the images repeat every eight steps."""
    large = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step % 8))
    large = F.interpolate(large, size=32, mode="bilinear")[None]
    noise = torch.Generator().manual_seed(step)
    crops = large + 0.3 * torch.randn(2, 8, 3, 32, 32, generator=noise)
    return Batch(crops, large[..., 8:24, 8:24] + 0.3 * torch.randn(2, 8, 3, 16, 16, generator=noise), torch.arange(8))


@pytest.mark.slow
def test_200_steps_in_float16_have_the_losses_of_float32() -> None:
    """Only the mean is compared: with rounding, single steps of two runs drift apart."""
    preset = load_preset(
        "tiny-dino",
        [
            "backbone.options={img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2}",
            "heads.dino.prototypes=64",
            "heads.dino.hidden=32",
            "heads.dino.bottleneck=16",
            "heads.dino.freeze_last_layer_epochs=0",
            "views.locals=2",
            "training.epochs=10",
            "optimizer.lr.warmup_epochs=1",
        ],
    )
    means = []
    for precision, scale in (("float32", None), ("float16", LossScale(CPU))):
        torch.manual_seed(0)
        options = {"precision": autocast(CPU, precision), "seed": 0, "guarded": True, "scale": scale}
        trainer = Trainer(preset.method(), preset.optimizer, Clock(20, 10), batch_size=64, **options)
        losses: list[float] = []
        batches = (correlated_views(i) for i in range(200))
        trainer.fit(batches, 200, lambda clock, values, losses=losses: losses.append(values["loss"].item()))
        assert trainer.skipped.tolist() == [0, 0]
        means.append(sum(losses) / 200)
        assert losses[-1] < 0.6 * losses[0], "it learns"
    assert means[1] == pytest.approx(means[0], rel=0.01)

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dinocli.engine.schedules import Clock, Constant, Cosine, CosineByEpoch, LinearByEpoch, Schedule, Warmup


def values(schedule: Schedule, clock: Clock) -> list[float]:
    return [schedule.at(replace(clock, step=step)) for step in range(clock.total)]


@pytest.mark.parametrize("run", ["a_vits16_default_100ep_b512", "b_vitb16_like_20ep_b1024"])
def test_schedules_of_a_run_equal_the_originals(original, run: str) -> None:
    made = original.made["sched"][run]
    clock = Clock(made["niter"], made["epochs"])
    lr = Cosine(kind="cosine", start=made["lr"], end=made["min_lr"], warmup_epochs=made["warmup_epochs"])
    ours = {
        "lr": lr.scaled(made["batch"] / 256),
        "wd": Cosine(kind="cosine", start=made["wd"], end=made["wd_end"]),
        "momentum": Cosine(kind="cosine", start=made["momentum"], end=1.0),
    }
    for name, schedule in ours.items():
        np.testing.assert_allclose(
            values(schedule, clock), original[f"sched/{run}/{name}"].numpy(), rtol=1e-13, atol=1e-16
        )
    temperature = LinearByEpoch(
        kind="linear_by_epoch", start=made["t_warm"], end=made["t"], epochs=made["t_warm_epochs"]
    )
    by_epoch = values(temperature, clock)[:: clock.steps_per_epoch]
    np.testing.assert_allclose(by_epoch, original[f"sched/{run}/teacher_temp"].numpy(), rtol=1e-15)


def test_a_warmup_starts_at_zero_and_ends_at_the_peak() -> None:
    lr = Cosine(kind="cosine", start=2.0, end=0.0, warmup_epochs=2)
    assert values(lr, Clock(5, 4))[:2] == [0.0, 2.0 / 9]
    assert values(lr, Clock(5, 4))[9:11] == [2.0, 2.0]


def test_values_of_constant_and_cosine_by_epoch() -> None:
    assert set(values(Constant(kind="constant", value=0.5), Clock(3, 2))) == {0.5}
    by_epoch = values(CosineByEpoch(kind="cosine_by_epoch", start=1.0, end=0.0), Clock(2, 4))
    assert by_epoch[::2] == by_epoch[1::2]
    assert by_epoch[::2] == pytest.approx([1.0, 0.8535533905932737, 0.5, 0.1464466094067262])


def test_scaling_a_schedule_keeps_its_end() -> None:
    scaled = Cosine(kind="cosine", start=1.0, end=0.25).scaled(4)
    assert (scaled.start, scaled.end) == (4.0, 0.25)


def test_the_clock_counts_steps_and_epochs() -> None:
    clock = Clock(steps_per_epoch=3, epochs=2)
    assert [(c.step, c.epoch) for c in (clock, clock.tick().tick(), clock.tick().tick().tick())] == [
        (0, 0),
        (2, 0),
        (3, 1),
    ]
    assert clock.total == 6


def test_schedules_longer_than_the_run_are_reported_as_misfits() -> None:
    clock = Clock(5, 2)
    warm = Cosine(kind="cosine", start=2.0, end=0.0, warmup_epochs=2)
    assert [warm.at(replace(clock, step=step)) for step in (0, 9, 10)] == [0.0, 2.0, 2.0]
    assert warm.misfit(2) == ("warmup_epochs", 2, 1, 0)
    assert warm.misfit(3) is None
    ramp = LinearByEpoch(kind="linear_by_epoch", start=0.04, end=0.07, epochs=4)
    assert ramp.misfit(3) == ("epochs", 4, 3, 0)
    assert ramp.misfit(4) is None, "the end is reached in the last epoch"
    assert (
        Constant(kind="constant", value=1).misfit(1)
        is CosineByEpoch(kind="cosine_by_epoch", start=1, end=0).misfit(1)
        is None
    )


def test_a_warmup_rises_like_that_of_a_cosine_and_stays_at_its_value_for_any_batch() -> None:
    warm, cosine = (
        Warmup(kind="warmup", value=0.3, warmup_epochs=2),
        Cosine(kind="cosine", start=0.3, end=0.0, warmup_epochs=2),
    )
    clocks = [Clock(5, 4, step) for step in range(20)]
    assert [warm.at(clock) for clock in clocks[:10]] == [cosine.at(clock) for clock in clocks[:10]]
    assert (warm.at(clocks[0]), warm.at(clocks[9])) == (0, 0.3)
    assert {warm.at(clock) for clock in clocks[10:]} == {0.3}
    assert {warm.scaled(4).at(clock) for clock in clocks[10:]} == {1.2}
    assert Warmup(kind="warmup", value=0.3).at(clocks[0]) == 0.3
    assert (warm.misfit(3), warm.misfit(2)) == (None, ("warmup_epochs", 2, 1, 0))

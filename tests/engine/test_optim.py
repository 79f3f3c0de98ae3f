from __future__ import annotations

import pytest
import torch
from torch import nn

from dinocli.engine.method import ParamGroup
from dinocli.engine.optim import ClipEach, LARSConfig, LinearRule, SGDConfig, clip_gradients, drop_frozen, set_rates
from dinocli.schedules import Clock, Constant, Cosine

FLAT = Constant(kind="constant", value=0.0)


def test_lars_steps_equal_the_originals(original) -> None:
    made = original.made["lars"]
    matrix, vector = (nn.Parameter(original[f"lars/init{i}"].clone()) for i in (0, 1))
    config = LARSConfig(kind="lars", momentum=made["momentum"], trust=made["eta"], lr=FLAT, weight_decay=FLAT)
    optimizer = config.build([ParamGroup([matrix, vector])])
    for step in range(3):
        set_rates(optimizer, made["lr"], made["weight_decay"])
        matrix.grad, vector.grad = original[f"lars/grad{step}_0"], original[f"lars/grad{step}_1"]
        optimizer.step()
        torch.testing.assert_close(matrix.data, original[f"lars/after{step + 1}_0"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(vector.data, original[f"lars/after{step + 1}_1"], rtol=1e-6, atol=1e-7)


def test_clip_bounds_each_parameter_on_its_own_and_tells_the_whole_norm() -> None:
    big, small = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    big.grad, small.grad = torch.full((4,), 5.0), torch.full((4,), 0.1)
    optimizer = SGDConfig(kind="sgd", momentum=0.9, lr=FLAT, weight_decay=FLAT).build([ParamGroup([big, small])])
    norm = clip_gradients(optimizer, ClipEach(kind="each_parameter", norm=1.0))
    assert norm.item() == pytest.approx((100 + 0.04) ** 0.5)
    assert big.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(small.grad, torch.full((4,), 0.1))


def test_without_a_clip_gradients_stay() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([30.0, 40.0])
    optimizer = SGDConfig(kind="sgd", momentum=0.0, lr=FLAT, weight_decay=FLAT).build([ParamGroup([p])])
    assert clip_gradients(optimizer, None).item() == 50.0
    assert p.grad.tolist() == [30.0, 40.0]


def test_frozen_groups_lose_their_gradient_until_their_epoch() -> None:
    frozen, free = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [ParamGroup([frozen], frozen_epochs=2), ParamGroup([free])]
    optimizer = SGDConfig(kind="sgd", momentum=0.0, lr=FLAT, weight_decay=FLAT).build(groups)
    for step, kept in ((0, False), (5, False), (6, True)):
        frozen.grad, free.grad = torch.ones(1), torch.ones(1)
        drop_frozen(optimizer, Clock(3, 4, step))
        assert (frozen.grad is not None, free.grad is not None) == (kept, True)


def test_rates_follow_group_and_batch() -> None:
    groups = [
        ParamGroup([nn.Parameter(torch.zeros(1))], decay=False, lr_scale=0.5),
        ParamGroup([nn.Parameter(torch.zeros(1))]),
    ]
    config = SGDConfig(
        kind="sgd",
        momentum=0.9,
        lr=Cosine(kind="cosine", start=1.0, end=0.0),
        lr_rule=LinearRule(kind="linear", batch=256),
        weight_decay=FLAT,
    )
    optimizer = config.build(groups)
    set_rates(optimizer, config.lr_for(512).at(Clock(10, 1)), 0.1)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1.0, 0.0), (2.0, 0.1)]

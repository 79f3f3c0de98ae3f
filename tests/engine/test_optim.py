from __future__ import annotations

import math

import pytest
import torch
from conftest import PRECISIONS, assert_original
from torch import Tensor, nn

from dinocli.engine import optim
from dinocli.engine.method import ParamGroup
from dinocli.engine.optim import (
    AdamWConfig,
    ClipEach,
    ClipModules,
    LARSConfig,
    LinearRule,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
    SqrtRule,
    clip_gradients,
    drop_frozen,
    orthogonal,
    set_rates,
    step_unless_skipped,
)
from dinocli.engine.schedules import Clock, Constant, Cosine

FLAT = Constant(kind="constant", value=0.0)
LARS = LARSConfig(kind="lars", momentum=0.9, trust=0.001, lr=FLAT, weight_decay=FLAT)
SGD = SGDConfig(kind="sgd", momentum=0.9, lr=FLAT, weight_decay=FLAT)
ADAMW = AdamWConfig(kind="adamw", betas=(0.9, 0.999), lr=FLAT, weight_decay=FLAT)
MUON = MuonConfig(kind="muon", momentum=0.95, matrix_rate=2, betas=(0.9, 0.999), lr=FLAT, weight_decay=FLAT)


def test_steps_of_lars_equal_the_originals(original) -> None:
    made = original.made["lars"]
    matrix, vector = (nn.Parameter(original[f"lars/init{i}"].clone()) for i in (0, 1))
    config = LARSConfig(kind="lars", momentum=made["momentum"], trust=made["eta"], lr=FLAT, weight_decay=FLAT)
    optimizer = config.build([ParamGroup([matrix, vector])])
    for step in range(3):
        set_rates(optimizer, made["lr"], made["weight_decay"])
        matrix.grad, vector.grad = original[f"lars/grad{step}_0"], original[f"lars/grad{step}_1"]
        optimizer.step()
        assert_original(matrix.data, original[f"lars/after{step + 1}_0"])
        assert_original(vector.data, original[f"lars/after{step + 1}_1"])


class PlainStep:
    """Reference implementation of each optimizer for a single parameter, in float64."""

    def __init__(self, config: OptimizerConfig, p: Tensor) -> None:
        self.config, self.p, self.steps = config, p.double().clone(), 0
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)

    def step(self, grad: Tensor, lr: float, decay: float) -> Tensor:
        p, config = self.p, self.config
        self.steps += 1
        if isinstance(config, AdamWConfig):
            one, two = config.betas
            p *= 1 - lr * decay
            self.m = one * self.m + (1 - one) * grad
            self.v = two * self.v + (1 - two) * grad**2
            corrected = self.m / (1 - one**self.steps)
            p -= lr * corrected / ((self.v / (1 - two**self.steps)).sqrt() + config.eps)
            return p
        if isinstance(config, SGDConfig):
            grad = grad + decay * p
        elif p.ndim > 1:
            grad = grad + decay * p
            grad = grad * config.trust * math.sqrt((p**2).sum()) / math.sqrt((grad**2).sum())
        self.m = config.momentum * self.m + grad
        p -= lr * self.m
        return p


@PRECISIONS
@pytest.mark.parametrize("config", [ADAMW, SGD, LARS], ids=["adamw", "sgd", "lars"])
def test_steps_equal_the_reference_implementation(config: OptimizerConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((6, 4), (6,), (3, 2, 5))]
    plain = [PlainStep(config, p.data) for p in parameters]
    optimizer = config.build([ParamGroup(parameters)])
    for step in range(5):
        lr, decay = 0.01 * (step + 1), 0.05 * step
        set_rates(optimizer, lr, decay)
        for p in parameters:
            p.grad = torch.randn_like(p)
        expected = [reference.step(p.grad.double(), lr, decay) for reference, p in zip(plain, parameters, strict=True)]
        optimizer.step()
        for p, reference in zip(parameters, expected, strict=True):
            assert_original(p.data, reference, f"step {step}")


def muon_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return MUON.build([ParamGroup(parameters, hidden=[p.ndim == 2 and len(p) < 40 for p in parameters])])


def drawn() -> list[nn.Parameter]:
    """Three hidden matrices, two of one shape, one that is none, and a bias."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((24, 36), (36, 8), (24, 36), (40, 8), (24,))]


def test_hidden_matrices_take_the_steps_of_torchs_muon_and_the_rest_those_of_adamw() -> None:
    mine, theirs = drawn(), drawn()
    optimizer = muon_of(mine)
    muon = torch.optim.Muon(theirs[:3], adjust_lr_fn="match_rms_adamw", momentum=0.95, nesterov=True)
    adamw = torch.optim.AdamW(theirs[3:], betas=(0.9, 0.999))
    for step in range(4):
        lr, decay = 0.01 * (step + 1), 0.05 * step
        set_rates(optimizer, lr, decay)
        for other, rate in ((muon, 2 * lr), (adamw, lr)):
            other.param_groups[0].update(lr=rate, weight_decay=decay)
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for p, q in zip(mine, theirs, strict=True):
        hidden = p.ndim == 2 and len(p) < 40
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3 if hidden else 1e-6)  # iterations in bfloat16
        assert (p - q).square().mean() < 1e-6


def test_the_memory_of_muons_copies_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, again = drawn(), drawn()
    for parameters, most in ((mine, 2 * 24 * 36), (again, 100)):
        monkeypatch.setattr(optim, "_STACKED", most)
        lists = list(optim._group_by_shape(parameters[:3]))
        assert [len(alike) for alike in lists] == ([2, 1] if parameters is mine else [1, 1, 1])
        optimizer = muon_of(parameters)
        set_rates(optimizer, 0.01, 0.1)
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    for p, q in zip(mine, again, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)  # iterations in bfloat16


def test_muon_skips_a_step_and_continues_from_a_saved_state() -> None:
    mine, again = drawn(), drawn()
    first, second = muon_of(mine), muon_of(again)
    for step in range(4):
        gradients = [torch.randn(p.shape) for p in mine]
        for parameters, optimizer in ((mine, first), (again, second)):
            set_rates(optimizer, 0.01, 0.1)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
        before = [p.detach().clone() for p in mine]
        step_unless_skipped(first, torch.tensor(step != 1))
        if step != 1:  # a skipped step changes nothing: not even the momentum of the next ones
            step_unless_skipped(second, torch.tensor(True))
        else:
            assert all(torch.equal(p, old) for p, old in zip(mine, before, strict=True))
        assert all(p.grad is None for p in mine)
        state = second.state_dict()
        second = muon_of(again)
        second.load_state_dict(state)
    assert all(torch.equal(p, q) for p, q in zip(mine, again, strict=True))


def test_orthogonal_brings_singular_values_near_one() -> None:
    for shape in ((24, 36), (36, 24), (5, 5)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.5 and values.max() < 1.3, values


def test_clipping_bounds_each_parameter_and_returns_the_total_norm() -> None:
    big, small = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    big.grad, small.grad = torch.full((4,), 5.0), torch.full((4,), 0.1)
    optimizer = SGD.build([ParamGroup([big, small])])
    norm = clip_gradients(optimizer, ClipEach(kind="each_parameter", norm=1.0))
    assert norm.item() == pytest.approx((100 + 0.04) ** 0.5)
    assert big.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(small.grad, torch.full((4,), 0.1))


def test_clipping_bounds_the_joint_norm_of_each_module() -> None:
    """A module's parameters may be in several groups, which only set learning rate and weight decay."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for p, size in zip(parameters, (3.0, 4.0, 0.1), strict=True):
        p.grad = torch.full((4,), size)
    a, b, c = parameters
    optimizer = SGD.build(
        [ParamGroup([a, c], modules=["backbone", "head"]), ParamGroup([b], lr_scale=0.5, modules=["backbone"])]
    )
    norm = clip_gradients(optimizer, ClipModules(kind="each_module", norm=2.0))
    assert norm.item() == pytest.approx((100 + 0.04) ** 0.5)
    assert torch.stack([a.grad, b.grad]).norm().item() == pytest.approx(2.0, abs=1e-5)
    assert (a.grad / b.grad).tolist() == pytest.approx([0.75] * 4)
    torch.testing.assert_close(c.grad, torch.full((4,), 0.1))


@pytest.mark.parametrize(
    ("rule", "factor"), [(LinearRule(kind="linear", batch=256), 4.0), (SqrtRule(kind="sqrt", batch=256), 2.0)]
)
def test_the_learning_rate_scales_with_the_batch_size_by_its_rule(rule: LinearRule | SqrtRule, factor: float) -> None:
    assert rule.factor(1024) == factor
    assert rule.factor(256) == 1


def test_gradients_are_unchanged_without_clipping() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([30.0, 40.0])
    optimizer = SGD.build([ParamGroup([p])])
    assert clip_gradients(optimizer, None).item() == 50.0
    assert p.grad.tolist() == [30.0, 40.0]


def test_frozen_groups_have_no_gradient_until_their_epoch() -> None:
    frozen, free = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [ParamGroup([frozen], frozen_epochs=2), ParamGroup([free])]
    optimizer = SGD.build(groups)
    for step, kept in ((0, False), (5, False), (6, True)):
        frozen.grad, free.grad = torch.ones(1), torch.ones(1)
        drop_frozen(optimizer, Clock(3, 4, step))
        assert (frozen.grad is not None, free.grad is not None) == (kept, True)


def test_learning_rate_and_weight_decay_depend_on_group_and_batch_size() -> None:
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

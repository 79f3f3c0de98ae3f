from __future__ import annotations

import math

import pytest
import torch

from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.method.losses.simdino import (
    SimdinoLossConfig,
    SimdinoPatchesLossConfig,
    coding_rate,
    patch_distance,
    view_distance,
)
from dinocli.models.network import Encoding

CLOCK = Clock(1, 1)
GLOBALS, VIEWS, IMAGES, WIDTH = 2, 5, 6, 8


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def compute_by_loops(student: torch.Tensor, teacher: torch.Tensor, eps: float, *, with_teacher: bool) -> torch.Tensor:
    """Compute the definition of SimDINO by loops over pairs of views, images and global views."""
    student, teacher = unit(student), unit(teacher)
    distances = [
        0.5 * (student[v, b] - teacher[g, b]).square().sum()
        for g in range(GLOBALS)
        for v in range(VIEWS)
        if v != g
        for b in range(IMAGES)
    ]
    rates = []
    for g in range(GLOBALS):
        moments = sum(torch.outer(z, z) for z in ((student[g] + teacher[g]) / 2 if with_teacher else student[g]))
        rates.append(0.5 * torch.logdet(torch.eye(WIDTH, dtype=student.dtype) + WIDTH / (IMAGES * eps) * moments))
    gamma = (WIDTH + IMAGES) / (WIDTH * IMAGES)
    return torch.stack(distances).mean() - gamma * torch.stack(rates).mean()


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student = torch.randn(VIEWS, IMAGES, WIDTH, dtype=dtype, requires_grad=True)
    return student, torch.randn(GLOBALS, IMAGES, WIDTH, dtype=dtype)


def encode(values: torch.Tensor) -> Encoding:
    return Encoding(values, GLOBALS, {"head": values}, {"head": values[0]})


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_value_and_gradient_equal_the_definition(eps: float, with_teacher: bool) -> None:
    student, teacher = draw()
    loss_of = SimdinoLossConfig(weight=0.7, head="head", eps=eps, with_teacher=with_teacher).build(WIDTH)
    targets = loss_of.targets_for(encode(teacher), CLOCK)
    loss = loss_of(encode(student), targets, None)
    expected = 0.7 * compute_by_loops(student, teacher, eps, with_teacher=with_teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    actual, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    assert not loss_of.state_dict()


def test_metrics_separate_agreement_expansion_and_spread() -> None:
    student, teacher = draw()
    loss_of = SimdinoLossConfig(weight=0.7, head="head", eps=0.05, with_teacher=True).build(WIDTH)
    targets = loss_of.targets_for(encode(teacher), CLOCK)
    loss = loss_of(encode(student), targets, None)
    metrics = loss_of.metrics(targets, loss.detach(), CLOCK)
    distance = view_distance(student, targets)
    torch.testing.assert_close(metrics["cosine"], 1 - distance.detach())
    torch.testing.assert_close(0.7 * (1 - metrics["cosine"] - metrics["expansion"]), loss.detach())
    flat = unit(teacher).flatten(0, 1)
    torch.testing.assert_close(metrics["spread"], (flat - flat.mean(0)).square().sum(-1).mean().sqrt())
    loss_of.after_step()


def test_equal_features_have_cosine_1_and_almost_no_expansion() -> None:
    """The figures of the original's threads: a collapsed run has an expansion of 0.03 to 0.08, a healthy one above 1."""
    torch.manual_seed(0)
    loss_of = SimdinoLossConfig(weight=1.0, head="head", eps=0.05, with_teacher=True).build(256)
    for features, expansion in ((torch.randn(2, 64, 256), 2.66), (torch.ones(2, 64, 256), 0.083)):
        targets = loss_of.targets_for(encode(features), CLOCK)
        metrics = loss_of.metrics(targets, loss_of(encode(features), targets, None), CLOCK)
        assert metrics["expansion"].item() == pytest.approx(expansion, abs=0.01)
        assert (metrics["spread"].item() > 0.9) == (expansion > 1)
    assert metrics["cosine"].item() == pytest.approx(1)


def test_the_coding_rate_is_highest_for_features_in_all_directions() -> None:
    even, one = torch.eye(WIDTH, dtype=torch.float64) / WIDTH, torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    one[0, 0] = 1
    assert coding_rate(even, 0.5).item() == pytest.approx(WIDTH / 2 * math.log(1 + 1 / 0.5))
    assert coding_rate(one, 0.5).item() == pytest.approx(0.5 * math.log(1 + WIDTH / 0.5))
    assert coding_rate(torch.full_like(even, torch.nan), 0.5).isnan()


def test_minimizing_the_loss_spreads_features() -> None:
    torch.manual_seed(0)
    student = (torch.ones(2, 16, 8) + 0.01 * torch.randn(2, 16, 8)).requires_grad_()
    loss_of = SimdinoLossConfig(weight=1.0, head="head", eps=0.05, with_teacher=False).build(8)
    optimizer = torch.optim.Adam([student], lr=0.02)
    for _ in range(200):
        targets = loss_of.targets_for(encode(student.detach()), CLOCK)
        optimizer.zero_grad()
        loss_of(encode(student), targets, None).backward()
        optimizer.step()
    metrics = loss_of.metrics(targets, torch.zeros(()), CLOCK)
    assert metrics["spread"] > 0.9 and metrics["cosine"] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_loss_and_gradient_are_finite_in_any_precision(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    student = (scale * torch.ones(VIEWS, 64, 256)).to(dtype).requires_grad_()
    loss_of = SimdinoLossConfig(weight=1.0, head="head", eps=0.05, with_teacher=True).build(256)
    with torch.autocast("cpu", torch.bfloat16):
        targets = loss_of.targets_for(encode(student.detach()[:2]), CLOCK)
        loss = loss_of(encode(student), targets, None)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and student.grad.isfinite().all()


def test_autocast_does_not_change_the_loss() -> None:
    student, teacher = draw(torch.float32)
    loss_of = SimdinoLossConfig(weight=1.0, head="head", eps=0.05, with_teacher=True).build(WIDTH)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            targets = loss_of.targets_for(encode(teacher), CLOCK)
            results.append(loss_of(encode(student), targets, None))
    assert results[0].equal(results[1])


def test_masked_patches_equal_the_definition() -> None:
    torch.manual_seed(0)
    where = torch.zeros(2, 3, 4, dtype=torch.bool)
    where[0, 0, :3] = where[1, 2, :1] = where[1, 1, 2:] = True
    masks, total = PatchMasks.of(where), int(where.sum())
    student = torch.randn(total, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(total, WIDTH, dtype=torch.float64)
    loss_of = SimdinoPatchesLossConfig(weight=0.5, head="head").build(WIDTH)
    targets = loss_of.targets_for(Encoding(student, 2, {}, {"head": teacher}), CLOCK)
    loss = loss_of(Encoding(student, 2, {}, {"head": student}), targets, masks)
    distances = 0.5 * (unit(student) - unit(teacher)).square().sum(-1)
    crops = distances.split(masks.counts.flatten().tolist())
    expected = 0.5 * sum(crop.mean() for crop in crops if len(crop)) / where[..., 0].numel()
    # Weights are float32.
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)), rtol=1e-6, atol=1e-9)
    metrics = loss_of.metrics(targets, loss.detach(), CLOCK)
    per_crop = torch.stack([crop.mean() for crop in crops if len(crop)]).mean()
    torch.testing.assert_close(metrics["cosine"], 1 - per_crop.detach(), rtol=1e-6, atol=1e-7)


def test_the_distance_of_patches_and_its_gradient_equal_the_definition() -> None:
    torch.manual_seed(0)
    patches = 7
    student = torch.randn(patches, WIDTH, dtype=torch.float64, requires_grad=True)
    teacher = unit(torch.randn(patches, WIDTH, dtype=torch.float64))
    weights = torch.rand(patches, dtype=torch.float64)
    found = patch_distance(student, teacher, weights)
    expected = torch.stack(
        [weights[i] / 2 * (unit(student[i]) - teacher[i]).square().sum() for i in range(patches)]
    ).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    actual, wanted = (torch.autograd.grad(x, student)[0] for x in (found, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_a_batch_without_masked_patches_has_zero_loss() -> None:
    student = torch.zeros(0, WIDTH, requires_grad=True)
    loss_of = SimdinoPatchesLossConfig(weight=1.0, head="head").build(WIDTH)
    masks = PatchMasks.of(torch.zeros(2, 3, 4, dtype=torch.bool))
    targets = loss_of.targets_for(Encoding(student, 2, {}, {"head": student.detach()}), CLOCK)
    loss = loss_of(Encoding(student, 2, {}, {"head": student}), targets, masks)
    loss.backward()
    assert loss == 0
    assert loss_of.metrics(targets, loss.detach(), CLOCK)["spread"].isnan()

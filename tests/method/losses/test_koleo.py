from __future__ import annotations

import math

import pytest
import torch

from dinocli.engine.schedules import Clock
from dinocli.method.losses.koleo import KoleoLossConfig, koleo_loss
from dinocli.models.network import Encoding

CLOCK = Clock(1, 1)


def compute_by_loops(cls: torch.Tensor) -> torch.Tensor:
    """Compute the definition: the distance of each image to its nearest neighbour, by loops over pairs."""
    terms = []
    for i, one in enumerate(cls):
        distances = [(one / one.norm() - other / other.norm()).norm() for j, other in enumerate(cls) if j != i]
        terms.append(-(torch.stack(distances).min() + 1e-8).log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("images", [2, 3, 10])
@pytest.mark.parametrize("width", [2, 5, 48])
def test_equals_the_definition(images: int, width: int) -> None:
    torch.manual_seed(0)
    cls = torch.randn(images, width, dtype=torch.float64, requires_grad=True)
    loss, expected = koleo_loss(cls), compute_by_loops(cls)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, cls)[0] for x in (loss, expected)), rtol=1e-10, atol=1e-13)


def test_the_nearest_neighbour_is_never_the_image_itself() -> None:
    cls = torch.tensor([[3.0, 0, 0], [-2.0, 0, 0]], dtype=torch.float64)
    assert koleo_loss(cls).item() == pytest.approx(-math.log(2))


def test_minimizing_the_loss_spreads_features_evenly() -> None:
    torch.manual_seed(0)
    cls = (torch.tensor([1.0, 0.0]) + 0.1 * torch.randn(8, 2)).requires_grad_()
    optimizer = torch.optim.Adam([cls], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        koleo_loss(cls).backward()
        optimizer.step()
    angles = torch.atan2(*cls.detach().T).sort().values
    gaps = torch.cat([angles.diff(), (angles[:1] - angles[-1:]) + 2 * math.pi])
    assert gaps.min() > 0.8 * 2 * math.pi / 8


def equal(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(4, 16, dtype=dtype)


def nearly_equal(dtype: torch.dtype) -> torch.Tensor:
    return (1 + 1e-7 * torch.randn(4, 16, dtype=torch.float64)).to(dtype)


def zero(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(4, 16, dtype=dtype)


def huge(dtype: torch.dtype) -> torch.Tensor:
    return 6e4 * torch.randn(4, 16).sign().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make_features", [equal, nearly_equal, zero, huge])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradient_are_finite_for_any_features(make_features, dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    cls = make_features(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = koleo_loss(cls)
    loss.backward()
    assert loss.isfinite()
    assert loss <= -math.log(1e-8) + 1e-3
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert cls.grad.isfinite().all()


def test_autocast_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    cls = 1 + 0.01 * torch.randn(32, 64)  # so near that products in bfloat16 find other neighbours
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = koleo_loss(cls)
    assert under_autocast.equal(koleo_loss(cls))


def test_a_single_image_has_zero_loss() -> None:
    cls = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert loss == 0
    assert cls.grad.eq(0).all()


def test_the_module_sums_the_losses_of_the_global_views() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 6, 8), torch.randn(2, 6, 8)
    loss_of = KoleoLossConfig(weight=0.1).build()
    assert loss_of.targets_for(Encoding(teacher, 2, {}), CLOCK) is None
    loss = loss_of(Encoding(student, 2, {}), None, None)
    terms = torch.stack([compute_by_loops(student[0]), compute_by_loops(student[1])])
    torch.testing.assert_close(loss, 0.1 * terms.sum())
    metrics = loss_of.metrics(None, loss, CLOCK)
    torch.testing.assert_close(metrics["distance"], (-terms.mean()).exp())
    loss_of.after_step()
    assert not loss_of.state_dict()

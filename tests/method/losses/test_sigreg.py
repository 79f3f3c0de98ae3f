from __future__ import annotations

import pytest
import torch

from dinocli.engine.schedules import Clock
from dinocli.method.losses.sigreg import SigregLossConfig, characteristic, gaussian_distance
from dinocli.models.network import Encoding

CLOCK = Clock(1, 1)


def compute_by_loops(tokens: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Compute the definition: the integral over [-3, 3] of each projection by the trapezoidal rule, in 33 knots."""
    values = []
    for direction in directions.T:
        x = tokens @ direction
        integrand = []
        for s in torch.linspace(-3, 3, 33, dtype=torch.float64):
            phi = torch.complex((s * x).cos(), (s * x).sin()).mean()
            integrand.append((phi - (-(s**2) / 2).exp()).abs().square() * (-(s**2) / 2).exp())
        values.append(len(x) * torch.trapezoid(torch.stack(integrand), dx=6 / 32))
    return torch.stack(values).mean()


@pytest.mark.parametrize("images", [1, 2, 9])
def test_value_and_gradient_equal_the_definition(images: int) -> None:
    torch.manual_seed(0)
    tokens = (1 + 2 * torch.randn(images, 5, dtype=torch.float64)).requires_grad_()
    directions = torch.nn.functional.normalize(torch.randn(5, 7, dtype=torch.float64), dim=0)
    loss = gaussian_distance(characteristic(tokens, directions), images)
    expected = compute_by_loops(tokens, directions)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(x, tokens)[0] for x in (loss, expected)), rtol=1e-10, atol=1e-10)


def statistic(cls: torch.Tensor) -> float:
    loss_of = SigregLossConfig(weight=0.1, slices=256).build()
    encoding = Encoding(cls, len(cls), {})
    loss_of.draw(CLOCK, cls.shape[-1], cls.device)
    assert loss_of.targets_for(encoding, CLOCK) is None
    loss = loss_of(encoding, None, None)
    metrics = loss_of.metrics(None, loss, CLOCK)
    loss_of.after_step()
    assert not loss_of.state_dict()
    return float(metrics["statistic"])


def test_the_statistic_separates_a_gaussian_from_a_point_and_from_unit_vectors() -> None:
    """The scale of the original: 1.03 for a Gaussian of any number of images, about 0.4 per image for a point."""
    torch.manual_seed(0)
    for images in (64, 256):
        cls = torch.randn(2, images, 128)
        assert statistic(cls) == pytest.approx(1.03, abs=0.1)
        assert statistic(0 * cls) == pytest.approx(0.40 * images, rel=0.02)
        assert statistic(torch.nn.functional.normalize(cls, dim=-1)) == pytest.approx(0.39 * images, rel=0.02)


def test_minimizing_the_loss_makes_features_gaussian() -> None:
    torch.manual_seed(0)
    cls = (0.01 * torch.randn(1, 64, 4)).requires_grad_()
    loss_of = SigregLossConfig(weight=1.0, slices=64).build()
    optimizer = torch.optim.Adam([cls], lr=0.05)
    for step in range(200):
        loss_of.draw(Clock(1, 200, step), 4, cls.device)
        loss_of.targets_for(Encoding(cls.detach(), 1, {}), CLOCK)
        optimizer.zero_grad()
        loss_of(Encoding(cls, 1, {}), None, None).backward()
        optimizer.step()
    covariance = cls.detach()[0].T.cov()
    torch.testing.assert_close(covariance, torch.eye(4), rtol=0, atol=0.25)


def test_directions_are_those_of_the_step_and_global_views_alone_count() -> None:
    torch.manual_seed(0)
    cls, state = torch.randn(4, 8, 16), torch.get_rng_state()
    loss_of = SigregLossConfig(weight=1.0, slices=8).build()

    def compute(views: torch.Tensor, step: int) -> float:
        loss_of.draw(Clock(1, 9, step), 16, views.device)
        loss_of.targets_for(Encoding(views[:2], 2, {}), CLOCK)
        return float(loss_of(Encoding(views, 2, {}), None, None))

    assert compute(cls, 3) == compute(torch.cat([cls[:2], -cls[2:]]), 3) != compute(cls, 4)
    assert torch.get_rng_state().equal(state), "the networks' random draws stay as they are"


def test_autocast_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    cls = torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = statistic(cls)
    assert under_autocast == statistic(cls)

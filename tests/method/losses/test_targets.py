from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import together
from pydantic import TypeAdapter, ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from dinocli.core.distributed import rank
from dinocli.engine.schedules import Clock, Constant
from dinocli.method.losses.targets import CenteringConfig, SinkhornKnopp, SinkhornKnoppConfig, TargetsConfig

CONFIG = CenteringConfig(kind="centering", momentum=0.75, temperature=Constant(kind="constant", value=0.05))


def test_targets_are_distributions_and_only_update_moves_the_center() -> None:
    rule = CONFIG.build(6)
    logits = torch.randn(2, 3, 6)
    targets = rule(logits, Clock(1, 1))
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 3))
    assert rule.center.eq(0).all()
    rule.update()
    torch.testing.assert_close(rule.center, 0.25 * logits.mean((0, 1)))
    before = rule.center.clone()
    rule.update()
    assert rule.center.equal(before), "without new logits the center does not move"


def test_centering_removes_an_offset_that_all_images_share() -> None:
    rule = CONFIG.build(6)
    offset = torch.tensor([5.0, 0, 0, 0, 0, 0])
    for _ in range(50):
        rule(torch.zeros(2, 3, 6) + offset, Clock(1, 1))
        rule.update()
    torch.testing.assert_close(
        rule(torch.zeros(2, 3, 6) + offset, Clock(1, 1)), torch.full((2, 3, 6), 1 / 6), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("shape", [(2, 3, 6), (7, 6), (1, 6)])
def test_the_center_averages_logits_over_all_leading_dimensions(shape: tuple[int, ...]) -> None:
    rule, logits = CONFIG.build(6), torch.randn(*shape)
    before = logits.clone()
    torch.testing.assert_close(rule(logits, Clock(1, 1)), (logits / 0.05).softmax(-1))
    rule.update()
    torch.testing.assert_close(rule.center, 0.25 * logits.reshape(-1, 6).mean(0))
    assert logits.equal(before)


def sinkhorn(iterations: int, temperature: float = 0.25) -> SinkhornKnopp:
    value = Constant(kind="constant", value=temperature)
    return SinkhornKnoppConfig(kind="sinkhorn_knopp", iterations=iterations, temperature=value).build(0)


def by_exponentials(logits: torch.Tensor, iterations: int, temperature: float) -> torch.Tensor:
    """Compute the published algorithm, sum by sum, with prototypes as rows and samples as columns. [S, K] -> [S, K]"""
    q = (logits / temperature).exp().T.clone()
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] /= q[k].sum() * prototypes
        for s in range(samples):
            q[:, s] /= q[:, s].sum() * samples
    return q.T * samples


@pytest.mark.parametrize("samples", [1, 4, 30])
@pytest.mark.parametrize("prototypes", [1, 5, 40])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_in_logarithms_equals_the_algorithm_in_exponentials(
    samples: int, prototypes: int, iterations: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(samples, prototypes, dtype=torch.float64)
    targets = sinkhorn(iterations)(logits, Clock(1, 1))
    torch.testing.assert_close(targets, by_exponentials(logits, iterations, 0.25), rtol=1e-12, atol=0)


def test_sinkhorn_converges_to_equal_totals_of_all_prototypes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 10, dtype=torch.float64)
    errors = []
    for iterations in (1, 3, 100):
        targets = sinkhorn(iterations)(logits, Clock(1, 1))
        torch.testing.assert_close(targets.sum(1), torch.ones(40, dtype=torch.float64))
        errors.append((targets.sum(0) - 4).abs().max())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 1e-9
    offset = torch.tensor([5.0] + 9 * [0.0])
    torch.testing.assert_close(targets, sinkhorn(100)(logits + offset, Clock(1, 1)))
    assert (((logits + offset) / 0.25).softmax(-1).sum(0) - 4).abs().max() > 30, (
        "a plain softmax gives one prototype nearly everything"
    )


def test_sinkhorn_balances_over_all_views_and_keeps_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 9)
    before = logits.clone()
    targets = sinkhorn(3)(logits, Clock(1, 1))
    assert targets.equal(sinkhorn(3)(logits.flatten(0, 1), Clock(1, 1)).view(2, 6, 9))
    assert logits.equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sinkhorn_accepts_logits_whose_exponentials_overflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (20 * torch.randn(12, 7)).to(dtype)
    assert (logits.float() / 0.04).exp().isinf().any()
    with torch.autocast("cpu", torch.bfloat16):
        targets = sinkhorn(3, 0.04)(logits, Clock(1, 1))
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(12))
    exact = sinkhorn(3, 0.04)(logits.double(), Clock(1, 1))
    torch.testing.assert_close(targets, exact.float(), rtol=1e-3, atol=1e-4)


def by_logarithms(logits: torch.Tensor, iterations: int, temperature: float) -> torch.Tensor:
    """Compute the same, with every iteration in logarithms. [S, K] -> [S, K]"""
    scaled = logits / temperature
    for _ in range(iterations):
        scaled = scaled.log_softmax(0).log_softmax(1)
    return scaled.exp()


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_factors_of_rows_and_columns_equal_iterations_in_logarithms(scale: float, iterations: int) -> None:
    """Use logits far beyond the range of exponentials, and prototypes that no sample prefers."""
    torch.manual_seed(0)
    logits = scale * torch.randn(50, 30, dtype=torch.float64)
    logits[:, :5] -= 30 * scale
    logits[:9] += 10 * scale
    targets = sinkhorn(iterations, 0.04)(logits, Clock(1, 1))
    torch.testing.assert_close(targets, by_logarithms(logits, iterations, 0.04), rtol=1e-10, atol=1e-200)


def test_targets_in_float32_equal_those_of_logarithms_up_to_rounding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 4096).clamp(-1, 1)  # the range of cosines, as heads with unit features and weights have it
    exact = by_logarithms(logits.double(), 3, 0.07)
    targets = sinkhorn(3, 0.07)(logits, Clock(1, 1)).double()
    before = by_logarithms(logits, 3, 0.07).double()
    error, error_before = (((t - exact) / exact).abs().max() for t in (targets, before))
    assert error < 1e-5
    assert error < 2 * error_before, "as exact as iterations in logarithms"


class Products(TorchDispatchMode):
    """Counter of operators on whole matrices, and of products with a vector among them."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.all, self.products = numbers, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and any(isinstance(x, torch.Tensor) and x.numel() == self.numbers for x in (*args, result)):
            self.all += 1
            self.products += func._schema.name in ("aten::mv", "aten::addmv", "aten::mm")
        return result


def test_a_further_iteration_is_two_products_with_the_matrix() -> None:
    counts = []
    for iterations in (2, 3, 6):
        with Products(12 * 7) as count:
            sinkhorn(iterations)(torch.randn(12, 7), Clock(1, 1))
        counts.append((count.all, count.products))
    assert [products for _, products in counts] == [2, 4, 10]
    assert len({total - products for total, products in counts}) == 1, "nothing else reads the matrix"


LOGITS = 3 * torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def share_of_sinkhorn() -> torch.Tensor:
    """Compute this process's share of the targets; the two processes have different numbers of samples."""
    return sinkhorn(3)(LOGITS[:4] if rank() == 0 else LOGITS[4:], Clock(1, 1))


def test_sinkhorn_balances_over_the_samples_of_all_processes() -> None:
    whole = by_exponentials(LOGITS, 3, 0.25)
    torch.testing.assert_close(torch.cat(together(2, share_of_sinkhorn)), whole, rtol=1e-12, atol=1e-15)
    alone = sinkhorn(3)(LOGITS[:4], Clock(1, 1))
    assert (alone - whole[:4]).abs().max() > 0.01


def test_the_kind_selects_the_rule() -> None:
    constant = {"kind": "constant", "value": 0.04}
    read = TypeAdapter(TargetsConfig).validate_python
    balanced = read({"kind": "sinkhorn_knopp", "iterations": 3, "temperature": constant})
    assert isinstance(balanced.build(9), SinkhornKnopp)
    assert not balanced.build(9).state_dict()
    assert isinstance(read({"kind": "centering", "momentum": 0.9, "temperature": constant}), CenteringConfig)
    with pytest.raises(ValidationError):
        read({"kind": "sinkhorn_knopp", "iterations": 0, "temperature": constant})

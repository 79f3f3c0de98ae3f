from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinocli.core.foreach import move, scale

# Small and large, an empty one, one without dimensions, and one whose memory is not contiguous.
SHAPES = [(3,), (2, 5), (200, 100), (), (0, 4), (130, 130), (7,)]


def drawn(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [*(torch.randn(shape, dtype=dtype) for shape in SHAPES), torch.randn(6, 4, dtype=dtype).T]


@pytest.mark.parametrize("mixed", [False, True])
def test_each_tensor_is_multiplied_by_its_own_factor(mixed: bool) -> None:
    tensors = drawn()
    if mixed:
        tensors[0] = tensors[0].double()
    factors = torch.rand(len(tensors))
    expected = [t * f for t, f in zip(tensors, factors, strict=True)]
    scale(tensors, factors)
    for ours, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 0.004, 0.7, 1.0])
def test_each_tensor_moves_by_the_same_weight(weight: float, dtype: torch.dtype) -> None:
    tensors, towards = drawn(dtype), [t + 1 for t in drawn(dtype)]
    expected = [t + weight for t in tensors]
    before = [t.clone() for t in tensors]
    move(tensors, towards, torch.tensor(weight, dtype=dtype))
    for ours, wanted, old in zip(tensors, expected, before, strict=True):
        torch.testing.assert_close(ours, wanted)
        assert weight or torch.equal(ours, old)


def test_small_tensors_share_their_launches() -> None:
    few, many = ([torch.ones(4) for _ in range(n)] for n in (2, 200))
    counts = []
    for tensors in (few, many):
        with torch.profiler.profile() as profile:
            scale(tensors, torch.ones(len(tensors)))
        counts.append(sum(event.count for event in profile.key_averages() if event.key in ("aten::mul_", "aten::cat")))
    assert counts[0] == counts[1]

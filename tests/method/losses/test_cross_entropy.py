from __future__ import annotations

import pytest
import torch
from conftest import peak_of

from dinocli.method.losses.cross_entropy import Chunk, cross_entropy, entropy


def compute_by_loops(logits: torch.Tensor, chunks: list[Chunk], temperature: float, share: float) -> torch.Tensor:
    total = 0 * logits.sum()
    for where, targets, weights in chunks:
        for i, row in enumerate(logits[where]):
            for target in targets:
                weight = 1 if weights is None else weights[i]
                total = total - weight * share * (target[i] * torch.log_softmax(row / temperature, -1)).sum()
    return total


def make_chunks(count: int, rows: int, prototypes: int, *, weighted: bool) -> list[Chunk]:
    """Return a chunk with two targets per row, one without targets, and all others with one target per row."""
    places = [slice(first, first + rows) for first in range(0, count, rows)]
    chunks = []
    for i, place in enumerate(places):
        size = len(range(count)[place])
        targets = [torch.randn(size, prototypes, dtype=torch.float64).softmax(-1) for _ in range((2, 0, 1)[min(i, 2)])]
        chunks.append(Chunk(place, targets, torch.rand(size, dtype=torch.float64) if weighted else None))
    return chunks


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (7, 2), (9, 3), (5, 8)])
@pytest.mark.parametrize("prototypes", [1, 2, 33])
def test_equals_the_definition(count: int, rows: int, prototypes: int, weighted: bool) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(count, prototypes, dtype=torch.float64)
    logits.requires_grad_()
    chunks = make_chunks(count, rows, prototypes, weighted=weighted)
    loss, expected = cross_entropy(logits.clone(), chunks, 0.2, 0.7), compute_by_loops(logits, chunks, 0.2, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(3 * value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_the_gradient_keeps_small_differences_between_large_logits() -> None:
    """For large logits of similar size, exp(s - logsumexp(s)) in float32 has the rounding error of s."""
    torch.manual_seed(0)
    exact = (1e3 + torch.randn(4, 64)).double().requires_grad_()
    targets = torch.randn(4, 64).softmax(-1)
    cross_entropy(exact.clone(), [Chunk(slice(None), [targets.double()])], 0.1).backward()
    single = exact.detach().float().requires_grad_()
    cross_entropy(single.clone(), [Chunk(slice(None), [targets])], 0.1).backward()
    rounded = (single.double() / 0.1).float()
    naive = ((rounded - rounded.logsumexp(-1, keepdim=True)).exp() - targets) / 0.1
    error = (single.grad.double() - exact.grad).abs().max()
    assert error < 0.5 * (naive.double() - exact.grad).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_processed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 40).to(dtype), torch.randn(6, 40).softmax(-1)
    chunks = [Chunk(slice(None), [targets, targets.flip(0)])]
    expected = cross_entropy(logits.float(), chunks, 0.1)
    loss = cross_entropy(logits, chunks, 0.1)
    assert loss.dtype == torch.float32
    assert loss.equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(logits, chunks, 0.1).equal(expected), "autocast does not reduce the precision"
    halves = [Chunk(slice(None), [targets.to(dtype), targets.flip(0).to(dtype)])]
    torch.testing.assert_close(cross_entropy(logits, halves, 0.1), expected, rtol=0.01, atol=0)


def test_a_scaled_float16_gradient_keeps_what_an_unscaled_one_loses() -> None:
    torch.manual_seed(0)
    exact = torch.randn(4, 4096, dtype=torch.float64, requires_grad=True)
    targets = torch.full((4, 4096), 1 / 4096)
    chunks, share = [Chunk(slice(None), [targets])], 1e-4
    narrow = exact.detach().half().requires_grad_()
    cross_entropy(exact.clone(), chunks, 1.0, share).backward()
    (1024 * cross_entropy(narrow.clone(), chunks, 1.0, share)).backward()
    assert exact.grad.abs().median() < 3e-8, "half of the smallest number of float16"
    torch.testing.assert_close(narrow.grad.double() / 1024, exact.grad, rtol=0.02, atol=1e-10)


def test_only_one_chunk_at_a_time_is_copied() -> None:
    rows, prototypes = 64, 4096
    logits = torch.zeros(rows, prototypes, dtype=torch.bfloat16, requires_grad=True).clone()
    target = torch.full((rows, prototypes), 1 / prototypes)

    def measure_peak(chunk_rows: int) -> int:
        slices = [slice(first, first + chunk_rows) for first in range(0, rows, chunk_rows)]
        return peak_of(lambda: cross_entropy(logits, [Chunk(part, [target[part]]) for part in slices], 0.1))

    whole = 4 * rows * prototypes
    assert measure_peak(8) < whole / 2
    assert measure_peak(rows) > 1.9 * whole


def test_entropy_is_in_nats() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(entropy(p), torch.tensor([2.0, 1.0, 3.0]).log())

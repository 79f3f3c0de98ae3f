from __future__ import annotations

import torch

from dinocli.core.device import exactly


def test_products_are_as_fine_as_their_factors() -> None:
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with exactly(a.device):
            assert torch.equal(a @ a, torch.mm(a, a))
            assert (a @ a).dtype == torch.float32


def test_where_nothing_is_rounded_nothing_is_done() -> None:
    with exactly(torch.device("meta")):
        assert torch.empty(2, 2, device="meta").matmul(torch.empty(2, 2, device="meta")).shape == (2, 2)

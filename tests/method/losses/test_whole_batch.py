from __future__ import annotations

import numpy as np
import torch
from conftest import together
from torch import Tensor

from dinocli.core.distributed import rank, size
from dinocli.method.losses.whole_batch import WholeBatchLoss
from dinocli.models.network import Encoding


class Product(WholeBatchLoss):
    """Loss that is the product of the mean features, which is no mean over images."""

    def means(self, student: Encoding, targets: Tensor | None) -> Tensor:
        return student.cls[0].mean(0)

    def forward(self, student: Encoding) -> Tensor:
        return self.over_batch(self.means(student, None)).prod()


def compute(parts: int) -> tuple[list[float], np.ndarray]:
    """Return the loss of each part of this process's images, and the gradient as the engine adds it up."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    mine = (images.chunk(size())[rank()] * scale).chunk(parts)
    encoded = [Encoding(part[None], 1, {}) for part in mine]
    loss_of = Product()
    with torch.no_grad():
        loss_of.remember([loss_of.means(part, None) for part in encoded] if parts > 1 else None)
    losses = torch.stack([loss_of(part) for part in encoded])
    (gradient,) = torch.autograd.grad(losses.mean(), scale)
    return losses.tolist(), gradient.numpy()


def test_value_and_gradient_are_those_of_the_whole_batch_for_any_parts_and_processes() -> None:
    (value,), gradient = compute(1)
    assert np.abs(gradient).min() > 0
    for found in ([compute(2)], [compute(4)], together(2, compute, 1), together(2, compute, 2)):
        for values, _ in found:
            np.testing.assert_allclose(values, value, rtol=1e-12)
        np.testing.assert_allclose(np.mean([each for _, each in found], 0), gradient, rtol=1e-12)

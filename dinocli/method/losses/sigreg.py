"""SIGReg: a regularizer that makes class tokens an isotropic Gaussian, by tests of random projections."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dinocli.core.config import Config
from dinocli.core.copies import send
from dinocli.core.device import exactly
from dinocli.core.distributed import size
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.method.losses.whole_batch import WholeBatchLoss
from dinocli.models.network import Encoding

_REACH, _KNOTS = 3.0, 17  # the integral's upper end and its knots, as in LeJEPA's code; the integrand is even


class SigregLossConfig(Config):
    """Loss on the class tokens of the student's backbone, without a head and targets.

    Attributes:
        weight: Factor on this loss in the total.
        slices: Number of random directions per step; 1024 in the published runs.
    """

    weight: float = Field(gt=0)
    slices: int = Field(ge=1)

    def build(self) -> SigregLoss:
        """Build the loss, which has no state."""
        return SigregLoss(self)


class SigregLoss(WholeBatchLoss):
    """Module of `gaussian_distance`, averaged over the global views, for the batch of all processes and parts."""

    def __init__(self, config: SigregLossConfig) -> None:
        super().__init__()
        self.config = config
        self._images = 1  # of the whole batch
        self._directions = torch.empty(0, 0)

    def draw(self, clock: Clock, width: int, device: torch.device) -> None:
        """Draw the directions of a step, the same in all processes and parts, for features of size `width`."""
        generator = torch.Generator("cpu").manual_seed(clock.step)
        drawn = torch.randn(width, self.config.slices, generator=generator, device="cpu")
        directions = send(drawn / torch.linalg.vector_norm(drawn, dim=0), device)
        # In place from the second step on, because a graph of the step reads a fixed address.
        self._directions = self._directions.copy_(directions) if self._directions.numel() else directions

    def targets_for(self, teacher: Encoding, clock: Clock) -> None:
        """Store the number of images; this loss has no targets."""
        self._images = teacher.cls.shape[1] * size()

    def means(self, student: Encoding, targets: Tensor | None) -> Tensor:
        """Compute the characteristic function of each projection. [2, G, S, knots]"""
        return characteristic(student.cls[: student.globals], self._directions)

    def forward(self, student: Encoding, targets: None, masks: PatchMasks | None) -> Tensor:  # -> []
        found = self.over_batch(self.means(student, None))
        return self.config.weight * gaussian_distance(found, self._images).mean()

    def metrics(self, targets: None, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return the `statistic` of the test: about 1 for a Gaussian, 0.4 per image of the batch if all are 0."""
        return {"statistic": loss / self.config.weight}

    def after_step(self) -> None:
        """Forget the means of the batch."""
        self.remember(None)


def characteristic(tokens: Tensor, directions: Tensor) -> Tensor:
    """Compute the empirical characteristic function of projections, at the knots of `gaussian_distance`.

    Args:
        tokens: Features, which must not be normalized: unit vectors are no Gaussian. [..., B, D]
        directions: Unit vectors. [D, S]

    Returns:
        Means over B of the cosine and of the sine. [2, ..., S, knots]
    """
    with exactly(tokens.device):
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        angles = (wide @ directions.to(wide.dtype)).unsqueeze(-1) * _knots(wide)  # [..., B, S, knots]
        return torch.stack([angles.cos().mean(-3), angles.sin().mean(-3)])


def gaussian_distance(found: Tensor, images: int) -> Tensor:
    """Compute Epps and Pulley's statistic of a standard normal distribution, averaged over the projections.

    T = N * integral of |phi(s) - exp(-s^2 / 2)|^2 exp(-s^2 / 2) ds over [-3, 3], with the trapezoidal rule.

    Args:
        found: Characteristic function, as `characteristic` returns it. [2, ..., S, knots]
        images: Number N of images that it is a mean of.

    Returns:
        [...]

    Source: LeJEPA (arXiv 2511.08544), SIGReg; knots and range as in rbalestr-lab/lejepa@eddffdd.
    """
    knots = _knots(found)
    normal = (-knots.square() / 2).exp()
    weights = 2 * normal * _REACH / (_KNOTS - 1)
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    cosine, sine = found
    return images * ((cosine - normal).square() + sine.square()).mul(weights).sum(-1).mean(-1)


def _knots(like: Tensor) -> Tensor:
    return torch.linspace(0, _REACH, _KNOTS, dtype=like.dtype, device=like.device)

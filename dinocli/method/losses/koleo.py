"""KoLeo loss: a regularizer that spreads class tokens evenly, by pushing each away from its nearest neighbour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.config import Config
from dinocli.core.device import exactly
from dinocli.core.distributed import mean_over_processes
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.models.network import Encoding


class KoleoLossConfig(Config):
    """Loss on the class tokens of the student's backbone, without a head and targets.

    Attributes:
        weight: Factor on this loss in the total.
    """

    weight: float = Field(gt=0)

    def build(self) -> KoleoLoss:
        """Build the loss, which has no state."""
        return KoleoLoss(self)


class KoleoLoss(nn.Module):
    """Module of `koleo_loss`, which is summed over the global views.

    Neighbours are images of the same process and, with `--accumulate`, of the same part. Among fewer images the nearest
    neighbour is farther away, so smaller parts weaken the loss. A part of one image has no neighbour and a loss of 0.
    """

    def __init__(self, config: KoleoLossConfig) -> None:
        super().__init__()
        self.config = config
        self._views = 1  # number of views that the loss sums over

    def targets_for(self, teacher: Encoding, clock: Clock) -> None:
        """Store the number of global views; this loss has no targets."""
        self._views = teacher.globals

    def forward(self, student: Encoding, targets: None, masks: PatchMasks | None) -> Tensor:  # -> []
        return self.config.weight * torch.stack([koleo_loss(cls) for cls in student.cls[: student.globals]]).sum()

    def metrics(self, targets: None, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return the geometric mean `distance` to the nearest neighbour, from 0 to 2; near 0, features coincide."""
        # Average over the processes before the exponential, for one geometric mean over all images.
        return {"distance": (-mean_over_processes(loss) / self.config.weight / self._views).exp()}

    def after_step(self) -> None:
        """Do nothing: this loss keeps no state between steps."""


def koleo_loss(cls: Tensor, eps: float = 1e-8) -> Tensor:
    """Compute -mean log(distance to the nearest neighbour + eps) of features on the unit sphere.

    Up to a factor and a constant, it is the negative differential entropy of the features, as estimated by Kozachenko
    and Leonenko. Distances are computed in at least float32, even under autocast: in float16 eps would be 0, and the
    loss of two equal features infinite.

    Args:
        cls: Features, which need not have unit length. [B, D]
        eps: Offset that keeps the logarithm finite for equal features, which get no gradient from one another.

    Returns:
        The loss; 0 for a single image, which has no neighbour. []

    Source: arXiv 1806.03198, equation 2; arXiv 2304.07193, section 4; facebookresearch/dinov2@b8931f7
    dinov2/loss/koleo_loss.py.
    """
    with exactly(cls.device):
        x = F.normalize(cls.to(torch.promote_types(cls.dtype, torch.float32)), dim=-1, eps=eps)
        if len(x) < 2:
            return 0 * x.sum()  # a 0 with a gradient, so that backward runs
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-torch.inf).argmax(-1)  # [B]
        # From differences, because the inner product of two near features loses their distance to rounding.
        distances = torch.linalg.vector_norm(x - x[nearest], dim=-1)  # [B]
        return -(distances + eps).log().mean()

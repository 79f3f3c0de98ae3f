"""The KoLeo loss: it spreads the images' class tokens evenly, by pushing each away from the nearest other one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dinocli.config import Config
from dinocli.data.masking import Masks
from dinocli.distributed import mean_over_processes
from dinocli.models.network import Encoding
from dinocli.precision import exactly
from dinocli.schedules import Clock


class KoleoLossConfig(Config):
    """The loss on the student's class tokens as the backbone makes them; it has no head and no targets.

    Attributes:
        weight: Its share in the total.
    """

    weight: float = Field(gt=0)

    def build(self) -> KoleoLoss:
        """The loss; it has no state."""
        return KoleoLoss(self)


class KoleoLoss(nn.Module):
    """`koleo_loss` of each global view apart, summed over the views.

    An image's neighbours are the images of the same process; where a batch is taken in parts (`--accumulate`), those of
    the same part. Few images have far neighbours, so that in small parts it pushes less; a part of one image has none.
    """

    def __init__(self, config: KoleoLossConfig) -> None:
        super().__init__()
        self.config = config
        self._views = 1  # that the loss is a sum of

    def aim(self, teacher: Encoding, clock: Clock) -> None:
        """There are no targets."""
        self._views = teacher.globals

    def forward(self, student: Encoding, targets: None, masks: Masks | None) -> Tensor:  # -> []
        return self.config.weight * torch.stack([koleo_loss(cls) for cls in student.cls[: student.globals]]).sum()

    def watch(self, targets: None, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """The geometric mean of the distances to the nearest others, which are 0 to 2; towards 0 images look alike."""
        # Of all processes first: the mean of their geometric means would be another number.
        return {"distance": (-mean_over_processes(loss) / self.config.weight / self._views).exp()}

    def after_step(self) -> None:
        """Nothing is kept from one step to the next."""


def koleo_loss(cls: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean log(distance to the nearest other + eps), of features on the unit sphere.

    Minus the differential entropy of what the features are drawn from, as Kozachenko and Leonenko estimate it, but for
    factor and constant. Distances are worked out in float32 at least, whatever autocast says: in float16 eps is 0, and
    the loss of two equal features is infinite.

    Args:
        cls: Features of any length. [B, D]
        eps: Keeps the logarithm of equal features' distance finite; these get no gradient from one another.

    Returns:
        [] 0 for one image alone, which has no other.

    Source: arXiv 1806.03198, equation 2; arXiv 2304.07193, section 4; facebookresearch/dinov2@b8931f7
    dinov2/loss/koleo_loss.py.
    """
    with exactly(cls.device):
        x = F.normalize(cls.to(torch.promote_types(cls.dtype, torch.float32)), dim=-1, eps=eps)
        if len(x) < 2:
            return 0 * x.sum()
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-torch.inf).argmax(-1)  # [B]
        # Of the difference, since what the product of two near features says of their distance is rounded away.
        distances = torch.linalg.vector_norm(x - x[nearest], dim=-1)  # [B]
        return -(distances + eps).log().mean()

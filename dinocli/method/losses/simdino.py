"""SimDINO losses: squared distances of unit features, and an expansion term that keeps them apart. No prototypes."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.device import exactly
from dinocli.core.distributed import mean_over_processes, size
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.method.losses.targets import HeadLossConfig
from dinocli.method.losses.whole_batch import WholeBatchLoss
from dinocli.models.network import Encoding, Reads


class SimdinoLossConfig(HeadLossConfig):
    """Loss on class tokens: half the squared distance between views, minus the coding rate of the global views.

    Attributes:
        eps: Squared distance up to which features count as the same in the coding rate. Smaller values spread features
            over more directions.
        with_teacher: If True, the coding rate is that of the mean of the student's and the teacher's features; if
            False, of the student's alone.

    Source: SimDINO (arXiv 2502.10385); RobinWu218/SimDINO@8149fc4.
    """

    reads: ClassVar[Reads] = "class"
    eps: float = Field(gt=0)
    with_teacher: bool

    def build(self, outputs: int) -> SimdinoLoss:
        return SimdinoLoss(self)


class SimdinoPatchesLossConfig(HeadLossConfig):
    """Loss on masked patches: half the squared distance, without an expansion term, as in SimDINOv2."""

    reads: ClassVar[Reads] = "patches"

    def build(self, outputs: int) -> SimdinoPatchesLoss:
        return SimdinoPatchesLoss(self)


class SimdinoLoss(WholeBatchLoss):
    """Module of `view_distance` and `coding_rate`, which is computed over the batch of all processes and parts."""

    def __init__(self, config: SimdinoLossConfig) -> None:
        super().__init__()
        self.config = config
        self._images = 1  # of the whole batch
        self._distances: list[Tensor] = []  # one per part of the step

    def targets_for(self, teacher: Encoding, clock: Clock) -> Tensor:
        """Return the teacher's features of the global views at unit length. [G, B, D]"""
        targets = _normalize(teacher.class_logits[self.config.head])
        self._images, self._distances = targets.shape[1] * size(), []
        return targets

    def means(self, student: Encoding, targets: Tensor | None) -> Tensor:
        """Compute the second moments of each global view's features. [G, D, D]"""
        assert targets is not None
        features = _normalize(student.class_logits[self.config.head][: len(targets)])
        if self.config.with_teacher:
            features = (features + targets) / 2
        with exactly(features.device):
            return features.mT @ features / features.shape[1]

    def forward(self, student: Encoding, targets: Tensor, masks: PatchMasks | None) -> Tensor:  # [G, B, D] -> []
        distance = view_distance(student.class_logits[self.config.head], targets)
        self._distances.append(distance.detach())
        moments = self.over_batch(self.means(student, targets))
        scale = 1 / moments.shape[-1] + 1 / self._images  # gamma of the paper
        return self.config.weight * (distance - scale * coding_rate(moments, self.config.eps).mean())

    def metrics(self, targets: Tensor, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return metrics of training.

        Args:
            targets: Targets of a whole batch, or of this process's share. [G, B, D]
            loss: Mean of the losses that `forward` returned for the parts. []
            clock: Clock of the step.

        Returns:
            `cosine`, the mean cosine of student and teacher; `expansion`, the scaled coding rate; and `spread`, the
            standard deviation of the teacher's features: 1 if they point evenly in all directions, 0 if all are the
            same.
        """
        distance = torch.stack(self._distances).mean()
        return {
            "cosine": 1 - distance,
            "expansion": distance - loss / self.config.weight,
            "spread": (1 - mean_over_processes(targets.mean((0, 1))).square().sum()).clamp(min=0).sqrt(),
        }

    def after_step(self) -> None:
        """Forget the means of the batch."""
        self.remember(None)
        self._distances = []


class SimdinoPatchesLoss(nn.Module):
    """Module of `patch_distance`. In a batch without masks, all patches count equally."""

    def __init__(self, config: SimdinoPatchesLossConfig) -> None:
        super().__init__()
        self.config = config
        self._weights: list[Tensor] = []  # one tensor per part of the step

    def targets_for(self, teacher: Encoding, clock: Clock) -> Tensor:
        """Return the teacher's features of the patches to read, at unit length. [M, D]"""
        self._weights = []
        return _normalize(teacher.masked_logits[self.config.head])

    def forward(self, student: Encoding, targets: Tensor, masks: PatchMasks | None) -> Tensor:  # [M, D] -> []
        weights = targets.new_full((len(targets),), 1 / max(1, len(targets))) if masks is None else masks.weights
        self._weights.append(weights)
        return self.config.weight * patch_distance(student.masked_logits[self.config.head], targets, weights)

    def metrics(self, targets: Tensor, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return `cosine` and `spread` as `SimdinoLoss.metrics` does, as means over the masked crops.

        Args:
            targets: Targets of a whole batch, or of this process's share, in the order of its parts. [M, D]
            loss: Mean of the losses that `forward` returned for the parts. []
            clock: Clock of the step.
        """
        weights = torch.cat(self._weights) / len(self._weights)  # [M], rescaled from a part's mean to the batch's
        share = mean_over_processes(weights.sum())  # of masked crops
        with exactly(targets.device):
            mean = mean_over_processes(weights.to(targets.dtype) @ targets) / share  # [D]; nan without masked crops
        return {
            "cosine": 1 - loss / self.config.weight / share,
            "spread": (1 - mean.square().sum()).clamp(min=0).sqrt(),
        }

    def after_step(self) -> None:
        """Forget the weights of the batch."""
        self._weights = []


def view_distance(student: Tensor, targets: Tensor) -> Tensor:
    """Compute half the squared distance of every view to every other global view, averaged over images and pairs.

    For unit features it is 1 - cosine. The student's first views are the global ones, in the order of the targets.

    Args:
        student: Features, which need not have unit length. [V, B, D]
        targets: Features of unit length. [G, B, D]

    Returns:
        Mean over B and over the G * (V - 1) pairs, in at least float32. []

    Source: arXiv 2502.10385; the distance is computed from inner products, as DINO's pairs are in `dino_loss`.
    """
    features = _normalize(student)
    with exactly(features.device):
        cosines = torch.linalg.vecdot(features, targets.sum(0)).sum()
        cosines = cosines - torch.linalg.vecdot(features[: len(targets)], targets).sum()  # a view and itself
    return 1 - cosines / (len(targets) * (len(student) - 1) * student.shape[1])


def patch_distance(student: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Compute half the squared distance of masked patches, as a weighted sum like that of `ibot_loss`.

    Args:
        student: Features, which need not have unit length. [M, D]
        targets: Features of unit length. [M, D]
        weights: Weight of each patch. [M]

    Returns:
        The weighted sum over M, in at least float32. []
    """
    with exactly(student.device):
        return (weights * (1 - torch.linalg.vecdot(_normalize(student), targets))).sum()


def coding_rate(moments: Tensor, eps: float) -> Tensor:
    """Compute the coding rate R = 1/2 log det(I + D / eps * M) of features with the second moments M, in nats.

    It is low if the features lie in few directions and highest if they fill all evenly: up to eps, the bits that
    features need. Computed in at least float32; in lower precision the determinant is not reliable.

    Args:
        moments: Mean of z z^T over the features z. [..., D, D]
        eps: Squared distance up to which features count as the same.

    Returns:
        [...]

    Source: arXiv 2502.10385, after arXiv 2006.08558, equation 2.
    """
    width = moments.shape[-1]
    with exactly(moments.device):
        scaled = torch.eye(width, dtype=moments.dtype, device=moments.device) + width / eps * moments
        # Without the check of `cholesky`, for which the host would wait; the matrix is positive definite or nan.
        factor, _ = torch.linalg.cholesky_ex(scaled)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _normalize(features: Tensor) -> Tensor:
    """Return features at unit length in at least float32: a head's own norm is rounded under autocast."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

"""iBOT loss: the student predicts the teacher's output on masked patches, which only the teacher sees.

With a weight for visible patches (iBOT++), it predicts the output on the visible patches of masked crops too.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.device import exactly
from dinocli.core.distributed import mean_over_processes
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.method.losses.cross_entropy import CHUNK_LOGITS, Chunk, cross_entropy, entropy
from dinocli.method.losses.targets import PrototypeLossConfig
from dinocli.models.network import Encoding, Reads


class IbotLossConfig(PrototypeLossConfig):
    """Loss on masked patches.

    Attributes:
        visible: Weight of the visible patches of masked crops, relative to the masked ones. If 0, heads do not read
            them, as in iBOT.

    Source: iBOT++ in TIPSv2 (arXiv 2604.12012), which gives both kinds the weight 1.
    """

    reads: ClassVar[Reads] = "patches"
    visible: float = Field(0.0, ge=0)

    def build(self, prototypes: int) -> IbotLoss:
        return IbotLoss(self, prototypes)


class IbotLoss(nn.Module):
    """Module of `ibot_loss`, with the state of its targets.

    In a batch without masks, all patches count equally. With `visible`, masks must be those of
    `PatchMasks.with_visible`.
    """

    def __init__(self, config: IbotLossConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = config.targets.build(prototypes)
        self._weights: list[Tensor] = []  # one tensor per part of the step

    def targets_for(self, teacher: Encoding, clock: Clock) -> Tensor:
        """Compute the targets of a whole batch from the teacher's logits of the patches to read. [M, K]"""
        self._weights = []
        targets: Tensor = self.targets(teacher.masked_logits[self.config.head], clock)
        return targets

    def forward(self, student: Encoding, targets: Tensor, masks: PatchMasks | None) -> Tensor:  # [M, K] -> []
        logits = student.masked_logits[self.config.head]  # [M, K]
        weights = targets.new_full((len(targets),), 1 / max(1, len(targets))) if masks is None else masks.weights
        self._weights.append(weights)
        return self.config.weight * ibot_loss(logits, targets, weights, self.config.student_temperature)

    def metrics(self, targets: Tensor, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return metrics of training.

        Args:
            targets: Targets of a whole batch, or of this process's share, in the order of its parts. [M, K]
            loss: Mean of the losses that `forward` returned for the parts. []
            clock: Clock of the step, for the teacher's temperature.

        Returns:
            `teacher_entropy`, the entropy of the targets; `kl`, the student's divergence from them; `information`, the
            mutual information of targets and masked patches (0 if all patches have the same target, nan if none is
            masked), all in nats and as means over the masked crops; and the teacher's `temperature`. With `visible`,
            visible patches count in these means by their weight.
        """
        weights = torch.cat(self._weights) / len(self._weights)  # [M], rescaled from a part's mean to the batch's
        # The share of masked crops over all processes, which may have different numbers of them.
        share = mean_over_processes(weights.sum())
        divisor = share.clamp(min=torch.finfo(share.dtype).tiny)  # without masked crops, metrics are 0 and not nan
        weights = weights / divisor
        mean_entropy = (weights * entropy(targets)).sum()
        with exactly(targets.device):
            mean = mean_over_processes(weights.to(targets.dtype) @ targets)  # [K]
        information = entropy(mean) - mean_over_processes(mean_entropy)
        return {
            "teacher_entropy": mean_entropy,
            "kl": loss / self.config.weight / divisor - mean_entropy,
            "information": information.where(share > 0, torch.nan),  # 0 would be taken for collapse
            "temperature": clock.value(self.targets.config.temperature),
        }

    def after_step(self) -> None:
        """Update the state of the targets after a step."""
        self.targets.update()
        self._weights = []


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of each masked patch against the teacher's output on it, as a weighted sum.

    With `PatchMasks.weights`, it is the mean over a crop's masked patches, so that crops with few and with many masked
    patches count equally. The sum of these means is divided by the number of all global crops, as in DINOv2. So if only
    half of the crops have a mask, the loss effectively has half of its `weight`.

    Args:
        student: Logits. [M, K] Overwritten with their gradient if they require one.
        targets: Distributions that sum to 1 over K. [M, K]
        weights: Weight of each patch. [M]
        temperature: Divisor of the student's logits.

    Returns:
        The weighted sum over M, in at least float32. []

    Source: arXiv 2111.07832, equation 2; facebookresearch/dinov2@b8931f7 dinov2/loss/ibot_patch_loss.py,
    iBOTPatchLoss.forward_masked.
    """
    rows = max(1, CHUNK_LOGITS // student.shape[-1])
    slices = [slice(first, first + rows) for first in range(0, len(student), rows)]
    chunks = [Chunk(part, [targets[part]], weights[part]) for part in slices]
    return cross_entropy(student, chunks, temperature)

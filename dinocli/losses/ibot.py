"""The iBOT loss: the student says of patches that it cannot see what the teacher, who sees them, says of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dinocli.config import Config
from dinocli.data.masking import Masks
from dinocli.distributed import mean_over_processes
from dinocli.losses.cross_entropy import Chunk, cross_entropy, entropy
from dinocli.losses.targets import TargetsConfig
from dinocli.models.network import Encoding, Reads
from dinocli.precision import exactly
from dinocli.schedules import Clock


class IbotLossConfig(Config):
    """The loss on hidden patches.

    Attributes:
        weight: Its share in the total.
        head: Name of the head that reads the hidden patches; a loss on class tokens may name the same.
        student_temperature: Divides the student's logits.
        targets: How the teacher's logits become targets.
    """

    reads: ClassVar[Reads] = "patches"
    weight: float = Field(gt=0)
    head: str
    student_temperature: float = Field(gt=0)
    targets: TargetsConfig

    def build(self, prototypes: int) -> IbotLoss:
        """The loss with its targets' state at the start."""
        return IbotLoss(self, prototypes)


_AT_ONCE = 2**24  # logits, of which two copies in float32 take 128 MiB; larger chunks are no quicker


class IbotLoss(nn.Module):
    """`ibot_loss` with the state of its targets.

    A batch without masks counts all patches that the head has read alike.
    """

    def __init__(self, config: IbotLossConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = config.targets.build(prototypes)
        self._weights: list[Tensor] = []  # of each part of the step

    def aim(self, teacher: Encoding, clock: Clock) -> Tensor:
        """What the student is to say of a whole batch, from what the teacher says of its hidden patches. [M, K]"""
        self._weights = []
        targets: Tensor = self.targets(teacher.hidden[self.config.head], clock)
        return targets

    def forward(self, student: Encoding, targets: Tensor, masks: Masks | None) -> Tensor:  # [M, K] -> []
        logits = student.hidden[self.config.head]  # [M, K]
        weights = targets.new_full((len(targets),), 1 / max(1, len(targets))) if masks is None else masks.weights
        self._weights.append(weights)
        return self.config.weight * ibot_loss(logits, targets, weights, self.config.student_temperature)

    def watch(self, targets: Tensor, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """What tells whether the student learns.

        Args:
            targets: Of a whole batch, or this process's share, in the order of its parts. [M, K]
            loss: The mean of what `forward` gave for these. []
            clock: Of the step.

        Returns:
            Entropy of the targets and divergence of the student from them, in nats, as means over the crops that have
            a mask; how many nats a hidden patch's targets tell of it (0 where all patches get the same, nan where
            none is hidden); and the teacher's temperature.
        """
        weights = torch.cat(self._weights) / len(self._weights)  # of a part's mean to those of the batch's. [M]
        # Of all processes, which may have masked crops in other numbers.
        share = mean_over_processes(weights.sum())
        masked = share.clamp(min=torch.finfo(share.dtype).tiny)  # where no crop has a mask, figures are 0 and not nan
        weights = weights / masked
        uncertain = (weights * entropy(targets)).sum()
        with exactly(targets.device):
            mean = mean_over_processes(weights.to(targets.dtype) @ targets)  # [K]
        information = entropy(mean) - mean_over_processes(uncertain)
        return {
            "teacher_entropy": uncertain,
            "kl": loss / self.config.weight / masked - uncertain,
            "information": information.where(share > 0, torch.nan),  # of nothing hidden, collapse cannot be told
            "temperature": self.targets.config.temperature.at(clock),
        }

    def after_step(self) -> None:
        """Let the targets learn from the step that was done."""
        self.targets.update()
        self._weights = []


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every hidden patch against what the teacher says of the same patch, as a weighted sum.

    With `Masks.weights` it is the mean over a masked crop's hidden patches, so that one with few of them counts as much
    as one with many, summed over the masked crops and divided by the number of all global crops, as in DINOv2: where
    half of the crops have a mask, its weight in the total is half of what it says.

    Args:
        student: Logits. [M, K] Where a gradient is wanted they are used up: it is written over them.
        targets: Distributions that sum to 1 over K. [M, K]
        weights: [M]
        temperature: Divides the student's logits.

    Returns:
        The weighted sum over M, in at least float32. []

    Source: arXiv 2111.07832, equation 2; facebookresearch/dinov2@b8931f7 dinov2/loss/ibot_patch_loss.py,
    iBOTPatchLoss.forward_masked.
    """
    rows = max(1, _AT_ONCE // student.shape[-1])
    places = [slice(first, first + rows) for first in range(0, len(student), rows)]
    chunks = [Chunk(place, [targets[place]], weights[place]) for place in places]
    return cross_entropy(student, chunks, temperature)

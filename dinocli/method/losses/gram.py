"""Gram loss: the similarities between a student's patches stay near those of an earlier, frozen average."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.config import Config
from dinocli.core.device import exactly
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock, Schedule
from dinocli.models.network import Encoding


class GramLossConfig(Config):
    """Gram anchoring, without a head. The Gram teacher is a frozen copy of the student's moving average.

    Attributes:
        weight: Factor on this loss in the total.
        first_update: Epoch at whose start the average is copied for the first time. Before it, there is no Gram loss.
        update_every: Epochs between copies. If None, the first copy stays.
        max_updates: Largest number of copies, the first included. If None, there is no limit.
        class_tokens: Weight of the cosine distance between the class tokens of student and Gram teacher, relative to
            that of the patches. DINOv3 has no such term.
        scale: Side of the Gram teacher's crops relative to the student's. Features of larger crops are downsampled to
            the student's grid.

    Source: DINOv3 (arXiv 2508.10104), section 4.
    """

    weight: Schedule
    first_update: int = Field(0, ge=0)
    update_every: int | None = Field(None, ge=1)
    max_updates: int | None = Field(None, ge=1)
    class_tokens: float = Field(0.0, ge=0)
    scale: float = Field(1.0, ge=1, le=8)

    def build(self) -> GramLoss:
        """Build the loss, which has no state: the Gram teacher belongs to the method."""
        return GramLoss(self)

    def is_active(self, clock: Clock) -> bool:
        """Return True if the average has been copied by this step, or is copied at its start."""
        return clock.step >= self.first_update * clock.steps_per_epoch

    def is_update(self, clock: Clock) -> bool:
        """Return True if the average is to be copied at the start of this step."""
        since = clock.step - self.first_update * clock.steps_per_epoch
        if since <= 0 or self.update_every is None:
            return since == 0
        copies, rest = divmod(since, self.update_every * clock.steps_per_epoch)
        return rest == 0 and (self.max_updates is None or copies < self.max_updates)


class Anchor(NamedTuple):
    """Features of the Gram teacher for the global views.

    Attributes:
        cls: Class tokens. [G, B, D]
        patches: Patch tokens on the student's grid. [G, B, N, D]
    """

    cls: Tensor
    patches: Tensor


class GramLoss(nn.Module):
    """Module of `gram_loss` over the global views."""

    def __init__(self, config: GramLossConfig) -> None:
        super().__init__()
        self.config = config
        self._weight: float | Tensor = 0.0

    def targets_for(self, teacher: Encoding, clock: Clock) -> None:
        """Store the weight of the step; the targets come from the Gram teacher, not from the teacher."""
        self._weight = clock.value(self.config.weight)

    def forward(self, student: Encoding, anchor: Anchor | None, masks: PatchMasks | None) -> Tensor:  # -> []
        """Compute the weighted loss from the Gram teacher's features; 0 if there are none yet."""
        if anchor is None or student.patches is None:
            return student.cls.new_zeros((), dtype=torch.promote_types(student.cls.dtype, torch.float32))
        loss = gram_loss(student.patches.flatten(0, 1), anchor.patches.flatten(0, 1))
        if self.config.class_tokens:
            own = student.cls[: student.globals].float()
            loss = loss + self.config.class_tokens * (1 - F.cosine_similarity(own, anchor.cls.float(), dim=-1)).mean()
        return (self._weight * loss).to(loss.dtype)

    def metrics(self, targets: None, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return the loss's `weight` at this step, which is 0 before the first copy."""
        return {"weight": clock.value(self.config.weight) if self.config.is_active(clock) else 0.0}

    def after_step(self) -> None:
        """Do nothing: this loss keeps no state between steps."""


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of two Gram matrices, over images and all N * N pairs of patches.

    The Gram matrix of an image holds the cosine similarities of its patches. So the loss bounds how patches relate, but
    not the features themselves. It is computed in at least float32, even under autocast.

    Args:
        student: Patch tokens. [B, N, D]
        teacher: Patch tokens on the same grid, which may have another width. [B, N, D']

    Returns:
        The loss. []

    Source: DINOv3 (arXiv 2508.10104), equation 2.
    """
    with exactly(student.device):
        return (_gram_matrices(student) - _gram_matrices(teacher)).square().mean()


def _gram_matrices(patches: Tensor) -> Tensor:  # [B, N, D] -> [B, N, N]
    unit = F.normalize(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1)
    return unit @ unit.mT


def downsampled(patches: Tensor, grid: tuple[int, int], smaller: tuple[int, int]) -> Tensor:
    """Resize the patch tokens of a grid to a smaller one, bicubic with antialiasing; an equal grid changes nothing.

    Args:
        patches: Patch tokens of a grid, row by row. [B, N, D]
        grid: Rows and columns of the patches.
        smaller: Rows and columns of the result.

    Returns:
        [B, N', D], in at least float32 if resized.
    """
    if grid == smaller:
        return patches
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    maps = wide.mT.unflatten(2, grid)  # [B, D, rows, columns]
    return F.interpolate(maps, size=smaller, mode="bicubic", antialias=True, align_corners=False).flatten(2).mT

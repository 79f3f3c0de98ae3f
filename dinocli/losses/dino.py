"""The DINO loss: each view of an image predicts what the teacher says of the other global views."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from dinocli.config import Config
from dinocli.losses.targets import CenteringConfig
from dinocli.schedules import Clock


class DinoLossConfig(Config):
    """The loss on class tokens.

    Attributes:
        weight: Its share in the total.
        head: Name of the head whose logits it reads.
        student_temperature: Divides the student's logits.
        targets: How the teacher's logits become targets.
    """

    weight: float = Field(gt=0)
    head: str
    student_temperature: float = Field(gt=0)
    targets: CenteringConfig

    def build(self, prototypes: int) -> DinoLoss:
        """The loss with its targets' state at the start."""
        return DinoLoss(self, prototypes)


class DinoLoss(nn.Module):
    """`dino_loss` with the state of its targets."""

    def __init__(self, config: DinoLossConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = config.targets.build(prototypes)

    def forward(self, student: Tensor, teacher: Tensor, clock: Clock) -> Tensor:  # [V, B, K], [G, B, K] -> []
        with torch.no_grad():
            targets = self.targets(teacher, clock)
        return self.config.weight * dino_loss(student, targets, self.config.student_temperature)

    def after_step(self) -> None:
        """Let the targets learn from the step that was done."""
        self.targets.update()


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every view against every global view but itself, averaged over images and pairs.

    The global views come first among the student's views, in the same order as in the targets. A student that agrees
    fully with its teacher has a loss equal to the entropy of the targets, not zero.

    Args:
        student: Logits. [V, B, K]
        targets: Distributions that sum to 1 over K. [G, B, K]
        temperature: Divides the student's logits.

    Returns:
        Mean over B and over the G * (V - 1) pairs, in at least float32. []

    Source: arXiv 2104.14294, equation 3; facebookresearch/dino@7c446df main_dino.py, DINOLoss.forward.
    """
    pairs = len(targets) * (len(student) - 1)
    total = student.new_zeros((), dtype=targets.dtype)
    for v, logits in enumerate(student):
        # The cross-entropy is linear in the target, so a view's pairs cost one pass over their summed targets.
        others = [target for g, target in enumerate(targets) if g != v]
        if others:
            log_p = (logits.to(targets.dtype) / temperature).log_softmax(-1)  # [B, K]
            total = total - (sum(others[1:], others[0]) * log_p).sum(-1).mean()
    return total / pairs

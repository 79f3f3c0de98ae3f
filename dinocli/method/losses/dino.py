"""DINO loss: each view of an image predicts the teacher's output on the other global views."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dinocli.core.distributed import mean_over_processes
from dinocli.data.views.masking import PatchMasks
from dinocli.engine.schedules import Clock
from dinocli.method.losses.cross_entropy import CHUNK_LOGITS, Chunk, cross_entropy, entropy
from dinocli.method.losses.targets import PrototypeLossConfig
from dinocli.models.network import Encoding, Reads


class DinoLossConfig(PrototypeLossConfig):
    """Loss on class tokens."""

    reads: ClassVar[Reads] = "class"

    def build(self, prototypes: int) -> DinoLoss:
        return DinoLoss(self, prototypes)


_USE_MOMENTUM = 0.99  # of the moving average `use`, which thus spans about a hundred steps


class DinoLoss(nn.Module):
    """Module of `dino_loss`, with the state of its targets.

    Attributes:
        use: Moving average of the mean target, which is the share of each prototype. [K]
    """

    use: Tensor

    def __init__(self, config: DinoLossConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = config.targets.build(prototypes)
        self.register_buffer("use", torch.zeros(prototypes))
        self._mean: Tensor | None = None

    def targets_for(self, teacher: Encoding, clock: Clock) -> Tensor:
        """Compute the targets of a whole batch from the teacher's logits of its global views. [G, B, K]"""
        targets: Tensor = self.targets(teacher.class_logits[self.config.head], clock)
        self._mean = targets.mean((0, 1))
        return targets

    def forward(self, student: Encoding, targets: Tensor, masks: PatchMasks | None) -> Tensor:  # [G, B, K] -> []
        logits = student.class_logits[self.config.head]  # [V, B, K]
        return self.config.weight * dino_loss(logits, targets, self.config.student_temperature)

    def metrics(self, targets: Tensor, loss: Tensor, clock: Clock) -> dict[str, Tensor | float]:
        """Return metrics of training.

        Args:
            targets: Targets of a whole batch, or of this process's share. [G, B, K]
            loss: Loss that `forward` returned for them. []
            clock: Clock of the step, for the teacher's temperature.

        Returns:
            `teacher_entropy`, the mean entropy of the targets; `kl`, the student's divergence from them; `information`,
            the mutual information of targets and images (0 if all images have the same target), all in nats;
            `prototypes`, the share of prototypes in use over the last hundred steps, as the exponential of the entropy
            of `use`, divided by K; and the teacher's `temperature`.

        Source: arXiv 2104.14294, section 5.3 and figure 7.
        """
        mean_entropy = entropy(targets).mean()
        mean = mean_over_processes(targets.mean((0, 1)))
        use = self.use.clone() if self._mean is None else self.use.lerp(mean, 1 - _USE_MOMENTUM)
        return {
            "teacher_entropy": mean_entropy,
            "kl": loss / self.config.weight - mean_entropy,
            "information": entropy(mean) - mean_over_processes(mean_entropy),
            "prototypes": entropy(use / use.sum()).exp() / len(use),
            "temperature": clock.value(self.targets.config.temperature),
        }

    def after_step(self) -> None:
        """Update the state of the targets, and the use of the prototypes, after a step."""
        self.targets.update()
        if self._mean is not None:
            self.use.lerp_(mean_over_processes(self._mean), 1 - _USE_MOMENTUM)
            self._mean = None


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of every view against every other global view, averaged over images and pairs.

    The student's first views are the global ones, in the order of the targets. The loss is at least the entropy of the
    targets: it is not zero even if the student agrees fully with its teacher.

    Args:
        student: Logits. [V, B, K] Overwritten with their gradient if they require one.
        targets: Distributions that sum to 1 over K. [G, B, K]
        temperature: Divisor of the student's logits.

    Returns:
        Mean over B and over the G * (V - 1) pairs, in at least float32. []

    Source: arXiv 2104.14294, equation 3; facebookresearch/dino@7c446df main_dino.py, DINOLoss.forward.
    """
    pairs = len(targets) * (len(student) - 1)
    # If there is only one global view, it has no target, and its chunk adds nothing.
    chunks = [Chunk(v, [target for g, target in enumerate(targets) if g != v]) for v in range(len(targets))]
    # All local views have the same targets, so they are compared together.
    together = max(1, CHUNK_LOGITS // student[0].numel())
    firsts = range(len(targets), len(student), together)
    chunks += [Chunk(slice(first, first + together), list(targets)) for first in firsts]
    return cross_entropy(student, chunks, temperature, share=1 / (student.shape[1] * pairs))

"""Targets: rules that turn teacher logits into distributions to predict, and the configs of losses on heads."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dinocli.core.config import Config
from dinocli.core.device import exactly
from dinocli.core.distributed import logsumexp_over_processes, mean_over_processes
from dinocli.engine.schedules import Clock, Schedule
from dinocli.models.network import Reads


class CenteringConfig(Config):
    """Centering and sharpening.

    Attributes:
        momentum: Weight of the old center in each update.
        temperature: Temperature of the teacher; low values sharpen.
    """

    kind: Literal["centering"]
    momentum: float = Field(ge=0, le=1)
    temperature: Schedule

    def build(self, prototypes: int) -> Centering:
        """Build the rule with its center at zero."""
        return Centering(self, prototypes)


class Centering(nn.Module):
    """Targets softmax((logits - center) / temperature), with a moving average of the mean logits as center.

    Centering prevents one prototype from dominating; sharpening prevents uniform targets. Together they prevent
    collapse.

    Source: arXiv 2104.14294, section 3.1; facebookresearch/dino@7c446df main_dino.py, DINOLoss.
    """

    center: Tensor

    def __init__(self, config: CenteringConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("center", torch.zeros(prototypes))
        self._mean: Tensor | None = None

    def forward(self, logits: Tensor, clock: Clock) -> Tensor:  # [..., K] -> [..., K]
        """Compute the targets of this step with the center of the previous steps."""
        logits = logits.to(self.center.dtype)
        if logits.numel():  # without masked patches the mean would be nan
            self._mean = logits.mean(tuple(range(logits.ndim - 1)))  # [K], of the raw logits
        return (logits - self.center).div_(clock.value(self.config.temperature)).softmax(-1)

    def update(self) -> None:
        """Move the center towards the step's mean logits over all processes; call once per step."""
        if self._mean is not None:
            self.center.lerp_(mean_over_processes(self._mean), 1 - self.config.momentum)
            self._mean = None


class SinkhornKnoppConfig(Config):
    """Targets that use all prototypes equally.

    Attributes:
        iterations: Number of normalizations over prototypes and samples; 3 in the published recipes.
        temperature: Temperature of the teacher; low values sharpen.
    """

    kind: Literal["sinkhorn_knopp"]
    iterations: int = Field(ge=1)
    temperature: Schedule

    def build(self, prototypes: int) -> SinkhornKnopp:
        """Build the rule, which has no state."""
        return SinkhornKnopp(self)


class SinkhornKnopp(nn.Module):
    """Targets softmax(logits / temperature), balanced so that all prototypes have the same total over all samples.

    Samples are those of all processes. Each iteration scales the totals of all prototypes to the same value, then the
    total of each sample to 1. No center is needed, because the scaling cancels any offset that all samples share. In
    this form, the numbers of samples and prototypes cancel as well.

    The first iteration uses logarithms, because exponentials overflow float32 for logits above 3.55 at a temperature of
    0.04. After it, exponentials are safe: all numbers are at most 1, and totals of prototypes at least 1 / K. For a
    prototype's numbers add up to 1 before they are divided by the totals of samples, which are at most K. Later
    iterations only change a factor per prototype and a factor per sample, by one product with the matrix each.

    Source: arXiv 2006.09882, section 3.1; facebookresearch/dinov2@b8931f7 dinov2/loss/dino_clstoken_loss.py,
    sinkhorn_knopp_teacher.
    """

    def __init__(self, config: SinkhornKnoppConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, clock: Clock) -> Tensor:  # [..., K] -> [..., K], in at least float32
        """Compute the targets of this step from its logits alone; all leading dimensions are samples."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        scaled = (logits.to(wide) / clock.value(self.config.temperature)).flatten(0, -2)  # [S, K]
        scaled -= logsumexp_over_processes(scaled.logsumexp(0))  # [K]
        targets = scaled.softmax(-1)  # rows last, so that each target sums to 1
        with exactly(logits.device):
            samples = targets.new_ones(len(targets))
            for _ in range(self.config.iterations - 1):
                # The mean has the same effect as the sum over processes: a common factor cancels in the next line.
                prototypes = mean_over_processes(targets.T @ samples).reciprocal_()  # [K]
                samples = (targets @ prototypes).reciprocal_()  # [S]
        if self.config.iterations > 1:
            targets.mul_(prototypes).mul_(samples[:, None])
        return targets.reshape(logits.shape)

    def update(self) -> None:
        """Do nothing: this rule keeps no state between steps."""


TargetsConfig = Annotated[CenteringConfig | SinkhornKnoppConfig, Field(discriminator="kind")]


class HeadLossConfig(Config):
    """Loss on the outputs of a head, which compares the student's with the teacher's.

    Attributes:
        weight: Factor on this loss in the total.
        head: Name of the head whose outputs it reads; several losses may share one.
    """

    reads: ClassVar[Reads]
    weight: float = Field(gt=0)
    head: str

    def build(self, outputs: int) -> nn.Module:
        """Build the loss in its initial state, for a head with this number of outputs."""
        raise NotImplementedError


class PrototypeLossConfig(HeadLossConfig):
    """Loss on the prototypes of a head: a cross-entropy with targets from the teacher.

    Attributes:
        student_temperature: Divisor of the student's logits.
        targets: Rule that turns the teacher's logits into targets.
    """

    student_temperature: float = Field(gt=0)
    targets: TargetsConfig

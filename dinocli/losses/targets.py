"""Target rules: teacher logits to the distribution that the student is to predict."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dinocli.config import Config
from dinocli.distributed import logsumexp_over_processes, mean_over_processes
from dinocli.schedules import Clock, Schedule


class CenteringConfig(Config):
    """Centering and sharpening.

    Attributes:
        momentum: How much of the old center a step keeps.
        temperature: Of the teacher; low values sharpen.
    """

    kind: Literal["centering"]
    momentum: float = Field(ge=0, le=1)
    temperature: Schedule

    def build(self, prototypes: int) -> Centering:
        """The rule with its center at zero."""
        return Centering(self, prototypes)


class Centering(nn.Module):
    """softmax((logits - center) / temperature), where the center is a moving average of the logits' mean.

    Centering keeps one prototype from winning everywhere, sharpening keeps all from winning equally; together they
    keep training from collapsing.

    Source: arXiv 2104.14294, section 3.1; facebookresearch/dino@7c446df main_dino.py, DINOLoss.
    """

    center: Tensor

    def __init__(self, config: CenteringConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("center", torch.zeros(prototypes))
        self._mean: Tensor | None = None

    def forward(self, logits: Tensor, clock: Clock) -> Tensor:  # [..., K] -> [..., K]
        """Targets of this step, made with the center of the steps before."""
        logits = logits.to(self.center.dtype)
        if logits.numel():  # not where no patch is hidden, whose mean would be nan
            self._mean = logits.mean(tuple(range(logits.ndim - 1)))  # [K], of the raw logits
        return (logits - self.center).div_(self.config.temperature.at(clock)).softmax(-1)

    def update(self) -> None:
        """Move the center by what the step saw, in all processes; once a step, when the step is done."""
        if self._mean is not None:
            self.center.lerp_(mean_over_processes(self._mean), 1 - self.config.momentum)
            self._mean = None


class SinkhornKnoppConfig(Config):
    """Targets that use all prototypes alike.

    Attributes:
        iterations: How often both sums are set right; the published recipes' is 3.
        temperature: Of the teacher; low values sharpen.
    """

    kind: Literal["sinkhorn_knopp"]
    iterations: int = Field(ge=1)
    temperature: Schedule

    def build(self, prototypes: int) -> SinkhornKnopp:
        """The rule; it has no state."""
        return SinkhornKnopp(self)


class SinkhornKnopp(nn.Module):
    """softmax(logits / temperature), balanced so that all prototypes get the same over all samples of all processes.

    In turns each prototype's shares are scaled to one sum and each sample's to 1, a sample's last. No center is needed:
    what all samples share goes out in the scaling. Logarithms are scaled rather than their exponentials, which in
    float32 come to infinity for logits above 3.55 at a temperature of 0.04; the counts of samples and prototypes then
    go out as well.

    Source: arXiv 2006.09882, section 3.1; facebookresearch/dinov2@b8931f7 dinov2/loss/dino_clstoken_loss.py,
    sinkhorn_knopp_teacher.
    """

    def __init__(self, config: SinkhornKnoppConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, clock: Clock) -> Tensor:  # [..., K] -> [..., K], in at least float32
        """Targets of this step, from its logits alone; all leading dimensions are samples."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        scaled = (logits.to(wide) / self.config.temperature.at(clock)).flatten(0, -2)  # [S, K]
        for _ in range(self.config.iterations):
            scaled -= logsumexp_over_processes(scaled.logsumexp(0))  # [K]
            scaled -= scaled.logsumexp(-1, keepdim=True)  # [S, 1]
        return scaled.exp_().reshape(logits.shape)

    def update(self) -> None:
        """Nothing is kept from one step to the next."""


TargetsConfig = Annotated[CenteringConfig | SinkhornKnoppConfig, Field(discriminator="kind")]

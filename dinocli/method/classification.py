"""Classification: a backbone and a linear classifier learn the labels of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from dinocli.core.copies import send
from dinocli.data.loader.batch import Batch
from dinocli.engine.method import Method, ParamGroup, group_parameters
from dinocli.engine.schedules import Clock, Schedule
from dinocli.method.losses.labels import LabelsLossConfig, label_loss
from dinocli.models.architecture import AS_THE_HEADS, LearningConfig
from dinocli.models.network import Network

HEAD = "labels"  # name of the classifier among the heads of a network


@dataclass(frozen=True)
class LabelledPart:
    """Part of a batch, with its labels.

    Attributes:
        batch: Views of b images.
        targets: Target distributions of the images. [b, K]
    """

    batch: Batch
    targets: Tensor


class Classification(Method):
    """Supervised training of a network with a classifier.

    Args:
        student: Network that the gradient trains, with the head `labels`.
        average: Network of the same shape, which becomes the student's moving average: the product of a run.
        loss: Settings of the loss.
        momentum: Weight of the old average in each update.
        learning: Learning rates of the backbone relative to the classifier.
        labels: Labels of all images of the source: classes [S], int64, or 1 for each class of an image and else 0.
            [S, K]
    """

    def __init__(
        self,
        student: Network,
        average: Network,
        loss: LabelsLossConfig,
        momentum: Schedule,
        labels: Tensor,
        learning: LearningConfig = AS_THE_HEADS,
    ) -> None:
        super().__init__()
        self.student, self.average = student, average
        average.requires_grad_(False).load_state_dict(student.state_dict())
        self.loss, self.momentum, self.labels, self.learning = loss, momentum, labels, learning

    @property
    def networks(self) -> list[Network]:
        """Networks that a step runs."""
        return [self.student]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.average.eval()
        return self

    @torch.no_grad()
    def prepare(self, batch: Batch) -> LabelledPart:
        """Return a batch with its labels. Mix images and labels if mixup or CutMix is set."""
        crops = batch.global_crops
        targets = self.loss.smooth(send(self.labels[batch.rows], crops.device))
        if mix := self._draw_mix():
            mixed, targets = mix(crops[0], targets)
            batch = replace(batch, global_crops=mixed[None])
        return LabelledPart(batch, targets)

    def parts(self, batch: LabelledPart, count: int, clock: Clock) -> list[LabelledPart]:
        """Split a prepared batch into `count` parts."""
        pairs = zip(batch.batch.split(count), batch.targets.chunk(count), strict=True)
        return [LabelledPart(*pair) for pair in pairs]

    def _draw_mix(self) -> nn.Module | None:
        """Return mixup or CutMix, drawn for each batch; None without either."""
        if not (self.loss.mixup or self.loss.cutmix):
            return None
        from torchvision.transforms import v2  # only here, because it takes a second to import

        alphas = {v2.MixUp: self.loss.mixup, v2.CutMix: self.loss.cutmix}
        mixes = [mix(alpha=alpha) for mix, alpha in alphas.items() if alpha]
        drawn: nn.Module = mixes[int(torch.randint(len(mixes), (), device="cpu"))]
        return drawn

    def forward(self, part: LabelledPart) -> dict[str, Tensor]:
        """Return the loss of a part."""
        logits = self.student([part.batch.global_crops]).class_logits[HEAD][0]  # [b, K]
        return {"labels": label_loss(logits, part.targets, several=self.loss.several)}

    def metrics(
        self, parts: Sequence[LabelledPart], losses: Mapping[str, Tensor], clock: Clock
    ) -> dict[str, Tensor | float]:
        """Return the `momentum` of the average."""
        return {"momentum": clock.value(self.momentum)}

    def units(self) -> list[nn.Module]:
        """Return the blocks of each network, then the network, so that both have the same shards."""
        return [module for network in (self.student, self.average) for module in (*network.blocks, network)]

    def param_groups(self) -> list[ParamGroup]:
        """Return the trained parameters in groups of equal settings.

        Biases and one-dimensional parameters have no weight decay.
        """
        backbone, learning = self.student.backbone, self.learning

        def find_settings(name: str) -> tuple[str, float, int]:
            if name.startswith("heads."):
                return HEAD, 1.0, 0
            inside = name.removeprefix("backbone.model.")
            return "backbone", learning.rate(backbone, inside), learning.frozen_epochs

        return group_parameters(self.student.named_parameters(), find_settings)

    @torch.no_grad()
    def after_step(self, clock: Clock, done: Tensor) -> None:
        """Move the average towards the student, BatchNorm's statistics included."""
        self.average.move_towards(self.student, clock.value(self.momentum), done, buffers=True)

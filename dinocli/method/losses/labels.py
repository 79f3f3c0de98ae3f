"""Cross-entropy with labels, for fine-tuning: one class per image, or several."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dinocli.core.config import Config
from dinocli.core.device import exactly


class LabelsLossConfig(Config):
    """Loss of a linear classifier on the class token. `dino finetune` sets the number of classes.

    Attributes:
        classes: Number of classes.
        several: If True, an image may have any number of classes, each predicted on its own.
        smoothing: Share of the target that all classes have equally (label smoothing).
        mixup: Parameter of the Beta distribution that mixup draws its shares from. If 0, there is no mixup.
        cutmix: The same for CutMix. If both are above 0, each batch draws one of them.
    """

    classes: int = Field(ge=1)
    several: bool = False
    smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)

    def smooth(self, labels: Tensor) -> Tensor:
        """Return the target distributions of images, or their probabilities per class if there are `several`.

        Args:
            labels: Class per image [B], int64; or 1 for each class of an image and else 0. [B, K]
        """
        if labels.ndim == 1:
            labels = F.one_hot(labels, self.classes)
        even = 0.5 if self.several else 1 / self.classes
        return labels.float() * (1 - self.smoothing) + even * self.smoothing


def label_loss(logits: Tensor, targets: Tensor, *, several: bool) -> Tensor:
    """Compute the cross-entropy of logits and targets, averaged over images, in float32.

    Args:
        logits: [B, K]
        targets: Distributions that sum to 1 over K; or probabilities per class, whose losses are averaged over K.
        several: True for probabilities per class. [B, K]

    Returns:
        []
    """
    with exactly(logits.device):
        if several:
            return F.binary_cross_entropy_with_logits(logits.float(), targets)
        return F.cross_entropy(logits.float(), targets)

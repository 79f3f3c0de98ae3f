"""Base of the losses that are no mean over images, but a function of means over the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinocli.core.distributed import joint_mean, mean_over_processes, with_gradient_of
from dinocli.models.network import Encoding


class WholeBatchLoss(nn.Module):
    """Loss that depends on the images only through means over the batch of all parts and processes.

    Every part returns the loss of the whole batch, and the gradients of all parts and processes add up to that of the
    whole batch. With several parts the method encodes the student's batch once more, before the first part, so that
    the means are known. KoLeo, which is a function of pairs, has no such form.
    """

    def __init__(self) -> None:
        super().__init__()
        self._means: Tensor | None = None  # over the whole batch, if it has several parts

    def means(self, student: Encoding, targets: Tensor | None) -> Tensor:
        """Compute the means over the images of a part that the loss is a function of."""
        raise NotImplementedError

    def remember(self, parts: Sequence[Tensor] | None) -> None:
        """Keep the means of the whole batch for `over_batch`; None if the batch has one part.

        Args:
            parts: Means of each part; all parts must have equally many images.
        """
        self._means = None if parts is None else mean_over_processes(torch.stack(list(parts)).mean(0))

    def over_batch(self, means: Tensor) -> Tensor:
        """Return the means over the whole batch, whose gradient goes to those of this part."""
        return joint_mean(means) if self._means is None else with_gradient_of(means, self._means)

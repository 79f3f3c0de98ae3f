"""Views of a preset as a transform, for training loops and data sets of other libraries."""

from __future__ import annotations

import torch
from torch import Tensor

from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader.batch import view_fields
from dinocli.data.loader.fill import Cutter
from dinocli.data.loader.ring import Task
from dinocli.data.views.augment_bytes import normalize_bytes
from dinocli.data.views.crops import ViewsConfig
from dinocli.features.inputs import Given, given_pixels


class ViewsTransform:
    """Transform from an image to the normalized random crops that training cuts, global ones first.

    It can be given to a torchvision data set, whose loader then yields a list with one batch [B, C, H, W] per view. The
    crops are drawn from torch's random state, which a DataLoader seeds differently in each worker. Masks are not drawn.

    Args:
        views: Views to cut.
        images: Decoding settings.

    Attributes:
        views: Views to cut.
    """

    def __init__(self, views: ViewsConfig, images: ImagesConfig = DEFAULTS) -> None:
        self.views = views.model_copy(update={"mask": None, "fixed": None})
        self._images = images
        self._cutter = Cutter(self.views, 0, images, finish=True)
        self._mean, self._std = torch.tensor(views.mean), torch.tensor(views.std)

    def __call__(self, image: Given) -> list[Tensor]:
        """Return the crops of an image. V tensors [C, H, W]

        Raises:
            DinoError: If the image cannot be read.
        """
        return self.cut(image, int(torch.randint(2**62, ())))

    def cut(self, image: Given, number: int) -> list[Tensor]:
        """Return the crops of an image that belong to a number: those of image `number` in an epoch 0 with seed 0."""
        pixels = given_pixels(image, self._images)
        slot = {name: torch.zeros(field.shape, dtype=field.dtype) for name, field in view_fields(self.views, 1).items()}
        self._cutter.cut_one(slot, Task(0, 0, 0, 1), pixels, number)
        groups = [normalize_bytes(slot[name], self._mean, self._std) for name in ("globals", "locals")]
        return [view[0] for group in groups for view in group]

"""Batches, their arrays in shared memory, and files that cannot be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.data.loader import ring
from dinocli.data.views.crops import ViewsConfig
from dinocli.data.views.masking import Grid, PatchMasks

_WAITING_BYTES = 8 * 2**30
_SLOTS = 4
_FILE_BYTES = 2**20  # room for a JPEG of two megapixels; memory is taken only as far as it is written


@dataclass(frozen=True)
class Batch:
    """Views of B images, ready for the networks.

    Attributes:
        global_crops: Global crops. [G, B, C, H, W]
        local_crops: Local crops, or None without local views. [V-G, B, C, h, w]
        rows: Index of each image in its source, on the host. [B]
        masks: Masked patches of the student's global crops, or None without masking.
        clean_crops: The global crops once more, possibly larger: the same parts of the images with the same flips, but
            no change of color, blur or mask. None if no loss needs them. [G, B, C, H', W']
        places: Row of each image's views in a list of all fixed views: draw * images + number, on the host. None unless
            `views.fixed` is set for images in files. Views of an image that replaces an unreadable one keep the row of
            the unreadable one. [B]
    """

    global_crops: Tensor
    local_crops: Tensor | None
    rows: Tensor
    masks: PatchMasks | None = None
    clean_crops: Tensor | None = None
    places: Tensor | None = None

    @property
    def crops(self) -> list[Tensor]:
        """All views, one group per resolution, global ones first."""
        return [self.global_crops] if self.local_crops is None else [self.global_crops, self.local_crops]

    def split(self, count: int) -> list[Batch]:
        """Split the images into `count` batches of the same size, in order."""
        if count == 1:
            return [self]
        globals_, rows = self.global_crops.chunk(count, 1), self.rows.chunk(count)
        locals_ = [None] * count if self.local_crops is None else self.local_crops.chunk(count, 1)
        masks = [None] * count if self.masks is None else self.masks.split(count)
        clean = [None] * count if self.clean_crops is None else self.clean_crops.chunk(count, 1)
        places = [None] * count if self.places is None else self.places.chunk(count)
        return [Batch(*part) for part in zip(globals_, locals_, rows, masks, clean, places, strict=True)]


@dataclass
class BadFiles:
    """Files that cannot be read, with the reason; a file counts once, however often it is drawn."""

    reasons: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the counts by reason in one line, the most frequent first."""
        counts = Counter(reason.split(":")[0] for reason in self.reasons.values()).most_common(4)
        return ", ".join(f"{count} {reason}" for reason, count in counts)


class Shard(NamedTuple):
    """Share of a process in the batches: from number `rank` on, every `processes`-th; the others take those between."""

    rank: int
    processes: int


ALONE = Shard(0, 1)


def view_fields(views: ViewsConfig, batch_size: int, clean: float | None = None) -> ring.Fields:
    """Return the arrays of a batch: crops with the channels last, as from decoders, and the draws per view.

    Args:
        views: Views of each image.
        batch_size: Rows of each field.
        clean: Side of the clean crops relative to the global crops'. If None, there are none.
    """
    v, g, b, c = len(views.all), len(views.globals), batch_size, views.channels
    large, small = views.global_1.size, views.local.size if views.local else 0
    return {
        "keys": ring.Field((b, 2), torch.int64),  # epoch and number of each image
        "globals": ring.Field((g, b, large, large, c), torch.uint8),
        "locals": ring.Field((v - g, b, small, small, c), torch.uint8),
        **clean_fields(views, batch_size, clean),
        "flip": ring.Field((v, b), torch.bool),
        "factors": ring.Field((v, b, 4), torch.float32),
        "order": ring.Field((v, b, 4), torch.uint8),
        "gray": ring.Field((v, b), torch.bool),
        "radius": ring.Field((v, b), torch.float32),
        "solarize": ring.Field((v, b), torch.bool),
    }


def clean_fields(views: ViewsConfig, batch_size: int, clean: float | None) -> ring.Fields:
    """Return the array of the clean crops, if there are any."""
    if clean is None:
        return {}
    side = views.clean_size(clean)
    return {"clean": ring.Field((len(views.globals), batch_size, side, side, views.channels), torch.uint8)}


def file_fields(crops: int, batch_size: int) -> ring.Fields:
    """Return the arrays of images that the device decodes: their files, and the boxes of all crops."""
    return {
        "files": ring.Field((batch_size, _FILE_BYTES), torch.uint8, pinned=False),
        "lengths": ring.Field((batch_size,), torch.int64),  # bytes; 0 for an image whose crops are in the slot
        "turns": ring.Field((batch_size,), torch.int64),  # EXIF orientation
        "refused": ring.Field((1,), torch.bool),  # True if workers must decode every file of this batch
        "boxes": ring.Field((batch_size, crops, 4), torch.int64),
    }


def mask_fields(views: ViewsConfig, batch_size: int, grid: Grid | None) -> ring.Fields:
    """Return the arrays of masked patches: their positions, and their number per crop."""
    if not views.mask:
        return {}
    if not grid:
        raise DinoError("views.mask needs patches to mask; this backbone has none", "--set views.mask=none")
    crops = (len(views.globals), batch_size)
    return {"where": ring.Field((*crops, *grid), torch.bool), "counts": ring.Field(crops, torch.int64)}


def slots_for(fields: ring.Fields) -> int:
    """Return the number of batches to hold at once, within the memory budget; at least 2."""
    batch_bytes = sum(torch.Size(f.shape).numel() * f.dtype.itemsize for f in fields.values())
    return max(2, min(_SLOTS, _WAITING_BYTES // batch_bytes))

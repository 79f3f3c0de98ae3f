"""Main side of decoding on the device: from the files in a slot to crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinocli.data.decode.torch_codecs import decode_jpegs
from dinocli.data.loader.fill import ImageFiller
from dinocli.data.loader.ring import Task
from dinocli.data.views.device_crops import Stored, cut_batch

_ENOUGH = 8  # files; fewer may all be corrupt


class DeviceCutter:
    """Decoder of the files of a batch that workers have only read, and cutter of their crops, on a device.

    Args:
        filler: Filler for images that the device refuses. It decodes them here, and replaces those that are corrupt.
        device: Device of the batch.
        note: Callback that receives one-line messages for the user.

    Attributes:
        decoded: Number of images that the device has decoded.
        fails: True after the device decoded no file of a batch; it is then skipped.
    """

    def __init__(self, filler: ImageFiller, device: torch.device, note: Callable[[str], None]) -> None:
        self.decoded, self.fails = 0, False
        self._filler, self._device, self._note = filler, device, note

    def decode(self, slot: dict[str, Tensor]) -> tuple[list[Stored], list[tuple[str, str]]]:
        """Return the decoded images of a slot, and name and reason of the corrupt ones; fill those that are refused."""
        lengths, turns = slot["lengths"].tolist(), slot["turns"].tolist()
        places = [place for place, length in enumerate(lengths) if length]
        if not places:
            return [], []
        found: Sequence[Tensor | None] = [None] * len(places)  # batches that were read before it failed
        if not self.fails:
            found = decode_jpegs([slot["files"][place, : lengths[place]] for place in places], self._device)
            if len(places) >= _ENOUGH and all(pixels is None for pixels in found):
                self.fails = True
                self._note(f"note: {self._device} decoded none of {len(places)} JPEGs; the workers decode from now on")
        stored, bad = [], []
        for place, pixels in zip(places, found, strict=True):
            if pixels is None:
                bad += self._filler(slot, Task(0, 0, place, 1))
            else:
                stored.append(Stored.of(pixels, turns[place], slot["boxes"][place], place))
        self.decoded += len(stored)
        return stored, bad

    def cut(self, groups: list[Tensor], stored: list[Stored]) -> None:
        """Cut the crops of decoded images into the groups of a batch: global, local and clean crops."""
        cutter = self._filler.cutter
        resamples = cutter.resamples + cutter.resamples[: len(stored[0].boxes) - len(cutter.resamples)]
        # A CPU multiplies float16 slowly.
        cut_batch(groups, stored, resamples, torch.float16 if groups[0].is_cuda else torch.float32)

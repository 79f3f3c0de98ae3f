"""Asynchronous copies of batches from their slots to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dinocli.data.views.masking import PatchMasks


class Copier:
    """Copier from slots to the device: asynchronous on CUDA, a no-op on the CPU.

    Args:
        device: Device of the batches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.busy: deque[tuple[Any, int]] = deque()

    def __call__(self, values: Tensor, *, needed: bool = True) -> Tensor:
        """Copy values, or only allocate their memory on the device if they are not needed."""
        if self.stream is None:
            return values.to(self.device)
        with torch.cuda.stream(self.stream):
            if needed:
                moved = values.to(self.device, non_blocking=True)
            else:
                moved = torch.empty(values.shape, dtype=values.dtype, device=self.device)
        # Memory from the side stream is read on the main stream: it must not be reused before that read.
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved

    def masks(self, masks: PatchMasks) -> PatchMasks:
        """Copy masks to the device. Call this before copying crops: the host waits for all earlier copies."""
        return PatchMasks(self(masks.where), self(masks.rows), self(masks.weights), masks.counts)

    def beside(self) -> AbstractContextManager[Any]:
        """Return a context whose work on the device follows the copies, beside that of the main stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Make later work on the device wait for the copies; the host does not wait."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def done(self, slot: int, release: Callable[[int], None]) -> None:
        """Release slots whose copies are complete: this one at once, or on CUDA those of earlier batches."""
        if self.stream is None:
            release(slot)
            return
        self.busy.append((self.stream.record_event(), slot))
        # One copy may overlap with the device's work; until it completes, its slot must not be written.
        while len(self.busy) > 1 or (self.busy and self.busy[0][0].query()):
            event, free = self.busy.popleft()
            event.synchronize()
            release(free)

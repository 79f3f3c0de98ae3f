"""Copies between host and device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return values of ordinary memory on a device. They go to CUDA through pinned memory, so the host does not wait.

    CUDA may wait for all earlier work before it copies more than 64 KB of ordinary memory, also with `non_blocking`.
    """
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def fetch(values: Tensor) -> Callable[[], Tensor]:
    """Start the copy of values to the host, and return a function that waits for it and returns them.

    Only a copy from CUDA is asynchronous; the function then waits for earlier work of the current stream, not for work
    that was launched since.
    """
    if not values.is_cuda:
        return values.cpu
    here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return here

    return wait

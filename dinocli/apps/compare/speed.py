"""Speed of encoders, measured in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from dinocli.features.encoder import Encoder

_MOST_ON_CPU = 16  # images per timed batch: a CPU computes larger batches no faster, and takes long
_SECONDS, _FEWEST, _MOST = 2.0, 3, 50  # time per network, and rounds


def time_encoders(networks: Sequence[tuple[Encoder, int]], batch_size: int) -> list[float]:
    """Return the images per second of encoders: the fastest of several batches in memory, without decoding.

    The encoders take turns, so that other work on the machine slows all of them.

    Args:
        networks: Encoders, each with the side of its images in pixels.
        batch_size: Images per batch; on a CPU at most 16.
    """
    batches = [_blank_batch(encoder, size, batch_size) for encoder, size in networks]
    for (encoder, _), images in zip(networks, batches, strict=True):
        encoder.features(images)  # the first batch also allocates memory and chooses kernels
    fastest, rounds, began = [math.inf] * len(networks), 0, time.perf_counter()
    while rounds < _FEWEST or (rounds < _MOST and time.perf_counter() - began < _SECONDS * len(networks)):
        for i, ((encoder, _), images) in enumerate(zip(networks, batches, strict=True)):
            start = time.perf_counter()
            encoder.features(images).cpu()  # waits for the device
            fastest[i] = min(fastest[i], time.perf_counter() - start)
        rounds += 1
    return [len(images) / seconds for images, seconds in zip(batches, fastest, strict=True)]


def _blank_batch(encoder: Encoder, size: int, batch_size: int) -> torch.Tensor:
    count = min(batch_size, _MOST_ON_CPU) if encoder.device.type == "cpu" else batch_size
    images = torch.zeros(count, encoder.channels, size, size, device=encoder.device)
    return images.contiguous(memory_format=torch.channels_last)

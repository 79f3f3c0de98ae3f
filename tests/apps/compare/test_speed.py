from __future__ import annotations

import pytest
import torch

from dinocli.apps.compare.speed import time_encoders
from dinocli.features.encoder import Encoder


def test_larger_images_are_timed_as_slower(encoder: Encoder) -> None:
    small, large, again = time_encoders([(encoder, 16), (encoder, 64), (encoder, 16)], 64)
    assert small > 2 * large, "sixteen times the patches"
    assert 0.5 < small / again < 2, "a busy machine slows all of them"


@pytest.mark.parametrize(("device", "batch_size", "timed"), [("cpu", 64, 16), ("cpu", 4, 4), ("meta", 64, 64)])
def test_a_timed_batch_is_as_large_as_the_batch_size_but_small_on_a_cpu(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, device: str, batch_size: int, timed: int
) -> None:
    counts = []

    def features(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        counts.append((len(images), images.device.type))
        return torch.zeros(1)

    monkeypatch.setattr(Encoder, "device", torch.device(device))
    monkeypatch.setattr(Encoder, "features", features)
    time_encoders([(encoder, 16)], batch_size)
    assert set(counts) == {(timed, device)}

from __future__ import annotations

from dinocli.apps.compare.speed import time_encoders
from dinocli.features.encoder import Encoder


def test_larger_images_are_timed_as_slower(encoder: Encoder) -> None:
    small, large, again = time_encoders([(encoder, 16), (encoder, 64), (encoder, 16)])
    assert small > 2 * large, "sixteen times the patches"
    assert 0.5 < small / again < 2, "a busy machine slows all of them"

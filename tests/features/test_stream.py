from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_same_features
from torch.utils.data import DataLoader

from dinocli.core.errors import DinoError
from dinocli.features.encoder import Encoder


def test_batches_give_the_features_of_a_call(images: Path, encoder: Encoder) -> None:
    stream = encoder.dataset(images, batch_size=3)
    batches = list(stream)
    names = [name for batch in batches for name in batch.names]
    assert names == list(stream.source.names)
    assert_same_features(torch.cat([batch.features for batch in batches]), encoder([images / name for name in names]))
    assert [len(batch.labels) for batch in batches] == [len(batch.names) for batch in batches]
    loaded = list(DataLoader(stream, batch_size=None))
    assert [batch.names for batch in loaded] == [batch.names for batch in batches]


def test_images_in_memory_and_tokens(encoder: Encoder) -> None:
    pixels = torch.randint(0, 256, (5, 20, 30, 3), dtype=torch.uint8)
    shapes = [tuple(batch.features.shape) for batch in encoder.dataset(pixels, "patches", batch_size=4, size=32)]
    assert shapes == [(4, 16, 16), (1, 16, 16)]
    with pytest.raises(DinoError, match="tokens='patch' is not valid"):
        encoder.dataset(pixels, "patch")


def test_an_unreadable_image_is_left_out_and_listed(images: Path, encoder: Encoder) -> None:
    torn = sorted(images.rglob("*.png"))[1]
    torn.write_bytes(b"no image")
    stream = encoder.dataset(images, batch_size=2)
    count = sum(len(batch.names) for batch in stream)
    assert count == len(stream.source) - 1
    assert list(stream.bad) == [str(torn.relative_to(images))]
    with pytest.raises(DinoError, match="cannot be read"):
        list(encoder.dataset(images, skip_bad=False))

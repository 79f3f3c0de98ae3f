from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinocli.apps.segment.pairs import Pairs
from dinocli.apps.segment.patches import store_patches
from dinocli.data.decode.image import decode
from dinocli.features.encoder import Encoder


def pairs(folder: Path, shapes: tuple[tuple[int, int], ...] = ((48, 48), (40, 80), (90, 30))) -> Pairs:
    random = np.random.default_rng(0)
    masks = {}
    for i, shape in enumerate(shapes):
        photo, mask = folder / f"{i}.png", folder / f"{i}-mask.png"
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(photo)
        Image.fromarray(
            np.where(np.arange(shape[1]) < 12, 255, np.arange(shape[0])[:, None] // 30).astype(np.uint8)
        ).save(mask)
        masks[photo] = mask
    return Pairs(masks)


def test_stored_features_and_classes_equal_those_of_encoder_and_mask(tmp_path: Path, encoder: Encoder) -> None:
    data = pairs(tmp_path)
    every = []
    with store_patches(encoder, data, tmp_path / "out" / "patches", short_side=32) as stored:
        assert len(stored) == 3
        assert isinstance(stored.values, np.memmap)
        for i, (photo, mask) in enumerate(data.masks.items()):
            values, truth = stored[i]
            wanted = encoder.patches(encoder.photo(decode(photo.read_bytes()), 32))[0]
            torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-3)
            rows, columns = wanted.shape[:2]
            assert truth.shape == (8 * rows, 8 * columns)
            whole = np.array(Image.open(mask))
            middle = whole[(np.arange(8 * rows) * whole.shape[0]) // (8 * rows)][
                :, 4 * columns * whole.shape[1] // (8 * columns)
            ]
            assert (truth[:, 4 * columns].numpy() == middle).mean() > 0.9
            assert set(truth.unique().tolist()) == set(np.unique(whole).tolist())
            every.append(wanted.flatten(0, 1))
        all_patches = torch.cat(every)
        np.testing.assert_allclose(stored.mean, all_patches.mean(0).numpy(), atol=1e-5)
        np.testing.assert_allclose(stored.std, all_patches.std(0, unbiased=False).numpy(), rtol=1e-4)
        assert stored.counts[255] == 0, "ignored pixels are not counted"
        assert stored.counts[:3].min() > 0
        assert stored.counts.sum() == sum(int((stored[i][1] != 255).sum()) for i in range(3))
    assert not list((tmp_path / "out").iterdir()), "the files are deleted"


def test_unusable_photos_are_reported(tmp_path: Path, encoder: Encoder) -> None:
    data = pairs(tmp_path)
    next(iter(data.masks)).write_bytes(b"no image")
    with store_patches(encoder, data, tmp_path / "patches", short_side=32) as stored:
        assert len(stored) == 2
        assert list(stored.skipped) == [str(tmp_path / "0.png")]
    for path in data.masks:
        path.write_bytes(b"no image")
    with store_patches(encoder, data, tmp_path / "patches", short_side=32) as stored:
        assert len(stored) == 0

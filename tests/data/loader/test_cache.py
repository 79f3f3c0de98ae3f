from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.loader import cache as module
from dinocli.data.loader.cache import PixelCache
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import open_source
from dinocli.data.views.crops import LowResolutionConfig, ViewConfig, ViewsConfig

VIEW = ViewConfig(size=16, scale=(0.25, 1.0))


@pytest.mark.parametrize("where", ["ram", "folder"])
def test_pixels_are_cached_as_small_as_the_crops_allow(tmp_path: Path, where: str) -> None:
    cache = PixelCache(5, [VIEW, ViewConfig(size=8, scale=(0.01, 0.2))], "ram" if where == "ram" else str(tmp_path))
    assert cache.side == 80
    small = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    large = np.random.default_rng(1).integers(0, 256, (160, 320, 3), dtype=np.uint8)
    assert cache.get(3) is None
    assert cache.put(3, small) is small
    assert cache.put(0, large).shape == (80, 160, 3)
    np.testing.assert_array_equal(cache.get(3), small)
    assert cache.get(0).shape == (80, 160, 3)
    assert cache.kept == 2
    assert list(tmp_path.iterdir()) == []


def test_images_that_do_not_fit_are_resized_but_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ram_of", lambda: (2 * 3000, 2**40))
    cache = PixelCache(3, [VIEW], "ram")
    pixels = np.zeros((25, 25, 3), dtype=np.uint8)
    assert [cache.put(i, pixels).shape for i in range(3)] == [(25, 25, 3)] * 3
    assert (cache.kept, cache.get(1)) == (1, None)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("room", [10**9, 60_000])
def test_views_do_not_depend_on_the_cache(
    tmp_path: Path, workers: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(write_images(tmp_path / "x", 12, size=100)))
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=VIEW, global_2=VIEW)

    def take(where: str | None, workers: int) -> list[torch.Tensor]:
        stream = TrainBatches(
            source, views, batch_size=4, seed=0, workers=workers, device=torch.device("cpu"), cache=where
        )
        try:
            taken = [batch.global_crops for batch in islice(stream, 7)]
            assert where is None or 0 < stream.cache.kept <= 12
            return taken
        finally:
            stream.close()

    whole = take("ram", 0)
    monkeypatch.setattr(module, "ram_of", lambda: (room, 2**40))
    for ours, theirs in zip(take("ram", workers), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # Resizing twice differs slightly from resizing once.
    assert all((a - b).abs().mean() < 0.2 for a, b in zip(whole, take(None, 0), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_cached_in_low_resolution_serve_full_resolution(tmp_path: Path, workers: int) -> None:
    folder = write_images(tmp_path / "x", 12, size=100)
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=VIEW, global_2=VIEW)
    low = views.model_copy(update={"low_resolution": LowResolutionConfig(epochs=3, global_size=8)})

    def take(views: ViewsConfig, start: int, after: Callable[[], object]) -> list[torch.Tensor]:
        stream = TrainBatches(
            open_source(str(folder)),
            views,
            batch_size=4,
            seed=0,
            start=start,
            steps_per_epoch=3,
            workers=workers,
            device=torch.device("cpu"),
            cache="ram",
        )
        try:
            taken = []
            for batch in islice(stream, 12 - start):
                taken.append(batch.global_crops)
                if len(taken) == 5:
                    after()  # all twelve are cached
            return taken
        finally:
            stream.close()

    fresh = take(views, 9, lambda: None)
    taken = take(low, 0, lambda: shutil.rmtree(folder))
    assert [len(crops[0, 0, 0]) for crops in taken] == [8] * 9 + [16] * 3
    for ours, theirs in zip(taken[9:], fresh, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_cache_folder_without_write_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DinoError, match="cannot be written to"):
        PixelCache(3, [VIEW], str(tmp_path / "file"))


def test_a_full_disk_caches_nothing_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30, 0))
    cache = PixelCache(3, [VIEW], str(tmp_path))
    assert cache.put(0, np.zeros((9, 11, 3), np.uint8)).shape == (9, 11, 3)
    assert (cache.get(0), cache.kept) == (None, 0)


def test_images_with_any_number_of_channels_are_cached() -> None:
    cache = PixelCache(2, [VIEW], "ram", channels=13)
    for row, seed in ((1, 0), (0, 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 13), dtype=np.uint8)
        cache.put(row, pixels)
        np.testing.assert_array_equal(cache.get(row), pixels)

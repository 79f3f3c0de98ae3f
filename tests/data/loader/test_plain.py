from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_images
from test_train import CPU, GLOBAL, three_shards  # noqa: F401
from torch import Tensor

from dinocli.apps.pack import pack
from dinocli.data.images import DEFAULTS
from dinocli.data.loader.fill import Cutter
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources.open import open_images, open_source
from dinocli.data.views.crops import ViewsConfig


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_one_pass_of_shards_gives_every_image_with_its_label(shards: Path, images: Path, workers: int) -> None:
    batches = plain_batches(
        open_source(str(shards)), size=16, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=4, workers=workers, device=CPU
    )
    labels = {name: label for b in batches for name, label in zip(b.names, b.labels, strict=True)}
    assert len(labels) == 12
    assert sorted(labels.values()) == [0] * 6 + [1] * 6
    assert all(("/a/" in name) == (label == 0) for name, label in labels.items())


def test_one_pass_in_order_names_skipped_files(images: Path) -> None:
    (images / "a" / "0002.png").write_bytes(b"no image")
    source = open_source(str(images))
    passes = [
        list(plain_batches(source, size=16, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=5, workers=w, device=CPU))
        for w in (0, 1, 3)
    ]
    for batches in passes:
        assert [name for b in batches for name in b.names] == [n for n in source.names if n != "a/0002.png"]
        assert [label for b in batches for label in b.labels] == [0] * 5 + [1] * 6
        assert [name for b in batches for name, _ in b.bad] == ["a/0002.png"]
        assert all(b.images.shape == (len(b.names), 3, 16, 16) for b in batches)
        assert all(a.images.equal(b.images) for a, b in zip(passes[0], batches, strict=True))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_views_beside_the_plain_images_depend_on_seed_and_image_alone(images: Path, tmp_path: Path, kind: str) -> None:
    (images / "b" / "0003.png").write_bytes(b"no image")
    source = open_source(str(images))
    if kind == "shards":
        pack(open_images(str(images)), tmp_path / "packed", side=None, per_shard=4, name="x", report=lambda *a: None)
        source = open_source(str(tmp_path / "packed"))
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=GLOBAL, local=GLOBAL, locals=2)

    def passed(seed: int, workers: int, batch_size: int, cutter: bool = True) -> dict[str, tuple]:
        batches = plain_batches(
            source,
            size=24,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            batch_size=batch_size,
            workers=workers,
            device=CPU,
            cutter=Cutter(views, seed, DEFAULTS) if cutter else None,
        )
        seen = {}
        for batch in batches:
            assert (batch.views is None) == (not cutter or not batch.names)
            each = batch.views.unbind(1) if batch.views is not None else [None] * len(batch.names)
            seen |= dict(zip(batch.names, zip(batch.images, each, strict=True), strict=True))
        return seen

    first, plain = passed(0, 0, 5), passed(0, 0, 5, cutter=False)
    assert len(first) == 11
    assert next(iter(first.values()))[1].shape == (3, 3, 24, 24)
    for workers, batch_size in ((2, 5), (0, 1)):
        other = passed(0, workers, batch_size)
        assert set(other) == set(first) == set(plain)
        for name, (image, of_image) in first.items():
            assert other[name][0].equal(image) and plain[name][0].equal(image)
            torch.testing.assert_close(other[name][1], of_image)
    assert not any(passed(1, 0, 5)[name][1].equal(of_image) for name, (_, of_image) in first.items())


@pytest.mark.parametrize("bad", [[], [0], [1, 2], [11], list(range(4, 8))])
def test_unreadable_files_shift_no_image_view_or_name(images: Path, bad: list[int]) -> None:
    source = open_source(str(images))
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=GLOBAL, local=GLOBAL, locals=2)

    def passed() -> dict[str, tuple[Tensor, Tensor]]:
        numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": 24, "batch_size": 4, "workers": 0}
        batches = list(plain_batches(source, device=CPU, cutter=Cutter(views, 0, DEFAULTS), **numbers))
        assert [name for batch in batches for name, _ in batch.bad] == [source.names[row] for row in lost]
        return {
            name: (batch.images[row], batch.views[:, row])
            for batch in batches
            for row, name in enumerate(batch.names)
            if batch.views is not None
        }

    lost: list[int] = []
    whole = passed()
    lost = bad
    for row in lost:
        (images / source.names[row]).write_bytes(b"no image")
    found = passed()
    assert list(found) == [name for row, name in enumerate(source.names) if row not in bad]
    for name, (image, of_image) in found.items():
        assert image.equal(whole[name][0])
        torch.testing.assert_close(of_image, whole[name][1])


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_host_although_slots_are_filled_again(tmp_path: Path, workers: int) -> None:
    folder = write_images(tmp_path / "photos", 150, size=40)
    for number in (7, 8, 60):
        (folder / f"{number:04}.png").write_bytes(b"no image")
    source = open_source(str(folder))
    views = ViewsConfig(mean=(0.5,) * 3, std=(0.5,) * 3, global_1=GLOBAL, local=GLOBAL, locals=2)

    def passed(device: torch.device, busy: bool) -> list[tuple[list[str], Tensor, Tensor]]:
        batches = []
        numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": 24, "batch_size": 4, "workers": workers}
        for batch in plain_batches(source, device=device, cutter=Cutter(views, 0, DEFAULTS), **numbers):
            if busy:  # the device is behind, so that copies and slots have to wait for nothing but each other
                torch.cuda._sleep(2**24)
            if batch.views is not None:
                batches.append((batch.names, batch.images, batch.views))
        return batches

    here, there = passed(CPU, False), passed(torch.device("cuda"), True)
    assert [names for names, *_ in here] == [names for names, *_ in there]
    assert sum(len(names) for names, *_ in there) == 147
    for (_, images, of_images), (_, ours, of_ours) in zip(here, there, strict=True):
        torch.testing.assert_close(ours.cpu(), images, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_ours.cpu(), of_images, rtol=1e-4, atol=1e-4)

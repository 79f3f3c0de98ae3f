from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_train import CPU, GLOBAL, three_shards  # noqa: F401

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

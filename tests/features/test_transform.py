from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import dinocli
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import image_folder


def test_the_crops_are_those_of_training(images: Path) -> None:
    transform, source = dinocli.views("tiny-dino"), image_folder(images)
    batches = iter(TrainBatches(source, transform.views, batch_size=4, seed=0, device=torch.device("cpu")))
    batch = next(batches)
    for place, row in enumerate(batch.rows.tolist()):
        crops = transform.cut(images / source.names[row], row)
        expected = [view[place] for group in batch.crops for view in group]
        assert [tuple(crop.shape) for crop in crops] == [(3, 48, 48)] * 2 + [(3, 24, 24)] * 4
        assert all(torch.equal(one, other) for one, other in zip(crops, expected, strict=True))


def test_a_data_set_of_another_library_takes_it(tmp_path: Path) -> None:
    for kind in "ab":
        write_images(tmp_path / kind, 3)
    loader = DataLoader(ImageFolder(str(tmp_path), dinocli.views("tiny", **{"views.locals": 2})), batch_size=3)
    torch.manual_seed(0)
    views, labels = next(iter(loader))
    assert [tuple(view.shape) for view in views] == [(3, 3, 48, 48)] * 2 + [(3, 3, 24, 24)] * 2
    assert labels.tolist() == [0, 0, 0]
    torch.manual_seed(0)
    again, _ = next(iter(loader))
    other, _ = next(iter(loader))
    assert all(torch.equal(one, two) for one, two in zip(views, again, strict=True))
    assert not torch.equal(again[0], other[0])


def test_masks_and_fixed_views_are_left_out(images: Path) -> None:
    transform = dinocli.views("tiny-dinov2", **{"views.fixed": 1})
    photo = sorted(images.rglob("*.png"))[0]
    assert not torch.equal(transform(photo)[0], transform(photo)[0])

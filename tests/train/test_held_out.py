from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import Preset, load_preset
from dinocli.train import held_out as held_out_module
from dinocli.train.held_out import HeldOut, Labelled

SMALL = (
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}",
    "views.global_1.size=16",
    "losses.labels={classes=2}",
)


@pytest.fixture
def preset() -> Preset:
    return load_preset("finetune", SMALL)


def test_the_accuracy_is_that_of_the_classifier_on_readable_images(tmp_path: Path, preset: Preset) -> None:
    for label in "ab":
        write_images(tmp_path / label, 3, size=16)
    (tmp_path / "b" / "broken.png").write_bytes(b"\x89PNG")
    images = image_folder(tmp_path)
    held_out = HeldOut(Labelled(images, torch.tensor(images.labels).long()), preset, workers=0)
    assert held_out.measured == 6
    assert sorted(held_out.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    network = preset.network().train()
    with torch.no_grad():
        network.heads["labels"].linear.bias.copy_(torch.tensor([0.0, 1.0]))
    answers = held_out.evaluate(network)
    assert answers.accuracy == 50
    assert answers.selection.tolist() == (held_out.labels == 1).tolist()
    assert network.training, "unchanged"


def test_several_classes_are_scored_by_average_precision(tmp_path: Path, preset: Preset) -> None:
    images = image_folder(write_images(tmp_path / "all", 4, size=16))
    labels = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    held_out = HeldOut(Labelled(images, labels), preset, workers=0)
    assert held_out.title == "mean average precision"
    answers = held_out.evaluate(preset.network())
    assert answers.accuracy == 50, "all scores are equal, so every class has the precision of its share"
    assert len(answers.selection) == 2


def test_many_images_are_sampled_evenly(tmp_path: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_module, "_MOST", 3)
    images = image_folder(write_images(tmp_path / "all", 9, size=16))
    held_out = HeldOut(Labelled(images, torch.arange(9) % 2), preset, workers=0)
    assert held_out.measured == 3
    assert held_out.labels.tolist() == [0, 0, 0], "of images 0, 4 and 8"


def test_fewer_than_two_readable_images_are_an_error(tmp_path: Path, preset: Preset) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG")
    images = image_folder(tmp_path)
    with pytest.raises(DinoError, match="0 of the 1 held-out images can be read"):
        HeldOut(Labelled(images, torch.tensor([0])), preset, workers=0)

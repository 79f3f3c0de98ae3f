from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL
from test_dinov3 import convnext, released, vision_transformer
from test_mae_and_ibot import mae

from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.weights.checkpoint import write_checkpoint
from dinocli.weights.export import export
from dinocli.weights.starting_point import read_starting_point, refuse_other_channels


def test_a_dinov3_file_suits_dinov3s_losses(tmp_path: Path) -> None:
    torch.save(released(vision_transformer()), tmp_path / "x_sat493m.pth")
    start = read_starting_point(str(tmp_path / "x_sat493m.pth"))
    assert (start.family, start.preprocessing.mean[0]) == ("dinov3", 0.43)
    assert start.architecture.build(drop_path=False).width == 64


@pytest.mark.parametrize("name", ["mae", "convnext"])
def test_other_files_suit_dinos_loss(name: str, tmp_path: Path) -> None:
    torch.save({"model": mae()[1]} if name == "mae" else convnext()[1], tmp_path / "x.pth")
    assert read_starting_point(str(tmp_path / "x.pth")).family == "other"


@pytest.mark.parametrize(("preset", "family"), [("tiny", "other"), ("tiny-dinov2", "dinov2")])
def test_a_run_suits_the_losses_that_trained_it(preset: str, family: str, tmp_path: Path) -> None:
    made = load_preset(preset, [SMALL[0]])
    write_checkpoint(tmp_path / "x.safetensors", made.network().weights(), made, 3)
    start = read_starting_point(str(tmp_path / "x.safetensors"))
    assert start.family == family
    assert start.architecture.options == made.backbone.options
    assert start.architecture.drop_path == 0
    assert start.preprocessing.size == made.views.global_1.size


def test_a_timm_folder_has_the_architecture_of_its_config(tmp_path: Path) -> None:
    made = load_preset("tiny-dino")
    write_checkpoint(tmp_path / "x.safetensors", made.network().weights(), made, 3)
    export(str(tmp_path / "x.safetensors"), "timm", tmp_path / "out")
    start = read_starting_point(f"timm:local-dir:{tmp_path / 'out'}")
    assert (start.architecture.name, start.architecture.options) == (made.backbone.name, made.backbone.options)
    assert start.architecture.positions == "dino"


@pytest.mark.parametrize("classes", [0, 5])
def test_a_folder_of_timm_may_store_a_number_of_classes(classes: int, tmp_path: Path) -> None:
    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    model = timm.create_model("convnext_atto", num_classes=classes, **options)
    timm.models.save_for_hf(model, str(tmp_path), model_args=options | {"num_classes": classes})
    start = read_starting_point(f"timm:local-dir:{tmp_path}")
    assert "num_classes" not in start.architecture.options
    assert start.architecture.build(drop_path=False).width == 16


def test_weights_for_other_channels_are_refused(tmp_path: Path) -> None:
    made = load_preset("tiny-dino", SMALL)
    write_checkpoint(tmp_path / "x.safetensors", made.network().weights(), made, 3)
    start = read_starting_point(str(tmp_path / "x.safetensors"))
    refuse_other_channels(start, 3)
    with pytest.raises(DinoError, match=r"takes 3 channels; images\.channels is 4"):
        refuse_other_channels(start, 4)

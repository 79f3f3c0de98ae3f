from __future__ import annotations

from pathlib import Path

import torch
from test_dinov3 import SATELLITE, convnext, released, vision_transformer

from dinocli.weights.export import export
from dinocli.weights.load import load_encoder
from dinocli.weights.released import IMAGENET, Preprocessing


def test_an_export_keeps_the_preprocessing_of_released_weights(tmp_path: Path) -> None:
    torch.save(released(vision_transformer()), tmp_path / "vit_sat493m.pth")
    export(str(tmp_path / "vit_sat493m.pth"), "timm", tmp_path / "out")
    first = load_encoder(str(tmp_path / "vit_sat493m.pth"), torch.device("cpu"))
    again = load_encoder(f"timm:local-dir:{tmp_path / 'out'}", torch.device("cpu"))
    assert Preprocessing(again.size, again.mean, again.std) == Preprocessing(first.size, first.mean, first.std)
    assert first.mean == SATELLITE
    assert again.fingerprint == first.fingerprint


def test_a_convnext_file_is_exported_as_a_timm_folder(tmp_path: Path) -> None:
    torch.save(convnext()[1], tmp_path / "x.pth")
    written = export(str(tmp_path / "x.pth"), "timm", tmp_path / "out")
    assert written.difference < 1e-5
    assert load_encoder(f"timm:local-dir:{tmp_path / 'out'}", torch.device("cpu")).mean == IMAGENET[0]

"""Backbones as their configs describe them, and errors for those that cannot be built."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig, adapt, create_timm

MICRO = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("depth", [4, 12])
def test_drop_path_grows_linearly_and_applies_only_to_the_student(original, depth: int) -> None:
    options = MICRO | {"depth": depth}
    config = BackboneConfig(name="vit_tiny_patch16_224", options=options, drop_path=0.1, positions="dino")
    blocks = config.build(drop_path=True).model.blocks
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx(original.made["droppath"][str(depth)], abs=1e-8)
    assert all(not hasattr(block.drop_path1, "drop_prob") for block in config.build(drop_path=False).model.blocks)


def test_the_class_token_is_initialized_with_the_configured_std() -> None:
    config = BackboneConfig(name="vit_small_patch16_224", class_token_std=0.02, positions="dino")
    assert config.build(drop_path=False).model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch16_224", {}, "no model 'vit_smal_patch16_224'"),
        ("vit_tiny_patch16_224", {"no_such_option": 2}, "cannot build"),
        ("pit_ti_224", {}, "returns 1x256 values per image; expected patch tokens or a map"),
        ("crossvit_9_240", {}, "CrossVit returns a list"),
    ],
)
def test_unsupported_backbones_are_refused_by_name(name: str, options: dict, message: str) -> None:
    with pytest.raises(DinoError, match=message):
        BackboneConfig(name=name, options=options).build(drop_path=False)


def test_learned_positions_cannot_be_rescaled() -> None:
    with pytest.raises(DinoError, match="no rotary positions"):
        BackboneConfig(name="vit_tiny_patch16_224", options=MICRO, rescale_positions=2.0).build(drop_path=True)


def test_only_a_new_rotary_backbone_is_initialized_evenly() -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "num_heads": 3, "depth": 6}
    name = "vit_small_patch16_dinov3"
    fresh = BackboneConfig(name=name, options=options, class_token_std=0.5).build(drop_path=False).model
    timms = adapt(create_timm(name, **options), "antialias").model
    for depth in range(6):
        for key in ("attn.proj.weight", "mlp.fc2.weight", "mlp.fc1.weight"):
            spread = fresh.blocks[depth].get_parameter(key).std().item()
            assert spread == pytest.approx(0.02, rel=0.03)
        rescaled = timms.blocks[depth].attn.proj.weight.std().item()
        assert rescaled == pytest.approx(0.02 / (2 * (depth + 1)) ** 0.5, rel=0.03)
    assert fresh.cls_token.std().item() == pytest.approx(0.5, rel=0.2)
    assert fresh.reg_token.std().item() == pytest.approx(0.5, rel=0.1)


def test_adapt_accepts_a_timm_vision_transformer() -> None:
    assert adapt(VisionTransformer(**MICRO, num_classes=0), "antialias").width == 32


@pytest.mark.parametrize("option", ["num_classes", "pretrained"])
def test_options_that_the_tool_sets_itself_are_refused(option: str) -> None:
    with pytest.raises(DinoError, match=rf"backbone\.options\.{option} cannot be set"):
        BackboneConfig(name="resnet18", options={option: 1}).build(drop_path=False)

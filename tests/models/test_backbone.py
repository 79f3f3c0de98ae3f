from __future__ import annotations

import pytest
import torch
from test_transformer import MICRO, training

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig


def test_uniform_drop_path_is_the_same_in_all_blocks() -> None:
    config = BackboneConfig(
        name="vit_tiny_patch16_224", options=MICRO, drop_path=0.3, drop_path_rule="uniform", positions="dino"
    )
    assert [block.left_out for block in config.build(drop_path=True).blocks] == [0.3, 0.3]
    assert [block.left_out for block in config.build(drop_path=False).blocks] == [0.0, 0.0]
    with pytest.raises(DinoError, match="needs a sequence of plain blocks"):
        BackboneConfig(name="resnet18", drop_path=0.1, drop_path_rule="uniform").build(drop_path=True)


def test_a_rotary_backbone_has_blocks_with_levels_and_drop_path() -> None:
    config = training(drop_path=0.3, drop_path_rule="uniform")
    backbone = config.build(drop_path=True)
    assert [block.left_out for block in backbone.blocks] == [0.3] * 3
    assert (backbone.width, backbone.patch_size) == (32, 8)
    levels = {name: backbone.level(name) for name, _ in backbone.model.named_parameters()}
    assert {levels[key] for key in ("cls_token", "reg_token", "patch_embed.proj.weight")} == {0}
    assert (levels["blocks.0.gamma_1"], levels["blocks.2.mlp.fc2.weight"], levels["norm.weight"]) == (1, 3, 4)
    with pytest.raises(DinoError, match="--blocks 4 is larger than the 3 blocks"):
        backbone.last_tokens(torch.zeros(1, 3, 32, 32), 4)
    rates = [getattr(b.drop_path2, "drop_prob", 0.0) for b in training(drop_path=0.2).build(drop_path=True).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])

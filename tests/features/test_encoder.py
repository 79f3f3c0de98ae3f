from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import of_channels
from timm.models.vision_transformer import VisionTransformer

from dinocli.core.errors import DinoError
from dinocli.core.tensors import fingerprint
from dinocli.features.encoder import Encoder, NotFinite, features_of, finite_rows, quick, with_images
from dinocli.method.preset import load_preset
from dinocli.models.architecture import BackboneConfig
from dinocli.models.transformer import ViTBackbone
from dinocli.weights.checkpoint import write_checkpoint
from dinocli.weights.load import load_encoder

MEAN = STD = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def test_feature_layouts_equal_the_originals(original) -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).double()
    model.load_state_dict(original.below("vit/micro32d2h2p8_f64/weights/"))
    encoder = Encoder(ViTBackbone(model, "dino").eval(), "x", "0", 32, (0.5,) * 3, (0.5,) * 3)
    images = original["vit/micro32d2h2p8_f64/32x32/input"]
    for name, tokens, blocks in (("n1", "cls", 1), ("n2", "cls", 2), ("n1_avgpool", "cls+avg", 1)):
        torch.testing.assert_close(
            encoder.features(images, tokens, blocks), original[f"linear_feat/{name}"], rtol=0, atol=1e-12
        )
    assert encoder.features(images, "patches", 2).shape == (2, 16, 64)


def test_image_settings_are_those_of_training_unless_overridden(tmp_path: Path) -> None:
    preset = load_preset("tiny-dino", ["images.window=[0, 4095]", "images.min_side=4"])
    write_checkpoint(tmp_path / "ckpt.safetensors", preset.network().weights(), preset, 0)
    encoder = load_encoder(str(tmp_path), CPU)
    assert encoder.images.window == (0, 4095)
    changed = with_images(encoder, ["images.window=none", "images.max_aspect=7"]).images
    assert (changed.window, changed.max_aspect, changed.min_side) == (None, 7, 4)
    with pytest.raises(DinoError, match=r"expected images\.KEY=VALUE"):
        with_images(encoder, ["training.epochs=3"])
    with pytest.raises(DinoError, match="no key max_aspects") as error:
        with_images(encoder, ["images.max_aspects=3"])
    assert "max_aspect" in error.value.hint


def test_an_encoder_keeps_its_channels(tmp_path: Path) -> None:
    preset = load_preset("tiny-dino", of_channels(4))
    write_checkpoint(tmp_path / "ckpt.safetensors", preset.network().weights(), preset, 0)
    encoder = load_encoder(str(tmp_path), CPU)
    assert (encoder.channels, encoder.images.channels) == (4, 4)
    assert with_images(encoder, ["images.window=[0, 9]"]).images.window == (0, 9)
    with pytest.raises(DinoError, match=r"images\.channels=3 does not fit .*, which takes 4 channels"):
        with_images(encoder, ["images.channels=3"])


def test_an_encoder_for_many_images_computes_the_same_features() -> None:
    """Channels last change the memory layout, but not the features or the fingerprint."""
    backbone = BackboneConfig(name="resnet18").build(drop_path=False).eval().requires_grad_(False)
    plain = Encoder(copy.deepcopy(backbone), "x", fingerprint(backbone.model.state_dict()), 64, MEAN, STD)
    fast = quick(plain, "float32", compiled=False)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fast.features(images), features_of(backbone, images), rtol=1e-4, atol=1e-5)
    assert fast.backbone.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert fingerprint(fast.backbone.model.state_dict()) == plain.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_compiled_blocks_give_the_same_features_for_any_number_of_images(name: str) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = BackboneConfig(name=name, options=options).build(drop_path=False).eval()
    plain = Encoder(copy.deepcopy(backbone), "x", "", 32, MEAN, STD)
    fast = quick(Encoder(backbone, "x", "", 32, MEAN, STD), "float32", compiled=True)
    for count in (4, 3, 1):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(fast.features(images), plain.features(images), rtol=1e-4, atol=1e-5)


def overflowing(encoder: Encoder) -> Encoder:
    """Set finite weights whose products overflow."""
    with torch.no_grad():
        for block in encoder.backbone.model.blocks:
            block.attn.qkv.weight.mul_(1e30)
        encoder.backbone.model.norm.weight.fill_(3e38)
    return encoder


def test_patches_and_attention_that_are_not_finite_are_refused(encoder: Encoder) -> None:
    images = torch.randn(1, 3, 16, 24)
    for look in (encoder.patches, encoder.attention):
        assert look(images).isfinite().all()
    lost = overflowing(encoder)
    for look in (lost.patches, lost.attention):
        with pytest.raises(NotFinite, match=r"not finite: [\d,]+ of [\d,]+ values") as error:
            look(images)
        assert "another checkpoint" in error.value.hint


def test_finite_rows_are_separated_from_others() -> None:
    made = torch.ones(3, 2, 2)
    made[1, 0, 1], made[1, 1, 1] = torch.nan, -torch.inf
    assert finite_rows(made, ["a", "b", "c"]) == ([0, 2], [("b", "not finite: 2 of 4 features")])
    assert finite_rows(made[:0], []) == ([], [])

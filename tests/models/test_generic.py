from __future__ import annotations

import pytest
import torch

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig, LearningConfig, adapt, create_timm
from dinocli.models.backbone import MaskedPatches
from dinocli.models.generic import GenericBackbone

# Small networks of each kind, with options that make them smaller still.
NETWORKS: dict[str, dict[str, object]] = {
    "resnet18": {},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "mobilenetv4_conv_small": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 4)},
    "xcit_small_12_p16_224": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "beit_base_patch16_224": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "eva02_tiny_patch14_224": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "vit_base_patch16_siglip_224": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "naflexvit_base_patch16_siglip": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 64, "depth": 2, "num_heads": 4},
}
FEATURES = {
    "mobilenetv4_conv_small": "mean",
    "xcit_small_12_p16_224": "token",
    "deit_tiny_distilled_patch16_224": "token",
}
ONE_SIZE = {"beit_base_patch16_224"}


def build(name: str) -> GenericBackbone:
    torch.manual_seed(0)
    backbone = adapt(create_timm(name, **NETWORKS[name]), "antialias").eval()
    assert isinstance(backbone, GenericBackbone)
    return backbone


@pytest.mark.parametrize("name", NETWORKS)
def test_the_class_token_is_the_networks_own_or_pooled_by_its_head(name: str) -> None:
    backbone = build(name)
    side = backbone.model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        tokens, features = backbone(images), backbone.model.forward_features(images)
        expected = {
            "token": lambda: features[:, 0],
            "mean": lambda: features.mean((2, 3)),
            "head": lambda: backbone.model(images),
        }[FEATURES.get(name, "head")]()
    assert tokens.cls.shape == (2, backbone.width)
    torch.testing.assert_close(tokens.cls, expected)
    assert tokens.patches.shape == (2, tokens.grid[0] * tokens.grid[1], backbone.width)
    assert tokens.grid == (side // backbone.patch_size,) * 2


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ONE_SIZE])
def test_images_may_have_other_sizes(name: str) -> None:
    backbone = build(name)
    rows, columns = 3, 4
    tokens = backbone(torch.randn(1, 3, rows * backbone.patch_size, columns * backbone.patch_size))
    assert tokens.grid == (rows, columns)


@pytest.mark.parametrize("name", sorted(ONE_SIZE))
def test_a_network_of_one_size_names_it(name: str) -> None:
    with pytest.raises(DinoError, match="does not accept images of 160x224 pixels") as error:
        build(name)(torch.zeros(1, 3, 160, 224))
    assert error.value.hint == "--size 224"


def test_patches_are_those_of_the_map_row_by_row() -> None:
    backbone = build("resnet18")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = backbone.model.forward_features(images)
        torch.testing.assert_close(backbone.patches(images)[0], features[0].permute(1, 2, 0))


def test_the_patches_of_convnext_have_the_norm_that_its_head_applies() -> None:
    backbone = build("convnext_tiny")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = backbone.model.forward_features(images)
        norm = backbone.model.head.norm
        expected = torch.nn.functional.layer_norm(features.permute(0, 2, 3, 1), (32,), norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(backbone.patches(images), expected)


def test_the_gradient_of_the_class_token_reaches_the_first_layer() -> None:
    for name in ("xcit_small_12_p16_224", "swin_tiny_patch4_window7_224"):
        backbone = build(name)
        backbone.class_tokens(torch.randn(2, 3, 224, 224))[0].square().sum().backward()
        first = next(parameter for parameter in backbone.parameters() if parameter.ndim == 4)
        assert first.grad is not None
        assert first.grad.abs().sum() > 0


def test_learning_rates_of_xcit_decay_over_its_blocks() -> None:
    backbone = build("xcit_small_12_p16_224")
    names = (
        "patch_embed.proj.0.0.weight",
        "blocks.0.norm1.weight",
        "blocks.1.mlp.fc1.bias",
        "cls_attn_blocks.0.gamma1",
    )
    assert [backbone.level(name) for name in names] == [0, 1, 2, 3]
    assert backbone.levels == 3


def test_learning_rates_decay_over_the_stages_of_networks_without_blocks() -> None:
    learning = LearningConfig(layer_decay=0.5)
    resnet = build("resnet18")
    names = ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer3.1.bn2.bias", "layer4.0.downsample.0.weight")
    rates = {name: learning.rate(resnet, name) for name, _ in resnet.model.named_parameters()}
    assert [rates[name] for name in names] == [1 / 32, 1 / 32, 1 / 16, 1 / 4, 1 / 2]
    assert max(rates.values()) == 0.5, "below the rate of the heads"
    swin = build("swin_tiny_patch4_window7_224")
    ordered = [swin.level(f"layers.{stage}.blocks.0.norm1.weight") for stage in range(4)]
    assert ordered == sorted(set(ordered)) and swin.level("patch_embed.proj.weight") == 0


def test_a_network_whose_stages_timm_does_not_know_has_one_rate() -> None:
    with torch.device("meta"):
        backbone = GenericBackbone(create_timm("poolformer_s12"))
    rates = {LearningConfig(layer_decay=0.5).rate(backbone, name) for name, _ in backbone.model.named_parameters()}
    assert rates == {0.5}


def test_masks_are_not_supported() -> None:
    backbone = BackboneConfig(name="resnet18").build(drop_path=False)
    with pytest.raises(DinoError, match="no patches to mask") as error:
        backbone(torch.zeros(1, 3, 32, 32), MaskedPatches(torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 512)))
    assert error.value.hint == "--set views.mask=none"


def test_only_the_last_layer_is_available_and_no_facets() -> None:
    backbone, images = build("resnet18"), torch.randn(1, 3, 64, 96)
    for layers, facet in (([-1], "key"), ([1], "token")):
        with pytest.raises(DinoError, match="gives only its output"):
            backbone.patches(images, layers, facet)  # type: ignore[arg-type]
    with pytest.raises(DinoError, match="--blocks 4 is not supported"):
        backbone.class_tokens(images, 4)
    with pytest.raises(DinoError, match="vision transformer"):
        backbone.attention(images)


@pytest.mark.parametrize("name", ["crossvit_9_240", "pit_ti_224"])
def test_a_network_without_one_grid_of_patches_is_refused(name: str) -> None:
    with pytest.raises(DinoError, match=r"expected patch tokens or a map|does not take a batch of images"):
        adapt(create_timm(name), "antialias")


def test_a_network_that_pools_its_patches_gives_its_pooled_feature() -> None:
    """Its class token has no norm after it."""
    options = {"global_pool": "avg", "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = adapt(create_timm("vit_tiny_patch16_224", **options), "antialias").eval()
    images = torch.randn(1, 3, 224, 224)
    assert isinstance(backbone, GenericBackbone)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).cls, backbone.model(images))


def test_images_with_an_incomplete_last_patch_are_read_as_timm_reads_them() -> None:
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 40, "patch_size": 16}
    backbone = adapt(create_timm("vit_base_patch16_siglip_224", **options), "antialias").eval()
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).cls, backbone.model(images))


def test_the_native_image_need_not_be_square() -> None:
    options = {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": (96, 64), "patch_size": 16}
    backbone = adapt(create_timm("vit_base_patch16_siglip_224", **options), "antialias").eval()
    assert backbone.patch_size == 16
    assert backbone(torch.zeros(1, 3, 96, 64)).grid == (6, 4)

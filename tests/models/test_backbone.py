from __future__ import annotations

import plain
import pytest
import torch
from conftest import PRECISIONS, assert_original
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from dinocli.errors import DinoError
from dinocli.models.backbone import BackboneConfig, Hidden, ViTBackbone, adapt

MICRO = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES = ["32x32", "16x16", "24x40", "16x64", "27x45"]


@pytest.fixture
def micro(original) -> ViTBackbone:
    model = VisionTransformer(**MICRO, num_classes=0).double()
    model.load_state_dict(original.below("vit/micro32d2h2p8_f64/weights/"))
    return ViTBackbone(model, "dino").eval()


@PRECISIONS
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_attention_equal_the_originals_at_every_size(
    original, micro: ViTBackbone, size: str, dtype: torch.dtype
) -> None:
    name = f"vit/micro32d2h2p8_f64/{size}"
    micro, images = micro.to(dtype), original[f"{name}/input"].to(dtype)
    tokens = micro(images)
    assert_original(tokens.cls, original[f"{name}/cls"])
    everything = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    assert_original(everything, original[f"{name}/inter_n1/0"])
    assert tokens.grid[0] * tokens.grid[1] == tokens.patches.shape[1]
    attention = original[f"{name}/last_attn"]
    assert_original(micro.attention(images), attention[:, :, :1])
    assert_original(micro.attention(images, slice(None)), attention)


def test_the_oracle_is_the_original(original) -> None:
    weights = original.below("vit/micro32d2h2p8_f64/weights/")
    for size in SIZES:
        name = f"vit/micro32d2h2p8_f64/{size}"
        outputs, attention = plain.vit(weights, original[f"{name}/input"], heads=2)
        assert_original(outputs[-1], original[f"{name}/inter_n1/0"], size)
        assert_original(attention, original[f"{name}/last_attn"], size)


@PRECISIONS
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 96), (160, 256), (112, 448), (230, 98)])
def test_every_block_equals_its_description_at_the_sizes_of_training(
    patch: int, height: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    options = {"img_size": 224, "patch_size": patch, "embed_dim": 24, "depth": 3, "num_heads": 3}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=options, positions="dino").build(drop_path=False)
    backbone = backbone.eval().to(dtype)
    for parameter in backbone.parameters():
        parameter.data.copy_(torch.randn_like(parameter) / 8)
    images = torch.randn(1, 3, height, width, dtype=dtype)
    weights = {k: v.double() for k, v in backbone.model.state_dict().items()}
    expected, attention = plain.vit(weights, images.double(), heads=3)
    with torch.no_grad():
        for ours, theirs in zip(backbone.blocks(images, 3), expected, strict=True):
            assert_original(torch.cat([ours.cls[:, None], ours.patches], 1), theirs)
        assert_original(backbone.attention(images), attention[:, :, :1])


def test_a_large_photo_costs_memory_for_its_patches_and_not_their_square() -> None:
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=MICRO, positions="dino").build(drop_path=False)
    with torch.no_grad():
        assert backbone.attention(torch.zeros(1, 3, 8 * 60, 8 * 80)).shape == (1, 2, 1, 4801)


def test_registers_stand_apart_and_get_no_position() -> None:
    options = MICRO | {"reg_tokens": 4, "no_embed_class": True}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=options, positions="antialias").build(
        drop_path=False
    )
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone.eval()(images)
    assert (tokens.registers.shape, tokens.patches.shape) == ((2, 4, 32), (2, 16, 32))
    expected = backbone.model.forward_features(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    torch.testing.assert_close(tokens.patches, expected[:, 5:])


@pytest.mark.parametrize("depth", [4, 12])
def test_drop_path_grows_linearly_and_is_the_students_alone(original, depth: int) -> None:
    options = MICRO | {"depth": depth}
    config = BackboneConfig(name="vit_tiny_patch16_224", options=options, drop_path=0.1, positions="dino")
    blocks = config.build(drop_path=True).model.blocks
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx(original.made["droppath"][str(depth)], abs=1e-8)
    assert all(not hasattr(block.drop_path1, "drop_prob") for block in config.build(drop_path=False).model.blocks)


def test_a_class_token_starts_with_the_spread_asked_for() -> None:
    config = BackboneConfig(name="vit_small_patch16_224", class_token_std=0.02, positions="dino")
    assert config.build(drop_path=False).model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_last_blocks_are_normed_and_in_order(micro: ViTBackbone, original) -> None:
    images = original["vit/micro32d2h2p8_f64/32x32/input"]
    first, last = micro.blocks(images, 2)
    torch.testing.assert_close(last.cls, micro(images).cls)
    assert not torch.allclose(first.cls, last.cls)
    with pytest.raises(DinoError, match="last 3 blocks"):
        micro.blocks(images, 3)


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_class_tokens_alone_are_those_of_all_tokens_with_the_same_gradient(
    micro: ViTBackbone, original, last: int, size: str
) -> None:
    images = original[f"vit/micro32d2h2p8_f64/{size}/input"]
    alone, all_ = micro.class_tokens(images, last), [tokens.cls for tokens in micro.blocks(images, last)]
    weights = torch.randn(last, *all_[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((torch.stack(tokens) * weights).sum(), list(micro.parameters())) for tokens in (alone, all_)
    ]
    torch.testing.assert_close(alone, all_, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_hidden_patches_are_not_seen_and_their_places_are(micro: ViTBackbone) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64).unbind()
    where = torch.zeros(2, 16, dtype=torch.bool)
    where[0, 5], where[1, :] = True, True
    hidden = Hidden(where, torch.randn(1, 32, dtype=torch.float64))
    mixed = one.clone()
    mixed[0, :, 8:16, 8:16] = other[0, :, 8:16, 8:16]  # the sixth patch
    mixed[1] = other[1]
    torch.testing.assert_close(micro(mixed, hidden).patches, micro(one, hidden).patches)
    assert not torch.allclose(micro(mixed).patches, micro(one).patches)
    torch.testing.assert_close(micro.class_tokens(mixed, hidden=hidden)[0], micro(one, hidden).cls)
    # What stands in a hidden place knows where it is.
    assert not torch.allclose(micro(one, hidden).patches[1, 0], micro(one, hidden).patches[1, 1])


def test_a_convolutional_network_has_nothing_to_hide() -> None:
    backbone = BackboneConfig(name="resnet18").build(drop_path=False)
    with pytest.raises(DinoError, match="patches were to be hidden") as error:
        backbone(torch.zeros(1, 3, 32, 32), Hidden(torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 512)))
    assert error.value.hint == "--set views.mask=none"


def test_branches_are_left_out_alike_in_all_blocks() -> None:
    config = BackboneConfig(
        name="vit_tiny_patch16_224", options=MICRO, drop_path=0.3, drop_path_rule="uniform", positions="dino"
    )
    assert [block.left_out for block in config.build(drop_path=True).row] == [0.3, 0.3]
    assert [block.left_out for block in config.build(drop_path=False).row] == [0.0, 0.0]
    with pytest.raises(DinoError, match="no row of plain ones"):
        BackboneConfig(name="resnet18", drop_path=0.1, drop_path_rule="uniform").build(drop_path=True)


def test_class_tokens_alone_are_less_work(micro: ViTBackbone) -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    work = []
    for tokens in (micro.class_tokens, micro.blocks):
        with FlopCounterMode(display=False) as counter:
            tokens(images, 1)
        work.append(counter.get_total_flops())
    width, tokens = 32, 17
    # Queries, projection and MLP of the last block for one token and not for seventeen, and its share of attention.
    saved = 2 * (tokens - 1) * (width * width * (1 + 1 + 8) + 2 * tokens * width)
    assert work[1] - work[0] == saved


def test_a_block_that_is_not_timms_own_is_run_as_it_is() -> None:
    model = VisionTransformer(**MICRO, num_classes=0, block_fn=ParallelScalingBlock).eval()
    backbone, images = ViTBackbone(model, "antialias"), torch.randn(2, 3, 32, 32)
    (cls,) = backbone.class_tokens(images)
    torch.testing.assert_close(cls, model.forward_features(images)[:, 0])


def test_a_convolutional_network_gives_its_map_and_the_average_of_it() -> None:
    backbone = BackboneConfig(name="resnet18").build(drop_path=False).eval()
    tokens = backbone(torch.randn(2, 3, 64, 96))
    assert (tokens.grid, backbone.patch_size, backbone.width) == ((2, 3), 32, 512)
    torch.testing.assert_close(tokens.cls, tokens.patches.mean(1))
    with pytest.raises(DinoError, match="vision transformer"):
        backbone.attention(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch16_224", {}, "no model 'vit_smal_patch16_224'"),
        ("vit_tiny_patch16_224", {"wings": 2}, "cannot build"),
        ("swin_tiny_patch4_window7_224", {}, "cannot be a backbone"),
        ("deit_tiny_distilled_patch16_224", {}, "cannot be a backbone"),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}, "cannot be a backbone"),
        ("mixer_s32_224", {}, "cannot be a backbone"),
    ],
)
def test_what_cannot_be_a_backbone_is_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(DinoError, match=message):
        BackboneConfig(name=name, options=options).build(drop_path=False)


def test_adapt_takes_any_timm_model_of_the_two_kinds() -> None:
    assert adapt(VisionTransformer(**MICRO, num_classes=0), "antialias").width == 32


def test_an_image_smaller_than_a_patch_is_said(micro: ViTBackbone) -> None:
    with pytest.raises(DinoError, match="at least one patch of 8 pixels"):
        micro(torch.zeros(1, 3, 7, 9, dtype=torch.float64))

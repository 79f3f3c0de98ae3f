from __future__ import annotations

import copy

import plain
import pytest
import torch
from conftest import PRECISIONS, assert_original, assert_same_features
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinocli.core.errors import DinoError
from dinocli.models.architecture import BackboneConfig, adapt, create_timm
from dinocli.models.backbone import MaskedPatches
from dinocli.models.generic import GenericBackbone
from dinocli.models.transformer import RotaryBackbone, ViTBackbone, _embed_patches

MICRO = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES = ["32x32", "16x16", "24x40", "16x64", "27x45"]


@pytest.fixture
def micro(original) -> ViTBackbone:
    model = VisionTransformer(**MICRO, num_classes=0).double()
    model.load_state_dict(original.below("vit/micro32d2h2p8_f64/weights/"))
    return ViTBackbone(model, "dino").eval()


@pytest.mark.parametrize("size", SIZES)
def test_patches_embedded_in_training_equal_a_convolution_with_the_same_gradients(size: str) -> None:
    height, width = map(int, size.split("x"))
    proj = nn.Conv2d(3, 32, 8, 8).double()
    images = torch.randn(3, 3, height, width, dtype=torch.float64, requires_grad=True)
    expected = proj(images).flatten(2).transpose(1, 2)
    found = _embed_patches(proj, images, (height // 8, width // 8))
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    inputs = [images, *proj.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@PRECISIONS
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_attention_equal_the_originals_at_every_size(
    original, micro: ViTBackbone, size: str, dtype: torch.dtype
) -> None:
    name = f"vit/micro32d2h2p8_f64/{size}"
    micro, images = micro.to(dtype), original[f"{name}/input"].to(dtype)
    tokens = micro(images)
    assert_original(tokens.cls, original[f"{name}/cls"])
    all_tokens = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    assert_original(all_tokens, original[f"{name}/inter_n1/0"])
    assert tokens.grid[0] * tokens.grid[1] == tokens.patches.shape[1]
    attention = original[f"{name}/last_attn"]
    assert_original(micro.attention(images), attention[:, :, :1])
    assert_original(micro.attention(images, slice(None)), attention)


def test_the_reference_implementation_equals_the_original(original) -> None:
    weights = original.below("vit/micro32d2h2p8_f64/weights/")
    for size in SIZES:
        name = f"vit/micro32d2h2p8_f64/{size}"
        outputs, attention = plain.vit(weights, original[f"{name}/input"], heads=2)
        assert_original(outputs[-1], original[f"{name}/inter_n1/0"], size)
        assert_original(attention, original[f"{name}/last_attn"], size)


@PRECISIONS
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 96), (160, 256), (112, 448), (230, 98)])
def test_every_block_equals_the_reference_at_training_sizes(
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
        for ours, theirs in zip(backbone.last_tokens(images, 3), expected, strict=True):
            assert_original(torch.cat([ours.cls[:, None], ours.patches], 1), theirs)
        assert_original(backbone.attention(images), attention[:, :, :1])


def test_attention_of_a_large_photo_is_computed_only_for_the_class_token() -> None:
    backbone = BackboneConfig(name="vit_tiny_patch16_224", options=MICRO, positions="dino").build(drop_path=False)
    with torch.no_grad():
        assert backbone.attention(torch.zeros(1, 3, 8 * 60, 8 * 80)).shape == (1, 2, 1, 4801)


def test_registers_are_returned_separately_and_have_no_position() -> None:
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


def test_last_tokens_are_normalized_and_in_order(micro: ViTBackbone, original) -> None:
    images = original["vit/micro32d2h2p8_f64/32x32/input"]
    first, last = micro.last_tokens(images, 2)
    torch.testing.assert_close(last.cls, micro(images).cls)
    assert not torch.allclose(first.cls, last.cls)
    with pytest.raises(DinoError, match="--blocks 3 is larger than the 2 blocks"):
        micro.last_tokens(images, 3)


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_class_tokens_and_their_gradient_equal_those_of_all_tokens(
    micro: ViTBackbone, original, last: int, size: str
) -> None:
    images = original[f"vit/micro32d2h2p8_f64/{size}/input"]
    alone, all_ = micro.class_tokens(images, last), [tokens.cls for tokens in micro.last_tokens(images, last)]
    weights = torch.randn(last, *all_[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((torch.stack(tokens) * weights).sum(), list(micro.parameters())) for tokens in (alone, all_)
    ]
    torch.testing.assert_close(alone, all_, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_masked_patches_have_no_influence_but_keep_their_position(micro: ViTBackbone) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64).unbind()
    where = torch.zeros(2, 16, dtype=torch.bool)
    where[0, 5], where[1, :] = True, True
    masked = MaskedPatches(where, torch.randn(1, 32, dtype=torch.float64))
    mixed = one.clone()
    mixed[0, :, 8:16, 8:16] = other[0, :, 8:16, 8:16]  # the sixth patch
    mixed[1] = other[1]
    torch.testing.assert_close(micro(mixed, masked).patches, micro(one, masked).patches)
    assert not torch.allclose(micro(mixed).patches, micro(one).patches)
    torch.testing.assert_close(micro.class_tokens(mixed, masked=masked)[0], micro(one, masked).cls)
    # Mask tokens at different positions differ.
    assert not torch.allclose(micro(one, masked).patches[1, 0], micro(one, masked).patches[1, 1])


def test_class_tokens_need_fewer_operations_than_all_tokens(micro: ViTBackbone) -> None:
    # Counted on meta: on a CPU the counter knows only some of the kernels of attention, and which one runs depends on the CPU.
    micro = micro.to("meta")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.float64, device="meta")
    flops = []
    for encode in (micro.class_tokens, micro.last_tokens):
        with FlopCounterMode(display=False) as counter:
            encode(images, 1)
        flops.append(counter.get_total_flops())
    width, tokens = 32, 17
    # In the last block: queries, projection, MLP and attention of one token instead of seventeen.
    saved = 2 * (tokens - 1) * (width * width * (1 + 1 + 8) + 2 * tokens * width)
    assert flops[1] - flops[0] == saved


def test_blocks_of_other_classes_run_unchanged() -> None:
    model = VisionTransformer(**MICRO, num_classes=0, block_fn=ParallelScalingBlock).eval()
    backbone, images = ViTBackbone(model, "antialias"), torch.randn(2, 3, 32, 32)
    (cls,) = backbone.class_tokens(images)
    torch.testing.assert_close(cls, model.forward_features(images)[:, 0])


def test_images_smaller_than_a_patch_are_refused(micro: ViTBackbone) -> None:
    with pytest.raises(DinoError, match="smaller than one patch of 8 pixels"):
        micro(torch.zeros(1, 3, 7, 9, dtype=torch.float64))


def make_rotary(depth: int = 3, seed: int = 0, **options: object) -> tuple[Eva, RotaryBackbone]:
    """Return a small DINOv3 model of timm, and our backbone with the same random weights."""
    torch.manual_seed(seed)
    theirs = create_timm("vit_small_patch16_dinov3", **(MICRO | {"depth": depth} | options)).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = adapt(copy.deepcopy(theirs), "antialias")
    assert isinstance(ours, RotaryBackbone)
    return theirs, ours


ROTARY = [{}, {"qkv_bias": True, "num_reg_tokens": 0}, {"swiglu_mlp": True, "swiglu_align_to": 8}]
ROTARY_IDS = ["released", "without registers", "swiglu"]
ROTARY_SIZES = [(32, 32), (16, 16), (24, 40), (16, 64), (8, 8)]


@PRECISIONS
@pytest.mark.parametrize("options", ROTARY, ids=ROTARY_IDS)
def test_a_rotary_backbone_equals_timms_at_every_size(options: dict, dtype: torch.dtype) -> None:
    theirs, ours = make_rotary(**options)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    registers = options.get("num_reg_tokens", 4)
    for size in ROTARY_SIZES:
        images = torch.randn(2, 3, *size, dtype=dtype)
        with torch.no_grad():
            expected, tokens = theirs.forward_features(images), ours(images)
        assert tokens.registers.shape == (2, registers, 32)
        assert tokens.grid == (size[0] // 8, size[1] // 8)
        assert_original(torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1), expected, str(size))


def test_a_rotary_backbone_ignores_pixels_beyond_the_last_whole_patch() -> None:
    theirs, ours = make_rotary()
    images = torch.randn(2, 3, 27, 45, dtype=torch.float64)
    torch.testing.assert_close(ours(images).cls, theirs.forward_features(images[..., :24, :40])[:, 0])


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("options", ROTARY, ids=ROTARY_IDS)
def test_class_tokens_of_a_rotary_backbone_have_the_same_gradient(options: dict, last: int) -> None:
    _, ours = make_rotary(**options)
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    alone, all_ = ours.class_tokens(images, last), [tokens.cls for tokens in ours.last_tokens(images, last)]
    gradients = [
        torch.autograd.grad(torch.stack(tokens).square().sum(), list(ours.parameters())) for tokens in (alone, all_)
    ]
    torch.testing.assert_close(alone, all_, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", ROTARY[:2], ids=ROTARY_IDS[:2])
def test_attention_of_a_rotary_backbone_equals_its_definition(options: dict) -> None:
    theirs, ours = make_rotary(**options)
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    prefix, block = theirs.num_prefix_tokens, theirs.blocks[-1]
    _, (before, _) = theirs.forward_intermediates(images, indices=[1, 2], output_fmt="NLC", return_prefix_tokens=True)
    tokens = block.norm1(torch.cat([before[1], before[0]], 1))
    none = torch.zeros(32, dtype=torch.float64)
    q_bias = none if block.attn.q_bias is None else block.attn.q_bias
    q, k = tokens @ block.attn.qkv.weight[:32].T + q_bias, tokens @ block.attn.qkv.weight[32:64].T
    angles = [[0.0] * 8] * prefix
    for row in range(2):
        for column in range(3):
            coordinates = (2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1)
            angles.append([2 * torch.pi * value / 100 ** (i / 4) for value in coordinates for i in range(4)])
    rotation = torch.polar(torch.ones(prefix + 6, 8, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))

    def by_head(values: torch.Tensor) -> torch.Tensor:  # [B, T, 32] -> [B, heads, T, 8], complex
        heads = values.unflatten(-1, (2, 16)).transpose(1, 2)
        return torch.complex(heads[..., :8], heads[..., 8:]) * rotation

    scores = (by_head(q) @ by_head(k).mH).real / 16**0.5
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
    found = ours.attention(images, slice(None))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # timm's periods and coordinates are float32
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)))
    torch.testing.assert_close(ours.attention(images), found[:, :, :1])


def training(**changes: object) -> BackboneConfig:
    options = MICRO | {"depth": 3, "init_values": 0.5}
    return BackboneConfig.parse({"name": "vit_small_patch16_dinov3", "options": options} | changes, "here")


@pytest.mark.parametrize("rule", ["linear", "uniform"])
def test_activation_checkpointing_of_a_rotary_backbone_gives_the_same_gradient(rule: str) -> None:
    torch.manual_seed(0)
    config = training(rescale_positions=2.0, drop_path=0.4, drop_path_rule=rule)
    backbone = config.build(drop_path=True).double().train()
    checkpointed = copy.deepcopy(backbone)
    checkpointed.recompute_blocks()
    images = torch.randn(4, 3, 24, 32, dtype=torch.float64)
    gradients = []
    for network in (backbone, checkpointed):
        torch.manual_seed(2)
        network(images).patches.square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)
    assert all(gradient is not None and gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_positions_are_rescaled_only_in_the_student_and_once_per_forward_pass(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = training(rescale_positions=2.0)
    student, teacher = config.build(drop_path=True).train(), config.build(drop_path=False).train()
    if recompute:
        student.recompute_blocks()
    images, draws, draw = torch.randn(2, 3, 32, 32), [], torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, *a: draws.append(a) or draw(t, *a))
    cls = student(images).cls
    cls.sum().backward()
    assert draws == [pytest.approx((-0.6931, 0.6931), abs=1e-4)]
    assert not torch.allclose(student(images).cls, cls, atol=1e-3)
    draws.clear()
    assert_same_features(teacher(images).cls, teacher(images).cls)
    assert_same_features(student.eval()(images).cls, student(images).cls)
    assert not draws


def test_masked_patches_of_a_rotary_backbone_have_no_influence() -> None:
    _, ours = make_rotary()
    one, other = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64).unbind()
    masked = MaskedPatches(torch.zeros(2, 16, dtype=torch.bool), torch.randn(1, 32, dtype=torch.float64))
    masked.where[0, 5], masked.where[1, :] = True, True
    mixed = one.clone()
    mixed[0, :, 8:16, 8:16], mixed[1] = other[0, :, 8:16, 8:16], other[1]  # the sixth patch, and all
    torch.testing.assert_close(ours(mixed, masked).patches, ours(one, masked).patches)
    assert not torch.allclose(ours(mixed).patches, ours(one).patches)
    # Among visible patches, mask tokens at different positions differ.
    two = MaskedPatches(torch.zeros(2, 16, dtype=torch.bool), masked.token)
    two.where[:, [2, 9]] = True
    assert not torch.allclose(ours(one, two).patches[0, 2], ours(one, two).patches[0, 9])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", {"use_abs_pos_emb": True}),
        ("vit_small_patch16_dinov3", {"class_token": False}),
        ("vit_small_patch16_dinov3", {"rope_type": "cat"}),
        ("vit_small_patch16_dinov3", {"use_post_norm": True}),
        ("vit_small_patch16_dinov3", {"attn_type": "rope"}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_other_kinds_of_eva_are_run_by_timm_itself(name: str, options: dict) -> None:
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 56 if "patch14" in name else 64}
    torch.manual_seed(0)
    backbone = BackboneConfig(name=name, options=small | options).build(drop_path=False).eval()
    assert type(backbone) is GenericBackbone
    side = 4 * backbone.patch_size
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).patches, backbone.model.forward_features(images)[:, -16:])


def test_a_network_that_drops_patches_in_training_is_refused() -> None:
    with pytest.raises(DinoError, match="expected patch tokens or a map"):
        BackboneConfig(name="vit_small_patch16_dinov3", options={"patch_drop_rate": 0.5, "depth": 1}).build(
            drop_path=False
        )


def project_patches(network: ViTBackbone | RotaryBackbone, images: torch.Tensor, layer: int, part: int) -> torch.Tensor:
    """Compute the patches' queries (part 0), keys (1) or values (2) with a block's own linear layer. [B, N, D]"""
    inputs: list[torch.Tensor] = []
    block = network.model.blocks[layer - 1]
    handle = block.norm1.register_forward_hook(lambda module, args, output: inputs.append(output))
    network.last_tokens(images, 1)
    handle.remove()
    projections = block.attn.qkv(inputs[0])
    if getattr(block.attn, "q_bias", None) is not None:
        projections = projections + torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
    return projections.chunk(3, -1)[part][:, network.model.num_prefix_tokens :]


def test_facets_equal_the_projections_of_their_blocks(micro: ViTBackbone) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens = micro.last_tokens(images, 2)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(micro.patches(images).flatten(1, 2), tokens[-1].patches, **exact)
    assert micro.patches(images).shape[1:3] == (4, 6)
    both = torch.cat([tokens[1].patches, tokens[0].patches], -1)
    torch.testing.assert_close(micro.patches(images, [-1, 1]).flatten(1, 2), both, **exact)
    for layer in (1, 2):
        for part, facet in enumerate(("query", "key", "value")):
            found = micro.patches(images, [layer], facet).flatten(1, 2)  # type: ignore[arg-type]
            torch.testing.assert_close(found, project_patches(micro, images, layer, part), **exact)
    for layer in (0, 3, -3):
        with pytest.raises(DinoError, match="is not a block; expected 1 to 2"):
            micro.patches(images, [layer])


def test_facets_of_a_rotary_backbone_are_those_before_the_rotation() -> None:
    _, network = make_rotary()
    images = torch.randn(1, 3, 32, 48, dtype=next(network.parameters()).dtype)
    with torch.no_grad():
        for part, facet in enumerate(("query", "key", "value")):
            found = network.patches(images, [2], facet).flatten(1, 2)  # type: ignore[arg-type]
            torch.testing.assert_close(found, project_patches(network, images, 2, part))


OVERLAPPING = [
    BackboneConfig(name="vit_tiny_patch16_224", options=MICRO, positions="dino"),
    BackboneConfig(name="vit_tiny_patch16_224", options=MICRO, positions="antialias"),
    BackboneConfig(
        name="vit_small_patch16_dinov3",
        options={"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 6},
    ),
]


@pytest.mark.parametrize("config", OVERLAPPING, ids=["dino", "antialias", "rotary"])
@pytest.mark.parametrize("size", [(32, 32), (24, 43)])
@torch.no_grad()
def test_overlapping_patches_keep_the_tokens_of_whole_ones_and_add_those_of_the_shifted_image(
    config: BackboneConfig, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    network = config.build(drop_path=False).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    prefix = network.model.num_prefix_tokens

    def embedded(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches as they are embedded [B, D, rows, columns], and the first block's input of the same shape."""
        tokens, rotation, grid = network._embed(images)
        if rotation is not None:  # these positions are not in the tokens
            tokens = torch.cat([tokens, *(half.expand(len(images), -1, -1) for half in rotation)], -1)
        patches = network.model.patch_embed.proj(images[..., : size[0] // 8 * 8, : size[1] // 8 * 8])
        return patches, tokens[:, prefix:].transpose(1, 2).unflatten(-1, grid)

    whole, inputs = embedded(images)
    shifted = network.model.patch_embed.proj(images[..., 4:, 4:])
    before = network(images)
    network.use_stride(8)
    assert torch.equal(network(images).patches, before.patches), "the stride of whole patches changes nothing"
    network.use_stride(4)
    finer, finer_inputs = embedded(images)
    rows, columns = size[0] // 8 * 2 - 1, size[1] // 8 * 2 - 1
    assert finer.shape[-2:] == finer_inputs.shape[-2:] == network(images).grid == (rows, columns)
    torch.testing.assert_close(finer[..., ::2, ::2], whole)
    torch.testing.assert_close(finer_inputs[..., ::2, ::2], inputs)
    torch.testing.assert_close(finer[..., 1::2, 1::2], shifted[..., : rows // 2, : columns // 2])


def test_positions_between_patches_are_between_theirs() -> None:
    network = OVERLAPPING[2].build(drop_path=False).eval()
    network.use_stride(2)
    periods = network.model.rope.periods
    angles = network._rotary._get_angles(periods, (3, 5), 4)[network.model.num_prefix_tokens :].unflatten(0, (9, 17))
    steps = angles.diff(dim=1)
    torch.testing.assert_close(steps, steps[:1, :1].expand_as(steps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "stride", "said", "hint"),
    [
        (OVERLAPPING[0], 3, "expected 8, 4, 2 or 1", "--stride 4"),
        (OVERLAPPING[0], 16, "--stride 16 does not fit the patches of 8 pixels", "--stride 8"),
        (OVERLAPPING[0].model_copy(update={"stem": "conv"}), 2, "convolutional stem.*expected 8 or 4", "--stride 4"),
        (BackboneConfig(name="resnet18"), 8, "needs a plain vision transformer.*ResNet is none", "omit --stride"),
    ],
)
def test_a_stride_that_is_not_possible_is_an_error(config: BackboneConfig, stride: int, said: str, hint: str) -> None:
    with pytest.raises(DinoError, match=said) as error:
        config.build(drop_path=False).use_stride(stride)
    assert error.value.hint.startswith(hint)

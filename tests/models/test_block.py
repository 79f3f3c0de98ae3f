from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_original
from timm.layers import RotaryEmbeddingDinoV3
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinocli.models.block import ALL, DropPathDraws, DropPathMasks, PlainBlock, RotaryBlock, attention_of
from dinocli.models.rotary import Rotary


def drawn_masks(block: nn.Module, tokens: torch.Tensor) -> DropPathMasks:
    (masks,) = DropPathDraws()([block], tokens)
    return masks


KINDS: dict[str, dict] = {
    "plain": {"qkv_bias": True},
    "without biases": {"proj_bias": False},
    "layer scale": {"qkv_bias": True, "init_values": 0.3},
    "normed": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
}

ROTARY_KINDS: dict[str, dict] = {
    "plain": {"qkv_bias": True},
    "without biases": {"qkv_bias": False},
    "layer scale": {"init_values": 0.3},
    "swiglu": {"swiglu_mlp": True, "swiglu_align_to": 8, "init_values": 0.3},
    "normed": {"qk_norm": True, "scale_attn_inner": True, "scale_mlp": True},
}


def make_blocks(**options) -> tuple[Block, PlainBlock]:
    """Return timm's block in evaluation mode, and ours with the same random weights."""
    torch.manual_seed(0)
    theirs = Block(16, 2, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = PlainBlock.instead_of(copy.deepcopy(theirs))
    assert isinstance(ours, PlainBlock)
    return theirs, ours


def make_rotary_blocks(**options) -> tuple[EvaBlock, RotaryBlock, torch.Tensor, torch.Tensor]:
    """Return timm's block and ours as `make_blocks` does, and for each the rotary positions of a 2x3 grid."""
    torch.manual_seed(0)
    theirs = EvaBlock(16, 2, num_prefix_tokens=2, rotate_half=True, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    RotaryBlock.instead_of(ours)
    rope = RotaryEmbeddingDinoV3(8).double()
    return theirs, ours, rope.get_embed((2, 3)), Rotary(prefix=2)(rope.periods, (2, 3))


@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_a_rotary_block_equals_timms(kind: str) -> None:
    theirs, ours, rope, rotation = make_rotary_blocks(**ROTARY_KINDS[kind])
    assert RotaryBlock.reads(theirs)
    tokens = torch.randn(3, 2 + 6, 16, dtype=torch.float64)
    expected = theirs(tokens, rope)
    found = ours(tokens, rotation=rotation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for asking in (1, 4):
        found = ours(tokens, asking=asking, rotation=rotation)
        torch.testing.assert_close(found, expected[:, :asking], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(ours(tokens), expected), "positions change the output"
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_rotary_block_skips_branches_by_its_masks() -> None:
    _, block, _, rotation = make_rotary_blocks(init_values=0.3)
    tokens = torch.randn(3, 8, 16, dtype=torch.float64)
    whole = block(tokens, rotation=rotation)
    found = block(tokens, (torch.tensor([0, 2]), torch.tensor([2, 0])), None, rotation)
    assert torch.equal(found[1], tokens[1])
    assert not torch.allclose(found[0], whole[0]), "branches that are kept are scaled up"
    scale = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    found = block(tokens, (scale, scale), None, rotation)
    torch.testing.assert_close(found, torch.cat([tokens[:1], whole[1:]]))
    block.train().left_out = 0.5
    assert [len(mask) for mask in drawn_masks(block, tokens)] == [2, 2]


@pytest.mark.parametrize(
    "options",
    [{"rotate_half": False}, {"qkv_fused": False}, {"attn_type": "rope", "norm_layer": nn.LayerNorm}],
    ids=["rotated pairs", "separate projections", "timm's other attention"],
)
def test_blocks_with_other_kinds_of_rotary_attention_are_not_supported(options: dict) -> None:
    assert not RotaryBlock.reads(EvaBlock(16, 2, **{"rotate_half": True} | options))
    assert not RotaryBlock.reads(Block(16, 2))


@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_attention_of_a_rotary_block_gives_timms_output(kind: str) -> None:
    _, block, _, rotation = make_rotary_blocks(**ROTARY_KINDS[kind])
    tokens = torch.randn(3, 8, 16, dtype=torch.float64)
    weights = attention_of(block.attn, tokens, slice(None), rotation)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 8, dtype=torch.float64))
    torch.testing.assert_close(attention_of(block.attn, tokens, slice(2, 5), rotation), weights[:, :, 2:5])
    values = F.linear(tokens, block.attn.qkv.weight[32:], block.attn.v_bias)
    mixed = (weights @ values.unflatten(-1, (2, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
    expected = block.attn.proj(block.attn.norm(mixed))
    theirs = copy.deepcopy(block.attn)
    rope = RotaryEmbeddingDinoV3(8).double().get_embed((2, 3))
    torch.testing.assert_close(theirs(tokens, rope=rope), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_block_equals_timms(kind: str) -> None:
    theirs, ours = make_blocks(**KINDS[kind])
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    expected = theirs(tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours(tokens, asking=2), expected[:, :2], rtol=1e-12, atol=1e-13)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_the_attention_gate_of_newer_timm_versions_is_applied() -> None:
    theirs, ours = make_blocks()
    for block in (theirs, ours):
        torch.manual_seed(1)
        block.attn.gate = nn.Linear(16, 16).double()
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    if not hasattr(Block(16, 2).attn, "gate"):
        pytest.skip("this timm has no gate")
    expected = theirs(tokens)
    torch.testing.assert_close(ours(tokens), expected)
    torch.testing.assert_close(ours(tokens, asking=1), expected[:, :1])


def test_unfused_attention_equals_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = F.scaled_dot_product_attention
    calls: list[torch.Tensor] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0]) or fused(*a, **k))
    _, ours = make_blocks(qkv_bias=True)
    ours = ours.float()
    for tokens, grad, unfused in ((5, True, True), (5, False, True), (100, False, False), (500, True, False)):
        x = torch.randn(3, tokens, 16)
        expected = ours(x)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            found = ours(x)
        assert (not calls) == unfused
        torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.1)


def test_other_classes_of_blocks_are_unchanged() -> None:
    class Other(Block):
        pass

    assert type(PlainBlock.instead_of(Other(16, 2))) is Other


def test_drop_path_masks_equal_the_originals(original, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_mask = original["droppath/keep_mask"]
    x = original["droppath/input"]  # stored only in float32
    block = PlainBlock.instead_of(Block(32, 2, drop_path=0.3)).train()
    drawn: list[float] = []

    def draw(keep: torch.Tensor) -> torch.Tensor:
        drawn.extend(keep[:, 0].tolist())
        return keep_mask.flatten().expand(keep.shape).clone()

    monkeypatch.setattr(torch, "bernoulli", draw)
    masks = drawn_masks(block, x)
    assert drawn == pytest.approx([0.7, 0.7])
    for mask in masks:
        assert_original(x * mask, original["droppath/output_p0.3_seed0"])
    assert drawn_masks(block.eval(), x) == (None, None)


def test_masks_scale_the_branches_of_each_image() -> None:
    _, block = make_blocks(qkv_bias=True)
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    none, double = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
    whole = block(tokens)
    found = block(tokens, (none.view(3, 1, 1), double.view(3, 1, 1)))
    attended = tokens + torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1) * block.attn(block.norm1(tokens))
    expected = attended + torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1) * block.mlp(block.norm2(attended))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[1], whole[1])


def test_uniform_drop_path_skips_branches_of_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    _, block = make_blocks(qkv_bias=True)
    block.train().left_out = 0.4
    tokens = torch.randn(5, 3, 16, dtype=torch.float64)
    ranks = torch.tensor([[1, 3, 4, 0, 2], [3, 2, 0, 4, 1.0]])  # the orders 3, 0, 4, 1, 2 and 2, 4, 1, 0, 3
    monkeypatch.setattr(torch, "rand", lambda *shape, device: ranks)
    masks = drawn_masks(block, tokens)
    assert [s.tolist() for s in masks] == [[3, 0, 4], [2, 4, 1]], "always three of five"
    first = torch.tensor([1, 0, 0, 1, 1.0], dtype=torch.float64).view(5, 1, 1) * 5 / 3
    second = torch.tensor([0, 1, 1, 0, 1.0], dtype=torch.float64).view(5, 1, 1) * 5 / 3
    attended = tokens + first * block.attn(block.norm1(tokens))
    expected = attended + second * block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(tokens, masks), expected)
    torch.testing.assert_close(block(tokens, masks, asking=1), expected[:, :1])
    assert drawn_masks(block.eval(), tokens) == (None, None)


@pytest.mark.parametrize(("images", "left_out"), [(1, 0.9), (3, 0.5), (10, 0.3), (64, 0.4)])
def test_uniform_drop_path_keeps_a_fixed_number_of_images_and_at_least_one(images: int, left_out: float) -> None:
    block = PlainBlock.instead_of(Block(16, 2)).train()
    block.left_out = left_out
    for mask in drawn_masks(block, torch.zeros(images, 2, 16)):
        assert len(mask) == max(1, math.ceil((1 - left_out) * images))
        assert len(mask.unique()) == len(mask)


def test_skipped_branches_are_not_computed() -> None:
    # Counted on meta: on a CPU the counter knows only some of the kernels of attention, and which one runs depends on the CPU.
    block = PlainBlock.instead_of(Block(16, 2)).train().to("meta")
    tokens = torch.zeros(10, 4, 16, device="meta")
    flops = []
    for left_out in (0.0, 0.5):
        block.left_out = left_out
        with FlopCounterMode(display=False) as counter:
            block(tokens, drawn_masks(block, tokens))
        flops.append(counter.get_total_flops())
    assert flops[1] * 2 == flops[0]


@pytest.mark.parametrize("asking", [None, (1, 1), (None, 1)])
@pytest.mark.parametrize("kind", ["plain", "rotary"])
def test_a_packed_sequence_gives_what_each_size_gives_alone(kind: str, asking: tuple[int | None, ...] | None) -> None:
    torch.manual_seed(0)
    if kind == "plain":
        _, block = make_blocks(qkv_bias=True, init_values=0.3)
    else:
        _, block, *_ = make_rotary_blocks(init_values=0.3)
    layout = ((2, 8), (3, 5))
    groups = [torch.randn(*size, 16, dtype=torch.float64, requires_grad=True) for size in layout]
    turns = tuple(torch.randn(2, tokens, 4, dtype=torch.float64) for _, tokens in layout) if kind == "rotary" else None
    scales = [torch.rand(images, 1, 1, dtype=torch.float64) for images, _ in layout]
    counts = asking or (None, None)
    alone = [
        block(group, (scale, scale), count, turns and turns[i])
        for i, (group, scale, count) in enumerate(zip(groups, scales, counts, strict=True))
    ]

    def rows(tokens: list[int]) -> torch.Tensor:
        parts = zip(scales, tokens, strict=True)
        return torch.cat([scale.expand(-1, count, -1).flatten(0, 1) for scale, count in parts])

    second = rows([len(out[0]) for out in alone])
    packed = torch.cat([group.flatten(0, 1) for group in groups])
    found = block(packed, (second, second), asking, turns, layout)
    expected = torch.cat([out.flatten(0, 1) for out in alone])
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(out.square().sum(), groups) for out in (found, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_all_blocks_draw_factors_of_their_own_for_each_image() -> None:
    torch.manual_seed(0)
    blocks = [PlainBlock.instead_of(Block(8, 2, drop_path=p)).train() for p in (0.0, 0.5)]
    layout, last = ((200, 3), (100, 2)), ((200, 1), (100, 1))
    masks = DropPathDraws()(blocks, torch.zeros(800, 8), layout, last)
    assert [[len(mask) for mask in each] for each in masks] == [[800, 800], [300, 300]]
    assert all(bool((mask == 1).all()) for mask in masks[0]), "never skipped"
    for mask in masks[1]:
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert mask.mean().item() == pytest.approx(1, abs=0.25)  # four standard deviations of 300 draws
    assert not torch.equal(*masks[1]), "each branch has its own"
    (_, (first, _)) = DropPathDraws()(blocks, torch.zeros(800, 8), layout, layout)
    for image in first[:600].unflatten(0, (200, 3)):
        assert len(image.unique()) == 1, "one factor for all tokens of an image"
    assert DropPathDraws()([block.eval() for block in blocks], torch.zeros(4, 3, 8)) == [ALL, ALL]

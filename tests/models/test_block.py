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

from dinocli.models.block import PlainBlock, RotaryBlock, attention_of
from dinocli.models.rotary import Rotary

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


def made(**options) -> tuple[Block, PlainBlock]:
    """timm's block in evaluation mode, and ours with the same weights; no weight is as it starts."""
    torch.manual_seed(0)
    theirs = Block(16, 2, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = PlainBlock.instead_of(copy.deepcopy(theirs))
    assert isinstance(ours, PlainBlock)
    return theirs, ours


def made_rotary(**options) -> tuple[EvaBlock, RotaryBlock, torch.Tensor, torch.Tensor]:
    """timm's block and ours, as `made` has them, with the rotary positions of a grid of 2x3 for each."""
    torch.manual_seed(0)
    theirs = EvaBlock(16, 2, num_prefix_tokens=2, rotate_half=True, **options).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(theirs)
    RotaryBlock.instead_of(ours)
    rope = RotaryEmbeddingDinoV3(8).double()
    return theirs, ours, rope.get_embed((2, 3)), Rotary(prefix=2)(rope.periods, (2, 3))


@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_a_rotary_block_is_timms_own(kind: str) -> None:
    theirs, ours, rope, rotation = made_rotary(**ROTARY_KINDS[kind])
    assert RotaryBlock.reads(theirs)
    tokens = torch.randn(3, 2 + 6, 16, dtype=torch.float64)
    expected = theirs(tokens, rope)
    found = ours(tokens, rotation=rotation)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for asking in (1, 4):
        found = ours(tokens, asking=asking, rotation=rotation)
        torch.testing.assert_close(found, expected[:, :asking], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(ours(tokens), expected), "without them it is another block"
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_rotary_block_leaves_out_what_the_shares_say() -> None:
    _, block, _, rotation = made_rotary(init_values=0.3)
    tokens = torch.randn(3, 8, 16, dtype=torch.float64)
    whole = block(tokens, rotation=rotation)
    found = block(tokens, (torch.tensor([0, 2]), torch.tensor([2, 0])), None, rotation)
    assert torch.equal(found[1], tokens[1])
    assert not torch.allclose(found[0], whole[0]), "what stays makes up for what is left out"
    scale = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    found = block(tokens, (scale, scale), None, rotation)
    torch.testing.assert_close(found, torch.cat([tokens[:1], whole[1:]]))
    block.train().left_out = 0.5
    assert [len(share) for share in block.drop_path_masks(tokens)] == [2, 2]


@pytest.mark.parametrize(
    "options",
    [{"rotate_half": False}, {"qkv_fused": False}, {"attn_type": "rope", "norm_layer": nn.LayerNorm}],
    ids=["other halves", "apart", "timm's other attention"],
)
def test_a_block_that_turns_in_another_way_is_not_read(options: dict) -> None:
    assert not RotaryBlock.reads(EvaBlock(16, 2, **{"rotate_half": True} | options))
    assert not RotaryBlock.reads(Block(16, 2))


@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_attention_of_a_rotary_block_is_what_it_mixes_values_with(kind: str) -> None:
    _, block, _, rotation = made_rotary(**ROTARY_KINDS[kind])
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
def test_a_block_is_timms_own(kind: str) -> None:
    theirs, ours = made(**KINDS[kind])
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    expected = theirs(tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours(tokens, asking=2), expected[:, :2], rtol=1e-12, atol=1e-13)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_gate_of_newer_timm_is_obeyed() -> None:
    theirs, ours = made()
    for block in (theirs, ours):
        torch.manual_seed(1)
        block.attn.gate = nn.Linear(16, 16).double()
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    if not hasattr(Block(16, 2).attn, "gate"):
        pytest.skip("this timm has no gate")
    expected = theirs(tokens)
    torch.testing.assert_close(ours(tokens), expected)
    torch.testing.assert_close(ours(tokens, asking=1), expected[:, :1])


def test_attention_in_steps_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = F.scaled_dot_product_attention
    wholes: list[torch.Tensor] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: wholes.append(a[0]) or whole(*a, **k))
    _, ours = made(qkv_bias=True)
    ours = ours.float()
    for tokens, grad, in_steps in ((5, True, True), (5, False, False), (500, True, False)):
        x = torch.randn(3, tokens, 16)
        expected = ours(x)
        wholes.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            found = ours(x)
        assert (not wholes) == in_steps
        torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.1)


def test_other_blocks_stay_what_they_are() -> None:
    class Other(Block):
        pass

    assert type(PlainBlock.instead_of(Other(16, 2))) is Other


def test_a_dropped_branch_is_the_originals(original, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = original["droppath/keep_mask"]
    x = original["droppath/input"]  # stored in float32 alone
    block = PlainBlock.instead_of(Block(32, 2, drop_path=0.3)).train()
    drawn: list[float] = []

    def draw(values: torch.Tensor, p: float) -> torch.Tensor:
        drawn.append(p)
        return values.copy_(kept)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", draw)
    shares = block.drop_path_masks(x)
    assert drawn == pytest.approx([0.7, 0.7])
    for share in shares:
        assert_original(x * share, original["droppath/output_p0.3_seed0"])
    assert block.eval().drop_path_masks(x) == (None, None)


def test_dropped_branches_are_those_that_the_shares_say() -> None:
    _, block = made(qkv_bias=True)
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    none, double = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
    whole = block(tokens)
    found = block(tokens, (none.view(3, 1, 1), double.view(3, 1, 1)))
    attended = tokens + torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1) * block.attn(block.norm1(tokens))
    expected = attended + torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1) * block.mlp(block.norm2(attended))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[1], whole[1])


def test_branches_that_are_left_out_are_those_of_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    _, block = made(qkv_bias=True)
    block.train().left_out = 0.4
    tokens = torch.randn(5, 3, 16, dtype=torch.float64)
    orders = iter([torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 4, 1, 0, 3])])
    monkeypatch.setattr(torch, "randperm", lambda n, device: next(orders))
    shares = block.drop_path_masks(tokens)
    assert [s.tolist() for s in shares] == [[3, 0, 4], [2, 4, 1]], "three of five, whatever is drawn"
    first = torch.tensor([1, 0, 0, 1, 1.0], dtype=torch.float64).view(5, 1, 1) * 5 / 3
    second = torch.tensor([0, 1, 1, 0, 1.0], dtype=torch.float64).view(5, 1, 1) * 5 / 3
    attended = tokens + first * block.attn(block.norm1(tokens))
    expected = attended + second * block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(tokens, shares), expected)
    torch.testing.assert_close(block(tokens, shares, asking=1), expected[:, :1])
    assert block.eval().drop_path_masks(tokens) == (None, None)


@pytest.mark.parametrize(("images", "left"), [(1, 0.9), (3, 0.5), (10, 0.3), (64, 0.4)])
def test_as_many_are_left_out_each_time_and_one_at_least_stays(images: int, left: float) -> None:
    block = PlainBlock.instead_of(Block(16, 2)).train()
    block.left_out = left
    for share in block.drop_path_masks(torch.zeros(images, 2, 16)):
        assert len(share) == max(1, math.ceil((1 - left) * images))
        assert len(share.unique()) == len(share)


def test_what_is_left_out_is_no_work() -> None:
    # Counted on meta: on a CPU the counter knows only some of the kernels of attention, and which one runs depends on the CPU.
    block = PlainBlock.instead_of(Block(16, 2)).train().to("meta")
    tokens = torch.zeros(10, 4, 16, device="meta")
    work = []
    for left in (0.0, 0.5):
        block.left_out = left
        with FlopCounterMode(display=False) as counter:
            block(tokens, block.drop_path_masks(tokens))
        work.append(counter.get_total_flops())
    assert work[1] * 2 == work[0]

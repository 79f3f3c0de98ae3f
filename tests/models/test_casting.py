from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from dinocli.models.block import PlainBlock
from dinocli.models.casting import call_with_cast_weights


def make_block() -> nn.Module:
    torch.manual_seed(0)
    return PlainBlock.instead_of(Block(16, 2, qkv_bias=True, init_values=0.5))


def gradients(block: nn.Module, *, together: bool, recompute: bool = False) -> list[torch.Tensor]:
    tokens = torch.arange(2 * 5 * 16).view(2, 5, 16).sin().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        call = call_with_cast_weights if together else nn.Module.__call__
        if recompute:
            output = torch.utils.checkpoint.checkpoint(call, block, tokens, use_reentrant=False)
        else:
            output = call(block, tokens)
    output.float().square().sum().backward()
    return [output, tokens.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_cast_together_give_the_same_results_as_cast_one_by_one(recompute: bool) -> None:
    block = make_block()
    expected = gradients(copy.deepcopy(block), together=False)
    for ours, theirs in zip(gradients(block, together=True, recompute=recompute), expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # of the same dtype, too


def test_a_module_has_its_own_weights_after_a_call_even_if_it_fails() -> None:
    block = make_block()
    before = dict(block.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        call_with_cast_weights(block, torch.zeros(1, 2, 16))
        with pytest.raises(RuntimeError):
            call_with_cast_weights(block, torch.zeros(1, 2, 8))
    after = dict(block.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_weights_are_not_cast_without_autocast_or_in_another_precision() -> None:
    block = make_block()
    tokens = torch.randn(1, 3, 16)
    torch.testing.assert_close(call_with_cast_weights(block, tokens), block(tokens))
    double = copy.deepcopy(block).double()
    assert call_with_cast_weights(double, tokens.double()).dtype == torch.float64


def test_frozen_weights_get_no_gradient_and_none_is_computed() -> None:
    block = make_block()
    block.mlp.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        call_with_cast_weights(block, torch.zeros(1, 2, 16))
    seen: list[bool] = []
    block.mlp.fc1.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.requires_grad))
    gradients(block, together=True)
    assert seen == [False]
    assert block.mlp.fc1.weight.grad is None
    assert block.attn.qkv.weight.grad is not None

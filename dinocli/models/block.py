"""Blocks of timm's vision transformers, with drop path drawn outside and an option to compute only the first tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention  # type: ignore[attr-defined]
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dinocli.models.rotary import turned

DropPathMasks = tuple[Tensor | None, Tensor | None]
ALL: DropPathMasks = (None, None)
Branch = Callable[[Tensor], Tensor]
Projection = Literal["query", "key", "value"]


class BranchBlock(nn.Module):
    """Base of both kinds of block: two residual branches that drop path may skip, by masks passed to `forward`.

    Attributes:
        left_out: Share of the images in a batch for which a branch is not computed. If 0, timm's own drop path applies,
            which computes every branch and multiplies skipped ones by 0.
    """

    drop_path1: Any
    drop_path2: Any
    left_out: float = 0.0

    def drop_path_masks(self, tokens: Tensor) -> DropPathMasks:
        """Draw the drop path masks of the two branches.

        Drawing is separate from `forward`, so that a compiled or recomputed block draws nothing.

        Returns:
            For each branch, a factor per image ([B, 1, 1]), or the indices of the images that keep the branch ([n],
            int64). None if no image skips it.
        """
        if self.left_out and self.training:
            count = max(1, math.ceil((1 - self.left_out) * len(tokens)))  # not random, so that shapes stay fixed
            first, second = (torch.randperm(len(tokens), device=tokens.device)[:count] for _ in range(2))
            return first, second
        return _draw_factors(self.drop_path1, tokens), _draw_factors(self.drop_path2, tokens)


class PlainBlock(BranchBlock, Block):
    """timm's own block with two more inputs: drop path masks, and the number of first tokens to compute."""

    attn: Attention

    @staticmethod
    def instead_of(block: nn.Module) -> nn.Module:
        """Turn timm's own block into this class, in place and with its weights; return any other block unchanged."""
        if type(block) is Block and type(block.attn) is Attention:
            block.__class__ = PlainBlock
        return block

    def forward(  # type: ignore[override]  # timm's second argument is a mask, which has no use here
        self, tokens: Tensor, masks: DropPathMasks = ALL, asking: int | None = None
    ) -> Tensor:
        """Return the tokens after the block.

        Args:
            tokens: [B, T, D]
            masks: Drop path masks, from `drop_path_masks`.
            asking: Number of first tokens to compute. If None, all. Keys and values are computed for all tokens, but
                queries, projection and MLP only for the first, with the same result.

        Returns:
            [B, asking, D]
        """
        tokens = _add_branch(tokens, lambda x: self.ls1(_attend(self.attn, self.norm1(x), asking)), masks[0], asking)
        return _add_branch(tokens, lambda x: self.ls2(self.mlp(self.norm2(x))), masks[1])


class RotaryBlock(BranchBlock, EvaBlock):
    """Block of timm's Eva with the same two inputs, and rotary positions."""

    attn: Any  # EvaAttention

    @staticmethod
    def reads(block: Any) -> bool:
        """Return True if this class supports the block."""
        attn: Any = block.attn if type(block) is EvaBlock else None
        return type(attn) is EvaAttention and attn.qkv is not None and bool(attn.rotate_half)

    @staticmethod
    def instead_of(block: nn.Module) -> None:
        """Turn a block that `reads` accepts into this class, in place and with its weights."""
        block.__class__ = RotaryBlock

    def forward(  # type: ignore[override]  # timm's other arguments are masks, which have no use here
        self, tokens: Tensor, masks: DropPathMasks = ALL, asking: int | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """Return the tokens after the block, like `PlainBlock.forward`.

        Args:
            tokens: [B, T, D]
            masks: Drop path masks, from `drop_path_masks`.
            asking: Number of first tokens to compute. If None, all.
            rotation: Cosines and sines that rotate queries and keys. If None, no rotation. [2, T, d/2]

        Returns:
            [B, asking, D]
        """

        def attend(x: Tensor) -> Tensor:
            return _scale(self.gamma_1, _attend(self.attn, self.norm1(x), asking, rotation))

        tokens = _add_branch(tokens, attend, masks[0], asking)
        return _add_branch(tokens, lambda x: _scale(self.gamma_2, self.mlp(self.norm2(x))), masks[1])


def _scale(scale: Tensor | None, values: Tensor) -> Tensor:
    return values if scale is None else scale * values


def _draw_factors(path: nn.Module, tokens: Tensor) -> Tensor | None:
    """Draw the factor of a branch per image, as timm does: 0, or 1 / (1 - drop probability). [B, 1, 1]"""
    probability = float(getattr(path, "drop_prob", 0.0) or 0.0)
    if not path.training or not probability:
        return None
    keep = 1 - probability
    return tokens.new_empty(len(tokens), 1, 1).bernoulli_(keep).div_(keep)


def _add_branch(tokens: Tensor, branch: Branch, mask: Tensor | None, asking: int | None = None) -> Tensor:
    """Add a branch's output, computed from all tokens, to the first tokens. [B, T, D] -> [B, asking, D]"""
    first = tokens[:, :asking]
    if mask is None:
        return first + branch(tokens)
    if mask.is_floating_point():
        return first + branch(tokens) * mask
    # Branches that are kept are scaled up, so that the expected value is that without drop path.
    return first.index_add(0, mask, branch(tokens[mask]).to(first.dtype), alpha=len(tokens) / len(mask))


def _attend(
    attn: Attention | EvaAttention, tokens: Tensor, asking: int | None, rotation: Tensor | None = None
) -> Tensor:
    """Compute the output of attention for the first tokens, over all tokens. [B, T, D] -> [B, asking, D]"""
    q, k, v = _project_qkv(attn, tokens, asking)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rotation is not None:
        q, k = turned(q, rotation[:, :asking]), turned(k, rotation)
    drop = attn.attn_drop.p if attn.training else 0.0
    if _is_faster_unfused(q, k):
        weights = (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)  # [B, heads, asking, T]
        mixed = F.dropout(weights, drop) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))  # [B, asking, heads*d]
    gate = getattr(attn, "gate", None)  # in newer versions of timm
    if gate is not None:
        mixed = mixed * gate(tokens[:, :asking]).sigmoid()
    return attn.proj_drop(attn.proj(mixed))


def attention_of(
    attn: Attention | EvaAttention, tokens: Tensor, queries: slice, rotation: Tensor | None = None
) -> Tensor:
    """Compute the attention weights of some tokens over all. [B, T, D] -> [B, heads, queries, T]"""
    q, k, _ = _project_qkv(attn, tokens, None)
    q, k = attn.q_norm(q[:, :, queries]), attn.k_norm(k)
    if rotation is not None:
        q, k = turned(q, rotation[:, queries]), turned(k, rotation)
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)


def projected(attn: Attention | EvaAttention, tokens: Tensor, which: Projection) -> Tensor:
    """Compute queries, keys or values, with all heads concatenated, before any rotation. [B, T, D] -> [B, T, D]"""
    width, i = attn.num_heads * attn.head_dim, ("query", "key", "value").index(which)
    rows, bias = slice(i * width, (i + 1) * width), _join_biases(attn)
    return F.linear(tokens, attn.qkv.weight[rows], None if bias is None else bias[rows])


def _project_qkv(attn: Attention | EvaAttention, tokens: Tensor, asking: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to queries [B, heads, asking, d], keys and values [B, heads, T, d]."""
    weight, bias = attn.qkv.weight, _join_biases(attn)
    if asking is None:
        q, k, v = _split_heads(attn, F.linear(tokens, weight, bias), 3)
        return q, k, v
    width = attn.num_heads * attn.head_dim
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    (q,) = _split_heads(attn, F.linear(tokens[:, :asking], weight[:width], q_bias), 1)
    k, v = _split_heads(attn, F.linear(tokens, weight[width:], kv_bias), 2)
    return q, k, v


def _join_biases(attn: Any) -> Tensor | None:
    """Return the biases of queries, keys and values, concatenated; Eva stores them separately, with 0 for keys."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _split_heads(attn: Attention | EvaAttention, values: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split joint projections into heads. [B, T, count*heads*d] -> count times [B, heads, T, d]"""
    return values.unflatten(-1, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


# Forward and backward pass, unfused and fused: 50 and 82 ms for 197 tokens, 430 and 290 ms for 785.
_MAX_UNFUSED_TOKENS = 400


def _is_faster_unfused(q: Tensor, k: Tensor) -> bool:
    """Return True if attention in separate operations is faster than torch's fused kernel.

    That is so in training on a CPU in bfloat16, where the backward pass of the fused kernel takes two to five times as
    long. With many tokens the fused kernel is faster, because it does not store the attention weights.
    """
    bfloat16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return bfloat16_on_cpu and torch.is_grad_enabled() and k.shape[-2] <= _MAX_UNFUSED_TOKENS

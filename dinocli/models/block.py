"""Blocks of timm's vision transformers, with drop path drawn outside and an option to compute only the first tokens.

A block also takes a packed sequence, the tokens of images of several sizes one after another. Norms and linear layers
then run once for all sizes; only attention runs once per size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention  # type: ignore[attr-defined]
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from dinocli.models.rotary import turned

DropPathMasks = tuple[Tensor | None, Tensor | None]
ALL: DropPathMasks = (None, None)
Branch = Callable[[Tensor], Tensor]
Layout = tuple[tuple[int, int], ...]  # number of images and tokens per image, for each size in a packed sequence
Asking = int | tuple[int | None, ...] | None  # first tokens to compute; for a packed sequence, those of each size
Rotation = Tensor | tuple[Tensor, ...] | None  # for a packed sequence, that of each size
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

    @property
    def drops(self) -> tuple[float, float]:
        """Probabilities at which the two branches are skipped at present."""
        first, second = (float(getattr(path, "drop_prob", 0.0) or 0.0) for path in (self.drop_path1, self.drop_path2))
        return (first, second) if self.training else (0.0, 0.0)


class DropPathDraws:
    """Draws of the drop path masks of all blocks at once, in few launches.

    They are separate from the blocks, so that a compiled or recomputed block draws nothing.
    """

    def __init__(self) -> None:
        self._cache: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}

    def __call__(
        self, blocks: Sequence[nn.Module], tokens: Tensor, layout: Layout = (), last: Layout = ()
    ) -> list[DropPathMasks]:
        """Draw the masks of a step.

        Args:
            blocks: Blocks in order. Those of other kinds draw their own.
            tokens: Input of the first block. [B, T, D], or packed [S, D]
            layout: Sizes of a packed sequence, in which no branch is skipped for a subset of images.
            last: Sizes of the packed output of the last block.

        Returns:
            For each block, those of its two branches: a factor per image ([B, 1, 1]) or row ([S, 1]), or the indices of
            the images that keep the branch ([n], int64). None if no image skips any branch.
        """
        branches = [block for block in blocks if isinstance(block, BranchBlock)]
        drawn: Sequence[Tensor]
        share = branches[0].left_out if branches and branches[0].training else 0.0
        keep = tuple(1 - probability for block in branches for probability in block.drops)
        if share:
            count = max(1, math.ceil((1 - share) * len(tokens)))  # not random, so that shapes stay fixed
            drawn = torch.rand(len(keep), len(tokens), device=tokens.device).argsort(-1)[:, :count].unbind()
        elif min(keep, default=1.0) < 1:
            factors = self._draw_factors(keep, layout, tokens)
            parts = (_repeat_for_rows(factors[:-2], layout), _repeat_for_rows(factors[-2:], last))
            drawn = [row for part in parts for row in part.unbind()]
        else:
            return [ALL] * len(blocks)
        rows = iter(drawn)
        return [(next(rows), next(rows)) if isinstance(block, BranchBlock) else ALL for block in blocks]

    def _draw_factors(self, keep: tuple[float, ...], layout: Layout, like: Tensor) -> Tensor:
        """Draw a factor per branch and image, as timm does: 0, or 1 / probability of keeping the branch. [n, B]

        A branch that is always kept has the factor 1, so that all blocks compile to the same code.
        """
        key = (keep, like.dtype, like.device)
        if key not in self._cache:  # a copy from the host, for which the device is waited for
            self._cache[key] = torch.tensor(keep, dtype=like.dtype, device=like.device)[:, None]
        images = sum(count for count, _ in layout) if layout else len(like)
        return torch.bernoulli(self._cache[key].expand(-1, images)).div_(self._cache[key])


def _repeat_for_rows(factors: Tensor, layout: Layout) -> Tensor:
    """Shape factors [n, B] for tokens: [n, B, 1, 1], or for a packed sequence [n, S, 1]."""
    if not layout:
        return factors[..., None, None]
    parts = factors.split([count for count, _ in layout], 1)
    rows = [part[..., None].expand(-1, -1, tokens) for part, (_, tokens) in zip(parts, layout, strict=True)]
    return torch.cat([part.flatten(1) for part in rows], 1)[..., None]


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
        self,
        tokens: Tensor,
        masks: DropPathMasks = ALL,
        asking: Asking = None,
        rotation: Rotation = None,
        layout: Layout = (),
    ) -> Tensor:
        """Return the tokens after the block.

        Args:
            tokens: [B, T, D], or packed [S, D]
            masks: Drop path masks, from `DropPathDraws`. Those of a packed sequence are factors of the rows to compute.
            asking: Number of first tokens to compute. If None, all. Keys and values are computed for all tokens, but
                queries, projection and MLP only for the first, with the same result.
            rotation: Rotation of queries and keys, which these blocks do not have.
            layout: Sizes of a packed sequence.

        Returns:
            [B, asking, D], or packed.
        """

        def attend(x: Tensor) -> Tensor:
            return self.ls1(_attend(self.attn, self.norm1(x), asking, None, layout))

        tokens = _add_branch(tokens, attend, masks[0], asking, layout)
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
        self,
        tokens: Tensor,
        masks: DropPathMasks = ALL,
        asking: Asking = None,
        rotation: Rotation = None,
        layout: Layout = (),
    ) -> Tensor:
        """Return the tokens after the block, like `PlainBlock.forward`.

        Args:
            tokens: [B, T, D], or packed [S, D]
            masks: Drop path masks, from `DropPathDraws`.
            asking: Number of first tokens to compute. If None, all.
            rotation: Cosines and sines that rotate queries and keys. If None, no rotation. [2, T, d/2]
            layout: Sizes of a packed sequence.

        Returns:
            [B, asking, D], or packed.
        """

        def attend(x: Tensor) -> Tensor:
            return _scale(self.gamma_1, _attend(self.attn, self.norm1(x), asking, rotation, layout))

        tokens = _add_branch(tokens, attend, masks[0], asking, layout)
        return _add_branch(tokens, lambda x: _scale(self.gamma_2, self.mlp(self.norm2(x))), masks[1])


def _scale(scale: Tensor | None, values: Tensor) -> Tensor:
    return values if scale is None else scale * values


def _add_branch(
    tokens: Tensor, branch: Branch, mask: Tensor | None, asking: Asking = None, layout: Layout = ()
) -> Tensor:
    """Add a branch's output, computed from all tokens, to the first tokens. [B, T, D] -> [B, asking, D], or packed"""
    first = first_tokens(tokens, asking, layout)
    if mask is None:
        return first + branch(tokens)
    if mask.is_floating_point():
        return first + branch(tokens) * mask
    # Branches that are kept are scaled up, so that the expected value is that without drop path. `index_select` and not
    # `tokens[mask]`, whose gradient sorts the indices first.
    output = branch(tokens.index_select(0, mask)).to(first.dtype)
    return first.index_add(0, mask, output, alpha=len(tokens) / len(mask))


def first_tokens(tokens: Tensor, asking: Asking, layout: Layout = ()) -> Tensor:
    """Return the first tokens of each image. [B, T, D] -> [B, asking, D], or packed [S, D] -> [S', D]"""
    if not isinstance(asking, tuple):
        return tokens[:, :asking] if asking else tokens
    parts = zip(_unpacked(tokens, layout), asking, strict=True)
    return torch.cat([part[:, :count].flatten(0, 1) for part, count in parts])


def _unpacked(tokens: Tensor, layout: Layout) -> list[Tensor]:
    """Split a packed sequence into the tokens of each size. [S, D] -> [B, T, D] each"""
    parts = tokens.split([images * count for images, count in layout])
    return [part.unflatten(0, size) for part, size in zip(parts, layout, strict=True)]


def asked_layout(asking: Asking, layout: Layout) -> Layout:
    """Return the sizes of the packed sequence of the first tokens."""
    if not isinstance(asking, tuple):
        return layout
    return tuple((images, count or tokens) for (images, tokens), count in zip(layout, asking, strict=True))


def _attend(
    attn: Attention | EvaAttention, tokens: Tensor, asking: Asking, rotation: Rotation = None, layout: Layout = ()
) -> Tensor:
    """Compute the output of attention for the first tokens, over all tokens. [B, T, D] -> [B, asking, D], or packed"""
    first = first_tokens(tokens, asking, layout)
    if not layout:
        mixed = _mix(attn, _project_qkv(attn, tokens, first, asking), rotation)
    else:
        rotations = rotation if isinstance(rotation, tuple) else (None,) * len(layout)
        sizes = _project_packed(attn, tokens, first, asking, layout)
        outputs = [_mix(attn, qkv, turn) for qkv, turn in zip(sizes, rotations, strict=True)]
        mixed = torch.cat([output.flatten(0, 1) for output in outputs])
    mixed = attn.norm(mixed)  # [B, asking, heads*d]
    gate = getattr(attn, "gate", None)  # in newer versions of timm
    if gate is not None:
        mixed = mixed * gate(first).sigmoid()
    return attn.proj_drop(attn.proj(mixed))


def _mix(attn: Attention | EvaAttention, qkv: tuple[Tensor, Tensor, Tensor], rotation: Rotation) -> Tensor:
    """Compute the weighted sums of values of all heads. [B, heads, asking, d] and [B, heads, T, d] -> [B, asking, w]"""
    q, k, v = qkv
    q, k = attn.q_norm(q), attn.k_norm(k)
    if isinstance(rotation, Tensor):
        q, k = turned(q, rotation[:, : q.shape[-2]]), turned(k, rotation)
    drop = attn.attn_drop.p if attn.training else 0.0
    if _is_faster_unfused(q, k):
        weights = (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)  # [B, heads, asking, T]
        mixed = F.dropout(weights, drop) @ v
    else:
        order = getattr(attn, "kernels", {}).get(k.shape[-2])  # of `choose_kernels`; the others follow, for other types
        with sdpa_kernel(order, set_priority=True) if order else nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
    return mixed.transpose(1, 2).flatten(2)


def attention_of(
    attn: Attention | EvaAttention, tokens: Tensor, queries: slice, rotation: Tensor | None = None
) -> Tensor:
    """Compute the attention weights of some tokens over all. [B, T, D] -> [B, heads, queries, T]"""
    q, k, _ = _project_qkv(attn, tokens, tokens)
    q, k = attn.q_norm(q[:, :, queries]), attn.k_norm(k)
    if rotation is not None:
        q, k = turned(q, rotation[:, queries]), turned(k, rotation)
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)


def projected(attn: Attention | EvaAttention, tokens: Tensor, which: Projection) -> Tensor:
    """Compute queries, keys or values, with all heads concatenated, before any rotation. [B, T, D] -> [B, T, D]"""
    width, i = attn.num_heads * attn.head_dim, ("query", "key", "value").index(which)
    rows, bias = slice(i * width, (i + 1) * width), _join_biases(attn)
    return F.linear(tokens, attn.qkv.weight[rows], None if bias is None else bias[rows])


def _project_qkv(
    attn: Attention | EvaAttention, tokens: Tensor, first: Tensor, asking: Asking = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Project first tokens to queries [B, heads, asking, d], all tokens to keys and values [B, heads, T, d]."""
    if asking is None:
        q, k, v = _split_heads(attn, F.linear(tokens, attn.qkv.weight, _join_biases(attn)), 3)
    else:
        asked, others = _project_apart(attn, tokens, first)
        (q,), (k, v) = _split_heads(attn, asked, 1), _split_heads(attn, others, 2)
    return q, k, v


def _project_packed(
    attn: Attention | EvaAttention, tokens: Tensor, first: Tensor, asking: Asking, layout: Layout
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Project a packed sequence to the queries, keys and values of each size, like `_project_qkv`."""
    if asking is None:
        joint = _unpacked(F.linear(tokens, attn.qkv.weight, _join_biases(attn)), layout)
        return [_split_heads(attn, part, 3) for part in joint]  # type: ignore[misc]
    asked, others = _project_apart(attn, tokens, first)
    queries = (_split_heads(attn, part, 1) for part in _unpacked(asked, asked_layout(asking, layout)))
    pairs = (_split_heads(attn, part, 2) for part in _unpacked(others, layout))
    return [(q, k, v) for (q,), (k, v) in zip(queries, pairs, strict=True)]


def _project_apart(attn: Attention | EvaAttention, tokens: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Project first tokens to queries [..., w], and all tokens to keys and values [..., 2*w]."""
    weight, bias = attn.qkv.weight, _join_biases(attn)
    width = attn.num_heads * attn.head_dim
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    return F.linear(first, weight[:width], q_bias), F.linear(tokens, weight[width:], kv_bias)


def _join_biases(attn: Any) -> Tensor | None:
    """Return the biases of queries, keys and values, concatenated; Eva stores them separately, with 0 for keys."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _split_heads(attn: Attention | EvaAttention, values: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split joint projections into heads. [B, T, count*heads*d] -> count times [B, heads, T, d]"""
    return values.unflatten(-1, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


# Forward and backward pass, unfused and fused: 50 and 82 ms for 197 tokens, 430 and 290 ms for 785. Forward pass alone:
# 1.7 and 2.4 ms for 37 tokens, the same for 64.
_MAX_UNFUSED_TOKENS, _MAX_UNFUSED_FORWARD = 400, 50


def _is_faster_unfused(q: Tensor, k: Tensor) -> bool:
    """Return True if attention in separate operations is faster than torch's fused kernel.

    That is so on a CPU in bfloat16: in training, where the backward pass of the fused kernel takes two to five times as
    long, and for short sequences. With many tokens the fused kernel is faster, because it does not store the attention
    weights.
    """
    bfloat16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return bfloat16_on_cpu and k.shape[-2] <= (_MAX_UNFUSED_TOKENS if torch.is_grad_enabled() else _MAX_UNFUSED_FORWARD)

"""A block of a timm vision transformer: for all tokens, or for the first ones alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Attention  # type: ignore[attr-defined]
from timm.models.vision_transformer import Block
from torch import Tensor, nn

Shares = tuple[Tensor | None, Tensor | None]
ALL: Shares = (None, None)
Branch = Callable[[Tensor], Tensor]


class PlainBlock(Block):
    """timm's own block, with two doors more: drop path's draws come in, and the first tokens may go on alone.

    Attributes:
        left_out: Share of the images of a batch whose branches are left out, and cost nothing; timm's own drop path
            works them out, and multiplies with 0.
    """

    attn: Attention
    left_out: float = 0.0

    @staticmethod
    def instead_of(block: nn.Module) -> nn.Module:
        """A block as one of these, its weights as they are; one that is not timm's own stays what it is."""
        if type(block) is Block and type(block.attn) is Attention:
            block.__class__ = PlainBlock
        return block

    def shares(self, tokens: Tensor) -> Shares:
        """Drop path's draws for the two branches.

        They are drawn apart, so that a block which torch compiles, or does again for its gradient, draws nothing.

        Returns:
            For each branch what each image's is multiplied by ([B, 1, 1]), or the numbers of the images that have one
            ([n], int64); absent, none is dropped.
        """
        if self.left_out and self.training:
            count = max(1, math.ceil((1 - self.left_out) * len(tokens)))  # always as many, so that shapes stay fixed
            first, second = (torch.randperm(len(tokens), device=tokens.device)[:count] for _ in range(2))
            return first, second
        return _share(self.drop_path1, tokens), _share(self.drop_path2, tokens)

    def forward(  # type: ignore[override]  # timm's second is a mask, which nobody here has
        self, tokens: Tensor, shares: Shares = ALL, asking: int | None = None
    ) -> Tensor:
        """The tokens after the block.

        Args:
            tokens: [B, T, D]
            shares: Of each image's branches.
            asking: How many of the first tokens are wanted; all where absent. Queries, projection and MLP are worked
                out for these alone, keys and values for all, and the result is the same.

        Returns:
            [B, asking, D]
        """
        tokens = _added(tokens, lambda x: self.ls1(_attend(self.attn, self.norm1(x), asking)), shares[0], asking)
        return _added(tokens, lambda x: self.ls2(self.mlp(self.norm2(x))), shares[1])


def _share(path: nn.Module, tokens: Tensor) -> Tensor | None:
    probability = float(getattr(path, "drop_prob", 0.0) or 0.0)
    if not path.training or not probability:
        return None
    keep = 1 - probability
    return tokens.new_empty(len(tokens), 1, 1).bernoulli_(keep).div_(keep)


def _added(tokens: Tensor, branch: Branch, share: Tensor | None, asking: int | None = None) -> Tensor:
    """The first tokens with what a branch makes of all. [B, T, D] -> [B, asking, D]"""
    stay = tokens[:, :asking]
    if share is None:
        return stay + branch(tokens)
    if share.is_floating_point():
        return stay + branch(tokens) * share
    # What some images get more makes up for what the others do without.
    return stay.index_add(0, share, branch(tokens[share]).to(stay.dtype), alpha=len(tokens) / len(share))


def _attend(attn: Attention, tokens: Tensor, asking: int | None) -> Tensor:
    """Attention of the first tokens to all. [B, T, D] -> [B, asking, D]"""
    q, k, v = _queries_keys_values(attn, tokens, asking)
    q, k = attn.q_norm(q), attn.k_norm(k)
    drop = attn.attn_drop.p if attn.training else 0.0
    if _in_steps(q, k):
        weights = (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)  # [B, heads, asking, T]
        mixed = F.dropout(weights, drop) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))  # [B, asking, heads*d]
    gate = getattr(attn, "gate", None)  # of newer versions of timm
    if gate is not None:
        mixed = mixed * gate(tokens[:, :asking]).sigmoid()
    return attn.proj_drop(attn.proj(mixed))


def _queries_keys_values(attn: Attention, tokens: Tensor, asking: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, asking, d] and twice [B, heads, T, d]"""
    if asking is None:
        q, k, v = _by_head(attn, attn.qkv(tokens), 3)
        return q, k, v
    width = attn.attn_dim
    bias = attn.qkv.bias
    of_q, of_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    (q,) = _by_head(attn, F.linear(tokens[:, :asking], attn.qkv.weight[:width], of_q), 1)
    k, v = _by_head(attn, F.linear(tokens, attn.qkv.weight[width:], of_kv), 2)
    return q, k, v


def _by_head(attn: Attention, values: Tensor, count: int) -> tuple[Tensor, ...]:
    """[B, T, count*heads*d] -> count times [B, heads, T, d]"""
    return values.unflatten(-1, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


_SHORT = 400  # tokens; 197 took 50 and 82 ms in steps and whole, forward and backward, and 785 took 430 and 290


def _in_steps(q: Tensor, k: Tensor) -> bool:
    """Whether the three steps of attention one by one beat torch's own whole.

    They do on a CPU in bfloat16, where the gradient of the whole takes two to five times as long, unless there are so
    many tokens that to write down what each draws on each takes longer still.
    """
    coarse = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return coarse and torch.is_grad_enabled() and k.shape[-2] <= _SHORT

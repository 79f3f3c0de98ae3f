"""Transformers of timm as backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed  # type: ignore[attr-defined]
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinocli.core.errors import DinoError
from dinocli.models.backbone import Backbone, Facet, MaskedPatches, Tokens
from dinocli.models.block import BranchBlock, PlainBlock, Projection, RotaryBlock, attention_of, projected
from dinocli.models.positions import Positions, Resampler
from dinocli.models.rotary import Rotary


class Transformer(Backbone):
    """timm transformer with a class token and a row of blocks, for images of any size, square or not.

    Subclasses differ in their positions.
    """

    def __init__(self, model: VisionTransformer | Eva) -> None:
        super().__init__()
        self.model = model
        self.width = model.embed_dim
        self.patch_size = model.patch_embed.patch_size[0]
        self._recompute = False

    def grid(self, size: int) -> tuple[int, int] | None:
        return size // self.patch_size, size // self.patch_size

    def recompute_blocks(self) -> None:
        self._recompute = True

    def leave_out(self, share: float) -> None:
        if not all(isinstance(block, BranchBlock) for block in self.blocks):
            super().leave_out(share)
        for block in self.blocks:
            block.left_out = share  # type: ignore[assignment]

    def level(self, parameter: str) -> int:
        if parameter.startswith("blocks."):
            return 1 + int(parameter.split(".")[1])
        return len(self.blocks) + 1 if parameter.startswith("norm.") else 0

    def _place(self, tokens: Tensor, grid: tuple[int, int], *, square: bool) -> tuple[Tensor, Tensor | None]:
        """Return tokens with learned positions added, and the rotation of queries and keys, if any.

        Args:
            tokens: [B, 1+R+N, D]
            grid: Rows and columns of the patches.
            square: True if the images are square.

        Returns:
            [B, 1+R+N, D] and [2, 1+R+N, d/2]
        """
        raise NotImplementedError

    def _embed(
        self, images: Tensor, masked: MaskedPatches | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Return the tokens for the first block, the rotation of queries and keys, and rows and columns."""
        if min(images.shape[-2:]) < self.patch_size:
            raise DinoError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels are smaller than one patch "
                f"of {self.patch_size} pixels",
                "use larger views (--set views.local.size=...) or a smaller patch",
            )
        patches = self.model.patch_embed.proj(images)  # [B, D, h, w]; drops pixels beyond a multiple of the patch size
        grid = (patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        # Before positions are added: a masked patch keeps its position.
        if masked is not None:
            patches = torch.where(masked.where[..., None], masked.token.to(patches.dtype), patches)
        # shape[0] and not len(): an exported graph keeps the number of images free.
        prefix = [
            t.expand(images.shape[0], -1, -1) for t in (self.model.cls_token, self.model.reg_token) if t is not None
        ]
        tokens = torch.cat([*prefix, patches], dim=1)  # [B, 1+R+N, D]
        tokens, rotation = self._place(tokens, grid, square=images.shape[-2] == images.shape[-1])
        return self.model.norm_pre(tokens), rotation, grid

    def last_tokens(self, images: Tensor, last: int, masked: MaskedPatches | None = None) -> list[Tokens]:
        tokens, rotation, grid = self._embed(images, masked)
        return [self._split(self.model.norm(made), grid) for made in self._last(tokens, rotation, last)]

    def class_tokens(self, images: Tensor, last: int = 1, masked: MaskedPatches | None = None) -> list[Tensor]:
        tokens, rotation, _ = self._embed(images, masked)
        return [self.model.norm(made[:, 0]) for made in self._last(tokens, rotation, last, asking=1)]

    def _last(self, tokens: Tensor, rotation: Tensor | None, last: int, asking: int | None = None) -> list[Tensor]:
        """Return the outputs of the `last` blocks; the final one computes only `asking` tokens if it can. [B, T, D]"""
        first = len(self.blocks) - last
        if first < 0:
            raise DinoError(
                f"--blocks {last} is larger than the {len(self.blocks)} blocks of this backbone",
                f"--blocks {len(self.blocks)}",
            )
        outputs = []
        for i, block in enumerate(self.blocks):
            tokens = self._run(block, tokens, rotation, asking if i == len(self.blocks) - 1 else None)
            if i >= first:
                outputs.append(tokens)
        return outputs

    def _run(self, block: nn.Module, tokens: Tensor, rotation: Tensor | None, asking: int | None = None) -> Tensor:
        """Run a block, with activation checkpointing if that is on."""
        # Random draws happen here: a compiled or recomputed block must not draw anything itself.
        more: tuple[Any, ...] = (block.drop_path_masks(tokens), asking) if isinstance(block, BranchBlock) else ()
        if rotation is not None:
            more = (*more, rotation)
        if self._recompute and torch.is_grad_enabled():
            made: Tensor = checkpoint(block, tokens, *more, use_reentrant=False)
            return made
        return block(tokens, *more)

    def _split(self, tokens: Tensor, grid: tuple[int, int]) -> Tokens:
        prefix = self.model.num_prefix_tokens
        return Tokens(cls=tokens[:, 0], registers=tokens[:, 1:prefix], patches=tokens[:, prefix:], grid=grid)

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        depth = len(self.blocks)
        if wrong := [layer for layer in layers if not 1 <= abs(layer) <= depth]:
            raise DinoError(f"--layer {wrong[0]} is no block; expected 1 to {depth}, or -1 to -{depth}", "--layer -1")
        wanted = [layer - 1 if layer > 0 else depth + layer for layer in layers]
        tokens, rotation, grid = self._embed(images)
        made: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            before, last = tokens, i == max(wanted)
            if not last or facet == "token":
                tokens = self._run(block, tokens, rotation)
            if i in wanted:
                made[i] = self.model.norm(tokens) if facet == "token" else _project(block, before, facet)
        joined = torch.cat([made[i] for i in wanted], dim=-1)
        return joined[:, self.model.num_prefix_tokens :].unflatten(1, grid)

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        tokens, rotation, _ = self._embed(images)
        for block in self.blocks[:-1]:
            tokens = self._run(block, tokens, rotation)
        last: Any = self.blocks[-1]
        return attention_of(last.attn, last.norm1(tokens), queries, rotation)


def _project(block: Any, tokens: Tensor, which: Projection) -> Tensor:
    return projected(block.attn, block.norm1(tokens), which)


class ViTBackbone(Transformer):
    """timm VisionTransformer, whose positions are learned and added to the tokens."""

    def __init__(self, model: VisionTransformer, positions: Positions) -> None:
        super().__init__(model)
        self.positions = positions
        # A model with registers has positions for the patches only.
        self._resample = Resampler(positions, 0 if model.no_embed_class else model.num_prefix_tokens)
        for block in model.blocks:
            PlainBlock.instead_of(block)

    @property
    def native_size(self) -> int:
        """Side of the square images whose positions need no interpolation, in pixels."""
        return int(self.model.patch_embed.img_size[0])

    @property
    def shape(self) -> dict[str, int]:
        """Sizes that distinguish plain vision transformers, under the names of both timm and the original."""
        blocks = self.model.blocks
        sizes = {"patch_size": self.patch_size, "embed_dim": self.width, "depth": len(blocks)}
        channels = int(self.model.patch_embed.proj.in_channels)
        return sizes | {"num_heads": int(blocks[0].attn.num_heads)} | ({"in_chans": channels} if channels != 3 else {})

    def _place(self, tokens: Tensor, grid: tuple[int, int], *, square: bool) -> tuple[Tensor, Tensor | None]:
        if self.model.pos_embed is None:
            return tokens, None
        placed = self._resample(self.model.pos_embed, grid, square=square)
        unplaced = tokens.shape[1] - placed.shape[1]
        if not unplaced:
            return tokens + placed, None
        return torch.cat([tokens[:, :unplaced], tokens[:, unplaced:] + placed], 1), None


class RotaryBackbone(Transformer):
    """timm Eva as in DINOv3: no learned positions; each block rotates queries and keys by their patch's position."""

    def __init__(self, model: Eva) -> None:
        super().__init__(model)
        self._rotary = Rotary(model.num_prefix_tokens)
        self._rescale = 1.0
        for block in model.blocks:
            RotaryBlock.instead_of(block)

    @staticmethod
    def reads(model: Any) -> bool:
        """Return True if this class supports the model."""
        return (
            type(model) is Eva
            and type(model.patch_embed) is PatchEmbed
            and model.cls_token is not None
            and model.pos_embed is None
            and model.patch_drop is None
            and Rotary.reads(model.rope)
            and all(RotaryBlock.reads(block) for block in model.blocks)
        )

    def rescale_positions(self, most: float) -> None:
        self._rescale = most

    def start_evenly(self) -> None:
        """Initialize the last layer of each branch like all others; timm scales it down with the block's depth.

        Source: facebookresearch/dinov2@b8931f7 dinov2/models/vision_transformer.py, init_weights_vit_timm.
        """
        for block in self.model.blocks:
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                nn.init.trunc_normal_(weight, std=0.02)

    def _place(self, tokens: Tensor, grid: tuple[int, int], *, square: bool) -> tuple[Tensor, Tensor | None]:
        return tokens, self._rotary(self.model.rope.periods, grid, self._rescale if self.training else 1.0)

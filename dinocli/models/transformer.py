"""Transformers of timm as backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed  # type: ignore[attr-defined]
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinocli.core.errors import DinoError
from dinocli.models.backbone import Backbone, Facet, MaskedPatches, Tokens
from dinocli.models.block import (
    ALL,
    BranchBlock,
    DropPathDraws,
    DropPathMasks,
    PlainBlock,
    Projection,
    RotaryBlock,
    asked_layout,
    attention_of,
    projected,
)
from dinocli.models.casting import call_with_cast_weights
from dinocli.models.positions import Positions, Resampler
from dinocli.models.rotary import Rotary
from dinocli.models.stem import ConvStem


class Transformer(Backbone):
    """timm transformer with a class token and a sequence of blocks, for images of any size, square or not.

    Subclasses differ in how they encode positions.
    """

    def __init__(self, model: VisionTransformer | Eva) -> None:
        super().__init__()
        self.model = model
        self.width = model.embed_dim
        self.patch_size = model.patch_embed.patch_size[0]
        self._steps = 1  # patches per patch side: more than one if patches overlap
        self._recompute = False
        self._draw_masks = DropPathDraws()

    def grid(self, size: int) -> tuple[int, int] | None:
        return size // self.patch_size, size // self.patch_size

    @property
    def stride(self) -> int:
        return self.patch_size // self._steps

    def use_stride(self, stride: int) -> None:
        proj, side = self.model.patch_embed.proj, self.patch_size
        if isinstance(proj, ConvStem):
            possible = [side, side // 2]
        else:
            possible = [divisor for divisor in range(side, 0, -1) if side % divisor == 0]
        if stride not in possible:
            listed = " or ".join([", ".join(map(str, possible[:-1])), str(possible[-1])])
            why = "whose convolutional stem embeds half patches" * isinstance(proj, ConvStem)
            raise DinoError(
                f"--stride {stride} does not fit the patches of {side} pixels of this network"
                f"{', ' * bool(why)}{why}; expected {listed}",
                f"--stride {min(possible, key=lambda one: abs(one - stride))}",
            )
        self._steps = side // stride
        if isinstance(proj, ConvStem):
            proj.use_steps(self._steps)
        else:
            proj.stride = (stride, stride)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().map_size(height, width)
        return (rows - 1) * self._steps + 1, (columns - 1) * self._steps + 1

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

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int], *, square: bool) -> tuple[Tensor, Tensor | None]:
        """Return the tokens with any learned positions added, and the rotation of queries and keys, if any.

        Args:
            tokens: [B, 1+R+N, D]
            grid: Rows and columns of the patches; of whole patches if they overlap.
            square: True if the images are square.

        Returns:
            [B, 1+R+N, D] and [2, 1+R+N, d/2]
        """
        raise NotImplementedError

    def use_conv_stem(self) -> None:
        """Replace the patch embedding by a `ConvStem` with fresh weights."""
        proj = self.model.patch_embed.proj
        self.model.patch_embed.proj = ConvStem(proj.in_channels, self.patch_size, proj.out_channels)

    def _embed(
        self, images: Tensor, masked: MaskedPatches | None = None
    ) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Return the input tokens of the first block, the rotation of queries and keys, and the patch grid."""
        if min(images.shape[-2:]) < self.patch_size:
            raise DinoError(
                f"images of {images.shape[-2]}x{images.shape[-1]} pixels are smaller than one patch "
                f"of {self.patch_size} pixels",
                "use larger views (--set views.local.size=...) or a smaller patch",
            )
        grid = whole = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        square = images.shape[-2] == images.shape[-1]
        if self._steps > 1:
            grid = self.map_size(images.shape[-2], images.shape[-1])
            images = images[..., : whole[0] * self.patch_size, : whole[1] * self.patch_size]
        patches = _embed_patches(self.model.patch_embed.proj, images, grid)
        # Patches are masked before positions are added, so that a masked patch has its position.
        if masked is not None:
            patches = torch.where(masked.where[..., None], masked.token.to(patches.dtype), patches)
        # shape[0] instead of len(), which would fix the number of images in an exported graph.
        prefix = [
            t.expand(images.shape[0], -1, -1) for t in (self.model.cls_token, self.model.reg_token) if t is not None
        ]
        tokens = torch.cat([*prefix, patches], dim=1)  # [B, 1+R+N, D]
        tokens, rotation = self._add_positions(tokens, whole, square=square)
        return self.model.norm_pre(tokens), rotation, grid

    def last_tokens(self, images: Tensor, last: int, masked: MaskedPatches | None = None) -> list[Tokens]:
        tokens, rotation, grid = self._embed(images, masked)
        return [self._split(self.model.norm(output), grid) for output in self._run_blocks(tokens, rotation, last)]

    def class_tokens(self, images: Tensor, last: int = 1, masked: MaskedPatches | None = None) -> list[Tensor]:
        tokens, rotation, _ = self._embed(images, masked)
        return [self.model.norm(output[:, 0]) for output in self._run_blocks(tokens, rotation, last, asking=1)]

    def _run_blocks(
        self, tokens: Tensor, rotation: Tensor | None, last: int, asking: int | None = None
    ) -> list[Tensor]:
        """Return the outputs of the last `last` blocks; the final one computes only `asking` tokens if it supports it.

        The shape of each is [B, T, D].
        """
        first = len(self.blocks) - last
        if first < 0:
            raise DinoError(
                f"--blocks {last} is larger than the {len(self.blocks)} blocks of this backbone",
                f"--blocks {len(self.blocks)}",
            )
        outputs = []
        masks = self._draw_masks(self.blocks, tokens)
        for i, block in enumerate(self.blocks):
            of_block = asking if i == len(self.blocks) - 1 else None
            tokens = self._run_block(block, tokens, masks[i], of_block, rotation)
            if i >= first:
                outputs.append(tokens)
        return outputs

    def encode(
        self, groups: Sequence[Tensor], masked: MaskedPatches | None = None, *, with_patches: bool = False
    ) -> tuple[Tensor, Tokens | None]:
        if len(groups) == 1 or not self._can_pack:
            return super().encode(groups, masked, with_patches=with_patches)
        embedded = [self._embed(images, masked if i == 0 else None) for i, images in enumerate(groups)]
        layout = tuple((tokens.shape[0], tokens.shape[1]) for tokens, *_ in embedded)
        rotations = tuple(rotation for _, rotation, _ in embedded if rotation is not None)
        asking = (None if with_patches else 1, *[1] * (len(groups) - 1))
        last = asked_layout(asking, layout)
        packed = torch.cat([tokens.flatten(0, 1) for tokens, *_ in embedded])
        masks = self._draw_masks(self.blocks, packed, layout, last)
        for i, block in enumerate(self.blocks):
            of_block = asking if i == len(self.blocks) - 1 else None
            packed = self._run_block(block, packed, masks[i], of_block, rotations or None, layout)
        packed = self.model.norm(packed)
        if not with_patches:
            return packed, None
        count = layout[0][0] * layout[0][1]
        tokens = self._split(packed[:count].unflatten(0, layout[0]), embedded[0][2])
        return torch.cat([tokens.cls, packed[count:]]), tokens

    @property
    def _can_pack(self) -> bool:
        """True if all blocks take packed sequences. Blocks with `left_out` take one size at a time."""
        branches = all(isinstance(block, BranchBlock) for block in self.blocks)
        return branches and not any(block.training and block.left_out for block in self.blocks)

    def _run_block(self, block: nn.Module, tokens: Tensor, masks: DropPathMasks = ALL, *arguments: Any) -> Tensor:
        """Run a block, with activation checkpointing if that is on.

        The further arguments are those of blocks with two branches: asking, rotation and layout.
        """
        arguments = (masks, *arguments) if isinstance(block, BranchBlock) else ()
        if self._recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(call_with_cast_weights, block, tokens, *arguments, use_reentrant=False)
            return output
        return call_with_cast_weights(block, tokens, *arguments)

    def _split(self, tokens: Tensor, grid: tuple[int, int]) -> Tokens:
        prefix = self.model.num_prefix_tokens
        return Tokens(cls=tokens[:, 0], registers=tokens[:, 1:prefix], patches=tokens[:, prefix:], grid=grid)

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        depth = len(self.blocks)
        if wrong := [layer for layer in layers if not 1 <= abs(layer) <= depth]:
            raise DinoError(
                f"--layer {wrong[0]} is not a block; expected 1 to {depth}, or -1 to -{depth}", "--layer -1"
            )
        indices = [layer - 1 if layer > 0 else depth + layer for layer in layers]
        tokens, rotation, grid = self._embed(images)
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(indices) + 1]):
            inputs, last = tokens, i == max(indices)
            if not last or facet == "token":
                tokens = self._run_block(block, tokens, ALL, None, rotation)
            if i in indices:
                outputs[i] = self.model.norm(tokens) if facet == "token" else _project(block, inputs, facet)
        joined = torch.cat([outputs[i] for i in indices], dim=-1)
        return joined[:, self.model.num_prefix_tokens :].unflatten(1, grid)

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        tokens, rotation, _ = self._embed(images)
        for block in self.blocks[:-1]:
            tokens = self._run_block(block, tokens, ALL, None, rotation)
        last: Any = self.blocks[-1]
        return attention_of(last.attn, last.norm1(tokens), queries, rotation)


def _embed_patches(proj: nn.Conv2d | ConvStem, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Embed whole patches; pixels beyond them are dropped. [B, C, H, W] -> [B, N, D]

    In training on a CPU this is a product with the unfolded patches, of the same value: the backward pass of torch's
    convolution takes 1.2 times as long in float32, and three to five times in bfloat16.
    """
    elsewhere = images.device.type != "cpu" or not torch.is_grad_enabled()
    if elsewhere or isinstance(proj, ConvStem) or proj.stride != proj.kernel_size:
        return proj(images).flatten(2).transpose(1, 2)
    (rows, columns), side = grid, proj.kernel_size[0]
    patches = images[..., : rows * side, : columns * side].unflatten(-1, (columns, side)).unflatten(-3, (rows, side))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C*side*side]
    return F.linear(patches, proj.weight.flatten(1), proj.bias)


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
        """Sizes that define a plain vision transformer, under names that timm and the original share."""
        blocks = self.model.blocks
        sizes = {"patch_size": self.patch_size, "embed_dim": self.width, "depth": len(blocks)}
        channels = int(self.model.patch_embed.proj.in_channels)
        return sizes | {"num_heads": int(blocks[0].attn.num_heads)} | ({"in_chans": channels} if channels != 3 else {})

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int], *, square: bool) -> tuple[Tensor, Tensor | None]:
        if self.model.pos_embed is None:
            return tokens, None
        positions = self._resample(self.model.pos_embed, grid, square=square, steps=self._steps)
        without = tokens.shape[1] - positions.shape[1]  # number of leading tokens without a position
        if not without:
            return tokens + positions, None
        return torch.cat([tokens[:, :without], tokens[:, without:] + positions], 1), None


class RotaryBackbone(Transformer):
    """timm Eva as in DINOv3: no learned positions; each block rotates queries and keys by their patch's position."""

    def __init__(self, model: Eva) -> None:
        super().__init__(model)
        self._rotary = Rotary(model.num_prefix_tokens)
        self._rescale = self._jitter = 1.0
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

    def jitter_positions(self, most: float) -> None:
        self._jitter = most

    def start_evenly(self) -> None:
        """Initialize the last layer of each branch like all other layers; timm scales it down with the block's depth.

        Source: facebookresearch/dinov2@b8931f7 dinov2/models/vision_transformer.py, init_weights_vit_timm.
        """
        for block in self.model.blocks:
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                nn.init.trunc_normal_(weight, std=0.02)

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int], *, square: bool) -> tuple[Tensor, Tensor | None]:
        rescale, jitter = (self._rescale, self._jitter) if self.training else (1.0, 1.0)
        return tokens, self._rotary(self.model.rope.periods, grid, rescale, jitter, self._steps)

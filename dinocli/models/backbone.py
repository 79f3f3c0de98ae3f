"""Backbones: timm models behind a common interface, which returns their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dinocli.core.errors import DinoError

Facet = Literal["token", "query", "key", "value"]


@dataclass(frozen=True)
class Tokens:
    """Output of a backbone for B images, each token after the final norm.

    Attributes:
        cls: Class token; for a convolutional network, the average over its map. [B, D]
        registers: R register tokens, possibly none. [B, R, D]
        patches: Patch tokens, row by row. [B, N, D]
        grid: Rows and columns of the patches; their product is N.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]


class MaskedPatches(NamedTuple):
    """Masked patches of a batch.

    Attributes:
        where: True for each masked patch. [B, N], bool
        token: Token that replaces them before positions are added. [1, D]
    """

    where: Tensor
    token: Tensor


class Backbone(nn.Module):
    """timm model behind a common interface; its weights are in `model`, under timm's own keys.

    Attributes:
        model: timm model.
        width: Width D of the tokens.
        patch_size: Side of a patch in pixels; for a convolutional network, the stride of its map.
    """

    model: Any  # timm's classes are untyped
    width: int
    patch_size: int

    def grid(self, size: int) -> tuple[int, int] | None:
        """Return rows and columns of the patches of a square image of `size` pixels; None without support for masks."""
        return None

    @property
    def stride(self) -> int:
        """Distance of neighbouring patches in pixels: the patch size, or less after `use_stride`."""
        return self.patch_size

    def use_stride(self, stride: int) -> None:
        """Embed a patch every `stride` pixels, so that patches overlap and maps are finer, with the same weights.

        Args:
            stride: Divisor of the patch size.

        Raises:
            DinoError: If the stride is not possible, or the backbone is no plain vision transformer.
        """
        raise DinoError(
            f"--stride {stride} needs a plain vision transformer, whose patches can overlap; "
            f"{type(self.model).__name__} is none",
            "omit --stride; a larger --short-side also makes maps finer",
        )

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the patches of an image of `height` x `width` pixels."""
        return height // self.patch_size, width // self.patch_size

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks in order; empty if the backbone has none."""
        return list(getattr(self.model, "blocks", []))

    def compile_blocks(self, *, any_batch: bool) -> None:
        """Compile the blocks with torch.compile, if there are any.

        Args:
            any_batch: True if batch sizes may differ, as at the end of a dataset.
        """
        # torch compiles another version of a block for each combination of resolutions, gradient or none, all tokens
        # or the class token: four for a run with one size of global and one of local crops. More if sizes change, or
        # if blocks skip branches and take one resolution at a time. Its default limit is eight versions.
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile(dynamic=None if any_batch else False)

    def leave_out(self, share: float) -> None:
        """Skip each block's branches for this share of the images during training, without computing them.

        Raises:
            DinoError: If the backbone's blocks do not support it.
        """
        raise DinoError(
            "backbone.drop_path_rule=uniform needs a sequence of plain blocks; this backbone has none",
            "--set backbone.drop_path_rule=linear",
        )

    def rescale_positions(self, most: float) -> None:
        """Multiply rotary coordinates during training by a factor drawn log-uniformly between 1/most and most.

        Raises:
            DinoError: If the backbone's positions are not rotary.
        """
        raise DinoError(
            f"backbone.rescale_positions is {most:g}; this backbone has no rotary positions",
            "--set backbone.rescale_positions=1",
        )

    def jitter_positions(self, most: float) -> None:
        """Multiply rows and columns of rotary coordinates during training by factors between 1/most and most.

        Raises:
            DinoError: If the backbone's positions are not rotary.
        """
        raise DinoError(
            f"backbone.jitter_positions is {most:g}; this backbone has no rotary positions",
            "--set backbone.jitter_positions=1",
        )

    def level(self, parameter: str) -> int:
        """Return the depth of a parameter of `model`, by its name.

        The depth is 0 before the first block, n in the n-th block, and one more than the number of blocks after the
        last one. Without blocks, it is the number of the parameter's stage, or 0 if these are unknown.
        """
        return 0

    @property
    def levels(self) -> int:
        """Depth of the heads: that of the layers after the last block, or one more than that of the last stage."""
        return len(self.blocks) + 1

    def recompute_blocks(self) -> None:
        """Turn on activation checkpointing: store only each block's input, and recompute the rest in the backward pass.

        Raises:
            DinoError: If the backbone has no blocks.
        """
        raise DinoError("--recompute needs a sequence of blocks; this backbone has none", "--accumulate N")

    def forward(self, images: Tensor, masked: MaskedPatches | None = None) -> Tokens:  # [B, C, H, W]
        """Return the tokens of the last block, optionally with masked patches.

        Raises:
            DinoError: If the backbone does not support masking.
        """
        return self.last_tokens(images, 1, masked)[-1]

    def last_tokens(self, images: Tensor, last: int, masked: MaskedPatches | None = None) -> list[Tokens]:
        """Return the outputs of the last `last` blocks in order, each after the final norm.

        Raises:
            DinoError: If the backbone has fewer blocks or none, or does not support masking.
        """
        raise NotImplementedError

    def class_tokens(self, images: Tensor, last: int = 1, masked: MaskedPatches | None = None) -> list[Tensor]:
        """Return the class tokens of the last `last` blocks, at less cost than `last_tokens` if possible. [B, D] each

        Raises:
            DinoError: If the backbone has fewer blocks or none, or does not support masking.
        """
        return [tokens.cls for tokens in self.last_tokens(images, last, masked)]

    def encode(
        self, groups: Sequence[Tensor], masked: MaskedPatches | None = None, *, with_patches: bool = False
    ) -> tuple[Tensor, Tokens | None]:
        """Return the class tokens of images of several sizes, at less cost than one size after the other if possible.

        Args:
            groups: Images of each size. [B, C, H, W] each
            masked: Masked patches of the first size. If None, no patch is masked.
            with_patches: If True, also return all tokens of the first size.

        Returns:
            Class tokens of all images in order ([B + ..., D]), and the tokens of the first size, or None.
        """
        first, *others = groups
        tokens = self(first, masked) if with_patches else None
        cls = [tokens.cls] if tokens else self.class_tokens(first, masked=masked)
        cls += [self.class_tokens(group)[0] for group in others]
        return torch.cat(cls) if others else cls[0], tokens

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        """Return the patches' outputs, queries, keys or values in some blocks.

        Args:
            images: [B, C, H, W]
            layers: Numbers of blocks: 1 is the first and -1 the last. Their features are concatenated in this order.
            facet: `token` for a block's output after the final norm; `query`, `key` or `value` for those of its
                attention, with all heads concatenated, before any rotation by position.

        Returns:
            [B, rows, columns, len(layers)*D]

        Raises:
            DinoError: If the backbone lacks one of these blocks, or has no attention.

        Source: Amir et al., arXiv 2112.05814, which calls them facets.
        """
        raise NotImplementedError

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        """Compute the attention weights of some tokens over all tokens in the last block. [B, heads, queries, 1+R+N]

        Args:
            images: [B, C, H, W]
            queries: Tokens that attend. By default only the class token, so that memory grows linearly with the number
                of patches, not with its square.

        Raises:
            DinoError: If the backbone has no attention.
        """
        raise NotImplementedError

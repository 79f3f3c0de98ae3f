"""Backbones: timm models that return their tokens. Only this file, block.py and rotary.py touch timm's internals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import PatchEmbed  # type: ignore[attr-defined]
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinocli.core.errors import DinoError
from dinocli.models.block import BranchBlock, PlainBlock, Projection, RotaryBlock, attention_of, projected
from dinocli.models.positions import Positions, Resampler
from dinocli.models.rotary import Rotary

# Parts of class names in networks that are not purely convolutional.
_NOT_CONVOLUTIONS = ("Attention", "Mixer", "Mamba", "Gated", "LSTM", "ResBlock", "SpatialGating", "VisionTransformer")


Facet = Literal["token", "query", "key", "value"]


@dataclass(frozen=True)
class Tokens:
    """Output of a backbone for B images, each token after the final norm.

    Attributes:
        cls: Class token, or the average over the map of a convolutional network. [B, D]
        registers: R register tokens, possibly none. [B, R, D]
        patches: Patch tokens, row by row. [B, N, D]
        grid: Rows and columns of the patches; their product is N.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Hidden(NamedTuple):
    """Masked patches of a batch.

    Attributes:
        where: True for each masked patch. [B, N], bool
        token: Token that replaces them before positions are added. [1, D]
    """

    where: Tensor
    token: Tensor


def adapt(model: Any, positions: Positions) -> Backbone:
    """Wrap a timm model in the backbone class that reads it.

    Raises:
        DinoError: If the model is neither a vision transformer nor a convolutional network.
    """
    # Exact type: subclasses (distilled, hybrid, ...) have tokens in the sequence that this would misread.
    if type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed and model.cls_token is not None:
        return ViTBackbone(model, positions)
    if RotaryBackbone.reads(model):
        return RotaryBackbone(model)
    # A convolutional network returns a map [B, D, h, w]; networks that mix places otherwise have other layouts.
    parts = list(model.modules())
    if hasattr(model, "feature_info") and not any(
        word in type(p).__name__ for p in parts for word in _NOT_CONVOLUTIONS
    ):
        return ConvBackbone(model)
    raise DinoError(
        f"{type(model).__name__} is not a supported backbone; expected a vision transformer, with learned or DINOv3's "
        "rotary positions, or a convolutional network",
        "use one such as vit_small_patch16_224, vit_small_patch16_dinov3 or resnet50",
    )


class Backbone(nn.Module):
    """timm model behind a common interface; its weights are those of `model`, under timm's own keys.

    Attributes:
        model: timm model.
        width: Width D of the tokens.
        patch_size: Side of a patch in pixels; for a convolutional network, the stride of its map.
    """

    model: Any  # timm's classes are untyped
    width: int
    patch_size: int

    def grid(self, size: int) -> tuple[int, int] | None:
        """Return rows and columns of the patches of a square image of `size` pixels; None if masking is unsupported."""
        return None

    @property
    def row(self) -> list[nn.Module]:
        """Blocks in order; empty if the backbone has none."""
        return list(getattr(self.model, "blocks", []))

    def compile_blocks(self, *, any_batch: bool) -> None:
        """Compile the blocks with torch.compile, if there are any.

        Args:
            any_batch: If True, other batch sizes than the first may follow, as at the end of a dataset.
        """
        # Each combination of resolution, gradient or not, all tokens or the class token, and drop path or not is
        # another version of the same code, and torch's own limit is eight.
        torch._dynamo.config.recompile_limit = 64
        for block in self.row:
            block.compile(dynamic=None if any_batch else False)

    def leave_out(self, share: float) -> None:
        """Skip the branches of this share of the images in each block during training, at no cost.

        Raises:
            DinoError: If the backbone's blocks do not support it.
        """
        raise DinoError(
            "backbone.drop_path_rule=uniform needs a sequence of plain blocks; this backbone has none",
            "--set backbone.drop_path_rule=linear",
        )

    def rescale_positions(self, most: float) -> None:
        """Multiply coordinates by a factor drawn log-uniformly between 1/most and most during training.

        Raises:
            DinoError: If the backbone's positions are not rotary.
        """
        raise DinoError(
            f"backbone.rescale_positions is {most:g}; this backbone has no rotary positions",
            "--set backbone.rescale_positions=1",
        )

    def level(self, parameter: str) -> int:
        """Return the depth of a parameter of `model`, by its name.

        It is 0 before the first block, n in the nth, and one more after the last; 0 for all if there are no blocks.
        """
        return 0

    def recompute_blocks(self) -> None:
        """Turn on activation checkpointing: save only a block's input, and recompute the rest for its gradient.

        Raises:
            DinoError: If the backbone has no blocks.
        """
        raise DinoError("--recompute needs a sequence of blocks; this backbone has none", "--accumulate N")

    def forward(self, images: Tensor, hidden: Hidden | None = None) -> Tokens:  # [B, C, H, W]
        """Return the tokens of the last block, optionally with masked patches.

        Raises:
            DinoError: If the backbone does not support masking.
        """
        return self.blocks(images, 1, hidden)[-1]

    def blocks(self, images: Tensor, last: int, hidden: Hidden | None = None) -> list[Tokens]:
        """Return the tokens of the `last` blocks, each after the final norm, the earliest first.

        Raises:
            DinoError: If the backbone has fewer blocks or none, or does not support masking.
        """
        raise NotImplementedError

    def class_tokens(self, images: Tensor, last: int = 1, hidden: Hidden | None = None) -> list[Tensor]:
        """Return only the class tokens of the `last` blocks: those of `blocks`, at less cost if possible. [B, D] each

        Raises:
            DinoError: If the backbone has fewer blocks or none, or does not support masking.
        """
        return [tokens.cls for tokens in self.blocks(images, last, hidden)]

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        """Return the patches' outputs, queries, keys or values in some blocks.

        Args:
            images: [B, C, H, W]
            layers: Numbers of blocks: 1 is the first and -1 the last. Their features are concatenated in this order.
            facet: `token` for the output of a block after the final norm; `query`, `key` or `value` for those of its
                attention, all heads concatenated and before any rotation by position.

        Returns:
            [B, rows, columns, len(layers)*D]

        Raises:
            DinoError: If the backbone lacks one of these blocks, or has no attention.

        Source: Amir et al., arXiv 2112.05814, which calls them facets.
        """
        raise NotImplementedError

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        """Compute the attention of each token to each other in the last block. [B, heads, queries, 1+R+N]

        Args:
            images: [B, C, H, W]
            queries: Tokens that attend. By default only the class token, so that the memory for a large image grows
                with its patches and not with their square.

        Raises:
            DinoError: If the backbone has no attention.
        """
        raise NotImplementedError


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
        if not all(isinstance(block, BranchBlock) for block in self.row):
            super().leave_out(share)
        for block in self.row:
            block.left_out = share  # type: ignore[assignment]

    def level(self, parameter: str) -> int:
        if parameter.startswith("blocks."):
            return 1 + int(parameter.split(".")[1])
        return len(self.row) + 1 if parameter.startswith("norm.") else 0

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

    def _embed(self, images: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
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
        if hidden is not None:
            patches = torch.where(hidden.where[..., None], hidden.token.to(patches.dtype), patches)
        # shape[0] and not len(): an exported graph keeps the number of images free.
        prefix = [
            t.expand(images.shape[0], -1, -1) for t in (self.model.cls_token, self.model.reg_token) if t is not None
        ]
        tokens = torch.cat([*prefix, patches], dim=1)  # [B, 1+R+N, D]
        tokens, rotation = self._place(tokens, grid, square=images.shape[-2] == images.shape[-1])
        return self.model.norm_pre(tokens), rotation, grid

    def blocks(self, images: Tensor, last: int, hidden: Hidden | None = None) -> list[Tokens]:
        tokens, rotation, grid = self._embed(images, hidden)
        return [self._split(self.model.norm(made), grid) for made in self._last(tokens, rotation, last)]

    def class_tokens(self, images: Tensor, last: int = 1, hidden: Hidden | None = None) -> list[Tensor]:
        tokens, rotation, _ = self._embed(images, hidden)
        return [self.model.norm(made[:, 0]) for made in self._last(tokens, rotation, last, asking=1)]

    def _last(self, tokens: Tensor, rotation: Tensor | None, last: int, asking: int | None = None) -> list[Tensor]:
        """Return the outputs of the `last` blocks; the final one computes only `asking` tokens if it can. [B, T, D]"""
        first = len(self.row) - last
        if first < 0:
            raise DinoError(
                f"--blocks {last} is larger than the {len(self.row)} blocks of this backbone",
                f"--blocks {len(self.row)}",
            )
        outputs = []
        for i, block in enumerate(self.row):
            tokens = self._run(block, tokens, rotation, asking if i == len(self.row) - 1 else None)
            if i >= first:
                outputs.append(tokens)
        return outputs

    def _run(self, block: nn.Module, tokens: Tensor, rotation: Tensor | None, asking: int | None = None) -> Tensor:
        """Run a block, with activation checkpointing if that is on."""
        # Random draws happen here: a compiled or recomputed block must not draw anything itself.
        more: tuple[Any, ...] = (block.shares(tokens), asking) if isinstance(block, BranchBlock) else ()
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
        depth = len(self.row)
        if wrong := [layer for layer in layers if not 1 <= abs(layer) <= depth]:
            raise DinoError(f"--layer {wrong[0]} is no block; expected 1 to {depth}, or -1 to -{depth}", "--layer -1")
        wanted = [layer - 1 if layer > 0 else depth + layer for layer in layers]
        tokens, rotation, grid = self._embed(images)
        made: dict[int, Tensor] = {}
        for i, block in enumerate(self.row[: max(wanted) + 1]):
            before, last = tokens, i == max(wanted)
            if not last or facet == "token":
                tokens = self._run(block, tokens, rotation)
            if i in wanted:
                made[i] = self.model.norm(tokens) if facet == "token" else _project(block, before, facet)
        joined = torch.cat([made[i] for i in wanted], dim=-1)
        return joined[:, self.model.num_prefix_tokens :].unflatten(1, grid)

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        tokens, rotation, _ = self._embed(images)
        for block in self.row[:-1]:
            tokens = self._run(block, tokens, rotation)
        last: Any = self.row[-1]
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


class ConvBackbone(Backbone):
    """Convolutional timm network: its class token is the average over the map, its patches are the map's places."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width = int(model.num_features)
        self.patch_size = int(model.feature_info[-1]["reduction"])

    def blocks(self, images: Tensor, last: int, hidden: Hidden | None = None) -> list[Tokens]:
        if hidden is not None:
            raise DinoError(
                "views.mask needs a vision transformer; a convolutional network has no patches to mask",
                "--set views.mask=none",
            )
        if last != 1:
            raise DinoError(
                f"--blocks {last} is not supported: a convolutional network gives only its output", "--blocks 1"
            )
        features = self.model.forward_features(images)  # [B, D, h, w]
        if features.ndim != 4 or features.shape[1] != self.width:
            raise DinoError(
                f"{type(self.model).__name__} returns {'x'.join(map(str, features.shape))} values; expected a map of "
                f"{self.width} channels",
                "use one such as resnet50",
            )
        patches = features.flatten(2).transpose(1, 2)  # [B, N, D]
        return [Tokens(patches.mean(1), patches[:, :0], patches, (features.shape[-2], features.shape[-1]))]

    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        if tuple(layers) != (-1,) or facet != "token":
            raise DinoError(
                "a convolutional network gives only its output: no other layer, and no query, key or value",
                "--layer -1 --facet token",
            )
        (tokens,) = self.blocks(images, 1)
        return tokens.patches.unflatten(1, tokens.grid)

    def attention(self, images: Tensor, queries: slice = slice(0, 1)) -> Tensor:
        raise DinoError(
            "attention maps need a vision transformer; this backbone is a convolutional network",
            "use a checkpoint of a ViT preset such as vits16",
        )

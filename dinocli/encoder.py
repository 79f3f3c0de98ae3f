"""Encoder: a frozen backbone that turns images into features, from wherever its weights come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dinocli.data.augment import normalize
from dinocli.data.crops import cut
from dinocli.data.decode import Pixels
from dinocli.data.fill import Cutter
from dinocli.data.given import Given, given_images, unreadable
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader import ALONE, Plain, Share, plain_batches
from dinocli.data.sources import Source
from dinocli.device import autocast, has_bfloat16
from dinocli.errors import DinoError, nearest
from dinocli.models.backbone import Backbone, Facet, Tokens, Transformer
from dinocli.preset import Precision

TokenChoice = Literal["cls", "patches", "cls+avg"]
Channels = tuple[float, ...]
_MOST_PATCHES = 16_384


class NotFinite(DinoError):
    """Output of a network with values that are infinite or NaN.

    Args:
        reason: Number of these values, and of all.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the network's output is {reason}", "another checkpoint: its weights are too large for what it computes"
        )
        self.reason = reason


def checked(made: Tensor, what: str) -> Tensor:
    """Return what a network made.

    Raises:
        NotFinite: A value is infinite or NaN.
    """
    if bad := made.numel() - int(made.isfinite().sum()):
        raise NotFinite(f"not finite: {bad:,} of {made.numel():,} {what}")
    return made


def finite_rows(made: Tensor, names: Sequence[str]) -> tuple[list[int], list[tuple[str, str]]]:
    """Return the numbers of the rows that are finite, and name and reason of each other one.

    Args:
        made: Features of images. [B, ...]
        names: Name of each. [B]
    """
    bad = (~made.isfinite()).flatten(1).sum(1).tolist()
    of = made[0].numel() if len(made) else 0
    reasons = [(name, f"not finite: {n:,} of {of:,} features") for name, n in zip(names, bad, strict=True) if n]
    return [row for row, n in enumerate(bad) if not n], reasons


@dataclass(frozen=True)
class Encoder:
    """A frozen backbone in evaluation mode.

    Attributes:
        backbone: It.
        source: Where its weights came from, as the user named it.
        fingerprint: Sixteen hexadecimal digits of its weights' SHA-256.
        size: Side of the images it was trained on, in pixels.
        mean: Of the channels of its training data.
        std: Of the channels of its training data.
        images: How files became pixels when it was trained.
        precision: Of products, where the device has them of its own.
        run: Folder of the run that the weights are of, if they lie in one.
        step: Training steps of the weights, if the source tells.
        notes: Assumptions that reading the weights made, for the user to check.
    """

    backbone: Backbone = field(repr=False)  # a page of modules in a notebook
    source: str
    fingerprint: str
    size: int
    mean: Channels
    std: Channels
    images: ImagesConfig = DEFAULTS
    precision: Precision = "float32"
    run: str = ""
    step: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """C of the images that it takes."""
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.backbone.parameters()).device

    def __call__(
        self,
        images: Given | Sequence[Given],
        tokens: TokenChoice = "cls",
        blocks: int = 1,
        size: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Features of images that a program holds: the numbers that `dino extract` stores of the same files.

        Args:
            images: One or several: a path; an image of Pillow; an array of numbers, which counts as the `.npy` file of
                it, [H, W, C] or, for one channel, [H, W]. Tensors that are normalized already are for `features`.
            tokens: Which tokens; see `features`.
            blocks: Of how many of the last blocks.
            size: Side that the images are brought to, in pixels; absent, what the encoder was trained on.
            batch_size: Images at once.

        Returns:
            float32, on the CPU, a row for each image, for a single one too. What a row is, `features` says.

        Raises:
            DinoError: One cannot be read or has features that are not finite, which it names; or there is no such
                choice of tokens.
        """
        if tokens not in (known := get_args(TokenChoice)):
            raise DinoError(f"tokens are one of {', '.join(known)}; {tokens!r} came", f'"{nearest(tokens, known)}"')
        source, rows = given_images(images), []
        for batch in self.batches(source, size=size or self.size, batch_size=batch_size, workers=0):
            for name, reason in batch.bad:
                raise unreadable(name, reason)
            rows.append(self.features(batch.images, tokens, blocks).float().cpu())
            for name, reason in finite_rows(rows[-1], batch.names)[1]:
                raise DinoError(f"{name}: {reason}", "leave it out; of all images, another checkpoint")
        return torch.cat(rows)

    def batches(
        self,
        source: Source,
        *,
        size: int,
        batch_size: int,
        workers: int,
        share: Share = ALONE,
        cutter: Cutter | None = None,
    ) -> Iterator[Plain]:
        """All images of a source once, read and normalized as they were in training.

        Args:
            source: The images.
            size: Their side, in pixels.
            batch_size: Images at once.
            workers: Processes that decode.
            share: Which batches are this process's.
            cutter: Of views beside each image, if any.

        Raises:
            DinoError: The images would be smaller than a patch.
        """
        if size < self.backbone.patch_size:
            raise DinoError(
                f"images of at least one patch of {self.backbone.patch_size} pixels were wanted; the size is {size}",
                f"a size of {self.size}, as in training",
            )
        return plain_batches(
            source,
            size=size,
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            workers=workers,
            device=self.device,
            images=self.images,
            share=share,
            cutter=cutter,
        )

    @torch.no_grad()
    def features(self, images: Tensor, tokens: TokenChoice = "cls", blocks: int = 1) -> Tensor:
        """Features of normalized images; whoever stores or compares them checks them with `finite_rows`.

        Args:
            images: [B, C, H, W]
            tokens: `cls` joins the class tokens of the last blocks; `cls+avg` puts the average of the patch tokens
                beside each, number by number (cls0, avg0, cls1, avg1, ...), as the original's linear heads on ViT-B
                expect; `patches` joins each patch's tokens.
            blocks: How many of the last blocks, the earliest first.

        Returns:
            [B, blocks*D], [B, blocks*2*D], or [B, N, blocks*D]

        Source: facebookresearch/dino@7c446df eval_linear.py.
        """
        with autocast(self.device, self.precision):
            return features_of(self.backbone, images, tokens, blocks)

    def photo(self, pixels: Pixels, short_side: int, most: int = _MOST_PATCHES) -> Tensor:
        """A photo of any size and shape as the backbone takes it, all of it.

        Args:
            pixels: [H, W, C]
            short_side: What to resize its short side to, in pixels; both sides are then rounded to whole patches.
            most: Patches, but for rounding; as many as a machine can hold unless told otherwise. A very long photo, or
                a very large size, becomes coarser.

        Returns:
            Normalized. [1, C, H', W']
        """
        height, width = pixels.shape[:2]
        patch = self.backbone.patch_size
        scale = min(short_side / min(height, width), patch * (most / (height * width)) ** 0.5)
        rows, columns = (min(most, max(1, round(side * scale / patch))) for side in (height, width))
        image = cut(pixels, (0, 0, height, width), (rows * patch, columns * patch), "bilinear")
        mean, std = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))
        return normalize(image.to(self.device).float() / 255, mean, std)[None]

    @torch.no_grad()
    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        """What some blocks make of the patches, as `Backbone.patches` has it. [B, rows, columns, len(layers)*D]

        Raises:
            NotFinite: A value is infinite or NaN.
        """
        with autocast(self.device, self.precision):
            return checked(self.backbone.patches(images, layers, facet).float(), "values of patches")

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """How much the class token draws on each patch in the last block, for each head. [B, heads, rows, columns]

        Raises:
            DinoError: The backbone has no attention.
            NotFinite: A value is infinite or NaN.
        """
        rows, columns = images.shape[-2] // self.backbone.patch_size, images.shape[-1] // self.backbone.patch_size
        attention = self.backbone.attention(images)[:, :, 0]  # [B, heads, 1+R+N]
        attention = attention[..., attention.shape[-1] - rows * columns :].unflatten(-1, (rows, columns))
        return checked(attention, "values of attention")


def features_of(backbone: Backbone, images: Tensor, tokens: TokenChoice = "cls", blocks: int = 1) -> Tensor:
    """What `Encoder.features` describes, of a bare backbone."""
    if tokens == "cls":
        return torch.cat(backbone.class_tokens(images, blocks), dim=-1)
    return torch.cat([_choose(t, tokens) for t in backbone.blocks(images, blocks)], dim=-1)


def _choose(tokens: Tokens, choice: TokenChoice) -> Tensor:
    if choice == "patches":
        return tokens.patches
    return torch.stack([tokens.cls, tokens.patches.mean(1)], dim=-1).flatten(1)


def with_images(encoder: Encoder, overrides: Iterable[str]) -> Encoder:
    """The encoder with other limits and window for the files it reads.

    Args:
        encoder: What its checkpoint says.
        overrides: `images.key=value`, as `--set` has them.

    Raises:
        DinoError: One is not of `images`, not valid, or of other channels than the weights.
    """
    images = encoder.images.changed(overrides)
    if images.channels != encoder.channels:
        raise DinoError(
            f"{encoder.source} takes images of {encoder.channels} channels; {images.channels} were asked for",
            "leave images.channels out, or --init a training of your own with these weights",
        )
    return replace(encoder, images=images)


def whole_patches(encoder: Encoder, size: int | None) -> int | None:
    """Return a side of images that a user chose, or None.

    Raises:
        DinoError: It is no multiple of a transformer's patch size: pixels at the border would be left out.
    """
    patch = encoder.backbone.patch_size
    if size is None or not isinstance(encoder.backbone, Transformer) or size % patch == 0:
        return size
    below, above = size // patch * patch, (size // patch + 1) * patch
    sizes = f"--size {above}" if not below else f"--size {below}, or {above}"
    raise DinoError(f"--size {size} is not a multiple of the patch size {patch} of {encoder.source}", sizes)


def quick(encoder: Encoder, precision: Precision, *, compiled: bool) -> Encoder:
    """The encoder for many images: with coarser products, its channels last, and its blocks compiled.

    Args:
        encoder: Whose backbone it shares.
        precision: Of products, where the device has them of its own.
        compiled: Whether torch compiles the blocks: a minute at the start, and less for each batch.
    """
    if compiled:
        encoder.backbone.compile_blocks(any_batch=True)
    # Filters want the channels beside each other, as decoders give them.
    encoder.backbone.to(memory_format=torch.channels_last)
    there = precision == "float32" or has_bfloat16(encoder.device)
    return replace(encoder, precision=precision if there else "float32")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that differ between networks with different weights."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

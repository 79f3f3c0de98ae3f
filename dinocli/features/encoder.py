"""Encoder: a frozen backbone that computes features of images, with weights from any source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinocli.core.device import Precision, autocast, has_bfloat16
from dinocli.core.errors import DinoError, nearest
from dinocli.data.decode.pixels import Pixels
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.loader.batch import ALONE, Shard
from dinocli.data.loader.fill import Cutter
from dinocli.data.loader.plain import Plain, plain_batches
from dinocli.data.sources.open import Source
from dinocli.data.views.augment import normalize
from dinocli.data.views.crops import ViewConfig, ViewsConfig, cut
from dinocli.features.inputs import Given, given_images, given_source, unreadable
from dinocli.features.stream import EncodedImages
from dinocli.models.backbone import Backbone, Facet, Tokens

TokenChoice = Literal["cls", "patches", "cls+avg"]
Channels = tuple[float, ...]
MOST_PATCHES = 16_384


class NotFinite(DinoError):
    """Error about network output with infinite or NaN values.

    Args:
        reason: Text with the number of non-finite values and of all values.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the network's output is {reason}", "use another checkpoint: the values of this network overflow"
        )
        self.reason = reason


def checked(made: Tensor, what: str) -> Tensor:
    """Return a network's output if all values are finite.

    Raises:
        NotFinite: If a value is infinite or NaN.
    """
    if bad := made.numel() - int(made.isfinite().sum()):
        raise NotFinite(f"not finite: {bad:,} of {made.numel():,} {what}")
    return made


def finite_rows(made: Tensor, names: Sequence[str]) -> tuple[list[int], list[tuple[str, str]]]:
    """Return the indices of the finite rows, and the name and reason of each other row.

    Args:
        made: Features of images. [B, ...]
        names: Name of each image. [B]
    """
    bad = (~made.isfinite()).flatten(1).sum(1).tolist()
    of = made[0].numel() if len(made) else 0
    reasons = [(name, f"not finite: {n:,} of {of:,} features") for name, n in zip(names, bad, strict=True) if n]
    return [row for row, n in enumerate(bad) if not n], reasons


@dataclass(frozen=True)
class Encoder:
    """Frozen backbone in evaluation mode.

    Attributes:
        source: Source of the weights, as the user named it.
        fingerprint: First sixteen hexadecimal digits of the weights' SHA-256.
        size: Side of the training images, in pixels.
        mean: Mean of each channel in the training data.
        std: Standard deviation of each channel in the training data.
        images: Settings for decoding image files, as in training.
        precision: Precision of matrix products.
        run: Folder of the run that produced the weights, if any.
        step: Number of training steps, if the source stores it.
        notes: Assumptions made in reading the weights, for the user to check.
    """

    backbone: Backbone = field(repr=False)  # would fill a page in a notebook
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
        """Number of image channels (C)."""
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.backbone.parameters()).device

    def __call__(
        self,
        images: Given | Sequence[Given],
        tokens: TokenChoice = "cls",
        blocks: int = 1,
        size: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Return the features of images, equal to those that `dino extract` stores for the same files.

        Args:
            images: One image or several. An image is a path, the bytes of an image file, a Pillow image, or an array of
                numbers, which is read like a `.npy` file of it: [H, W, C], [C, H, W], or [H, W] for one channel. uint8
                tensors are read like arrays. For normalized tensors use `features`.
            tokens: Kind of tokens; see `features`.
            blocks: Number of last blocks whose tokens are used.
            size: Side that images are resized to, in pixels. If None, the training size.
            batch_size: Images encoded at once.

        Returns:
            float32 tensor on the CPU with one row per image, even for a single image. See `features` for the rows.

        Raises:
            DinoError: If an image cannot be read or has non-finite features (the error names it), or `tokens` is
                unknown.
        """
        _check_tokens(tokens)
        source, rows = given_images(images), []
        for batch in self.batches(source, size=size or self.size, batch_size=batch_size, workers=0):
            for name, reason in batch.bad:
                raise unreadable(name, reason)
            rows.append(self.features(batch.images, tokens, blocks).float().cpu())
            for name, reason in finite_rows(rows[-1], batch.names)[1]:
                raise DinoError(f"{name}: {reason}", "skip this image; if all images fail, use another checkpoint")
        return torch.cat(rows)

    def dataset(
        self,
        images: str | os.PathLike[str] | Sequence[Given] | Dataset[Any],
        tokens: TokenChoice = "cls",
        blocks: int = 1,
        size: int | None = None,
        batch_size: int = 64,
        workers: int = 0,
        skip_bad: bool = True,
    ) -> EncodedImages:
        """Return the features of many images as a torch data set that computes them on the way, a batch at a time.

        Args:
            images: A place as on the command line (a folder, a list of files, shards), a sequence of images as for a
                call, or a torch data set of images.
            tokens: Kind of tokens; see `features`.
            blocks: Number of last blocks whose tokens are used.
            size: Side that images are resized to, in pixels. If None, the training size.
            batch_size: Images per batch.
            workers: Number of decoding processes.
            skip_bad: If True, skip images that cannot be read; `bad` of the result lists them.

        Returns:
            Data set whose items are batches with `features`, `names` and `labels`; for a DataLoader, use
            `batch_size=None`.

        Raises:
            DinoError: If the place does not exist, there are no images, or `tokens` is unknown.
        """
        _check_tokens(tokens)
        return EncodedImages(
            self,
            given_source(images, self.images),
            tokens=tokens,
            blocks=blocks,
            size=size or self.size,
            batch_size=batch_size,
            workers=workers,
            skip_bad=skip_bad,
        )

    def batches(
        self,
        source: Source,
        *,
        size: int,
        batch_size: int,
        workers: int,
        shard: Shard = ALONE,
        cutter: Cutter | None = None,
    ) -> Iterator[Plain]:
        """Yield all images of a source once, decoded and normalized as in training.

        Args:
            source: Source of the images.
            size: Side of the images, in pixels.
            batch_size: Images encoded at once.
            workers: Number of decoding processes.
            shard: Share of the batches that this process reads.
            cutter: Cutter of random views of each image. If None, no views.

        Raises:
            DinoError: If `size` is smaller than a patch.
        """
        if size < self.backbone.patch_size:
            raise DinoError(
                f"size {size} is too small; expected at least one patch of {self.backbone.patch_size} pixels",
                f"use size {self.size}, as in training",
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
            shard=shard,
            cutter=cutter,
        )

    @torch.no_grad()
    def features(self, images: Tensor, tokens: TokenChoice = "cls", blocks: int = 1) -> Tensor:
        """Return the features of normalized images; check them with `finite_rows` before storing or comparing.

        Args:
            images: Normalized images. [B, C, H, W]
            tokens: `cls` concatenates the class tokens of the last blocks. `cls+avg` interleaves each with the average
                of the patch tokens (cls0, avg0, cls1, avg1, ...), as the original's linear heads on ViT-B expect.
                `patches` concatenates each patch's tokens.
            blocks: Number of last blocks whose tokens are used, earliest first.

        Returns:
            [B, blocks*D], [B, blocks*2*D], or [B, N, blocks*D]

        Source: facebookresearch/dino@7c446df eval_linear.py.
        """
        with autocast(self.device, self.precision):
            return features_of(self.backbone, images, tokens, blocks)

    def photo(self, pixels: Pixels, short_side: int, most: int = MOST_PATCHES) -> Tensor:
        """Resize and normalize a whole photo of any size and shape for the backbone.

        Args:
            pixels: Photo. [H, W, C]
            short_side: Target length of the short side, in pixels. Both sides are rounded to whole patches.
            most: Maximum number of patches, before rounding. Photos that would exceed it are resized to a smaller size.
                The default limits memory. Patches that overlap count one by one.

        Returns:
            Normalized photo. [1, C, H', W']
        """
        height, width = pixels.shape[:2]
        patch = self.backbone.patch_size
        scale = min(short_side / min(height, width), self.backbone.stride * (most / (height * width)) ** 0.5)
        rows, columns = (min(most, max(1, round(side * scale / patch))) for side in (height, width))
        image = cut(pixels, (0, 0, height, width), (rows * patch, columns * patch), "bilinear")
        mean, std = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))
        return normalize(image.to(self.device).float() / 255, mean, std)[None]

    @torch.no_grad()
    def patches(self, images: Tensor, layers: Sequence[int] = (-1,), facet: Facet = "token") -> Tensor:
        """Return the patch features of some blocks; see `Backbone.patches`. [B, rows, columns, len(layers)*D]

        Raises:
            NotFinite: If a value is infinite or NaN.
        """
        with autocast(self.device, self.precision):
            return checked(self.backbone.patches(images, layers, facet).float(), "values of patches")

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """Return the class token's attention to each patch in the last block, per head. [B, heads, rows, columns]

        Raises:
            DinoError: If the backbone has no attention.
            NotFinite: If a value is infinite or NaN.
        """
        rows, columns = self.backbone.map_size(images.shape[-2], images.shape[-1])
        attention = self.backbone.attention(images)[:, :, 0]  # [B, heads, 1+R+N]
        attention = attention[..., attention.shape[-1] - rows * columns :].unflatten(-1, (rows, columns))
        return checked(attention, "values of attention")


def _check_tokens(tokens: str) -> None:
    if tokens not in (known := get_args(TokenChoice)):
        raise DinoError(
            f"tokens={tokens!r} is not valid; expected {', '.join(known)}", f'tokens="{nearest(tokens, known)}"'
        )


def features_of(backbone: Backbone, images: Tensor, tokens: TokenChoice = "cls", blocks: int = 1) -> Tensor:
    """Return the features of normalized images from a backbone; see `Encoder.features`."""
    if tokens == "cls":
        return torch.cat(backbone.class_tokens(images, blocks), dim=-1)
    return torch.cat([_choose(t, tokens) for t in backbone.last_tokens(images, blocks)], dim=-1)


def _choose(tokens: Tokens, choice: TokenChoice) -> Tensor:
    if choice == "patches":
        return tokens.patches
    return torch.stack([tokens.cls, tokens.patches.mean(1)], dim=-1).flatten(1)


def with_images(encoder: Encoder, overrides: Iterable[str]) -> Encoder:
    """Return the encoder with other settings for reading image files: limits and window.

    Args:
        encoder: Encoder with the settings of its checkpoint.
        overrides: `images.key=value`, as for `--set`.

    Raises:
        DinoError: If an override is not of `images`, is invalid, or sets other channels than the weights have.
    """
    images = encoder.images.changed(overrides)
    if images.channels != encoder.channels:
        raise DinoError(
            f"images.channels={images.channels} does not fit {encoder.source}, which takes {encoder.channels} channels",
            f"remove images.channels, or train on these images: dino pretrain IMAGES --init {encoder.source}",
        )
    return replace(encoder, images=images)


def whole_patches(encoder: Encoder, size: int | None) -> int | None:
    """Check an image size chosen by the user, and return it unchanged.

    Raises:
        DinoError: If it is not a multiple of a transformer's patch size: pixels at the border would be ignored.
    """
    from dinocli.models.transformer import Transformer  # only here: it imports timm

    patch = encoder.backbone.patch_size
    if size is None or not isinstance(encoder.backbone, Transformer) or size % patch == 0:
        return size
    below, above = size // patch * patch, (size // patch + 1) * patch
    sizes = f"--size {above}" if not below else f"--size {below} or --size {above}"
    raise DinoError(f"--size {size} is not a multiple of the patch size {patch} of {encoder.source}", sizes)


def quick(encoder: Encoder, precision: Precision, *, compiled: bool) -> Encoder:
    """Return the encoder set up for many images: faster matrix products, channels last, and optionally compiled blocks.

    Args:
        encoder: Encoder whose backbone is converted in place and shared.
        precision: Precision of matrix products. Falls back to float32 if the device has no native bfloat16.
        compiled: Compile the blocks with torch.compile: about a minute at the start, then faster batches.
    """
    if compiled:
        encoder.backbone.compile_blocks(any_batch=True)
    # Convolutions are faster with channels last, the layout in which images are decoded.
    encoder.backbone.to(memory_format=torch.channels_last)
    there = precision == "float32" or has_bfloat16(encoder.device)
    return replace(encoder, precision=precision if there else "float32")


def augmented(encoder: Encoder, size: int, views: int = 1) -> ViewsConfig:
    """Return the settings of a linear probe's training views: random crops with flips.

    Args:
        encoder: Encoder whose normalization the views use.
        size: Side of a view, in pixels.
        views: Number of views per image, all with the same settings.

    Source: facebookresearch/dino@7c446df eval_linear.py, with the defaults of torchvision's RandomResizedCrop.
    """
    crop = ViewConfig(size=size, scale=(0.08, 1.0), flip=0.5, resample="bilinear")
    more = crop if views > 1 else None
    return ViewsConfig(mean=encoder.mean, std=encoder.std, global_1=crop, local=more, locals=views - 1)

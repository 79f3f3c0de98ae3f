"""DINO self-supervised pretraining for anyone with a folder of images.

From Python, with the objects that the commands use:

    encoder = dinocli.load("ckpt.safetensors")
    features = encoder(["a.jpg", "b.jpg"])                       # [2, D]
    maps = dinocli.attention(encoder, "a.jpg")                   # maps.heads: [heads, rows, columns]
    stored = dinocli.read_features("features/train.safetensors")

Nothing here imports torch before one of these is called. A mistake raises `dinocli.errors.DinoError`.

The shapes in this package, written at the end of the line that makes a tensor:

    V  views (crops) of an image        B  images in a batch
    G  global crops among the views     C  image channels
    H  height    W  width               N  patch tokens of an image
    D  width of the backbone            R  register tokens
    K  prototypes of a head             S  samples in a feature file
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from dinocli.data.given import Given
    from dinocli.encoder import Encoder
    from dinocli.evals.attention import AttentionMaps
    from dinocli.features import Features
    from dinocli.preset import Precision

__version__ = "0.1.0"


def load(
    source: str | os.PathLike[str],
    device: str = "auto",
    precision: Precision = "bfloat16",
    overrides: Sequence[str] = (),
) -> Encoder:
    """Load an encoder, as `dino extract` does: what it is called with becomes features.

    Args:
        source: A run folder, a `ckpt.safetensors`, an official DINO `.pth`, or `timm:NAME`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        precision: Of products; bfloat16 only where the device has it.
        overrides: `key=value` as `--set` takes them, such as `backbone.options.num_heads=6` for an official file.

    Raises:
        DinoError: There is no such source or device, or the weights or an override do not fit.
    """
    from dinocli.device import pick_device
    from dinocli.encoder import quick
    from dinocli.loading import load_encoder

    return quick(load_encoder(str(source), pick_device(device), overrides=overrides), precision, compiled=False)


def attention(encoder: Encoder, image: Given, size: int | None = None) -> AttentionMaps:
    """What the class token looks at in a photo of any size and shape, as `dino attn-map` draws it.

    Args:
        encoder: Of a vision transformer.
        image: A path, an image of Pillow, or an array.
        size: Short side to look at the photo with, in pixels; absent, what fits the encoder.

    Raises:
        DinoError: The photo cannot be read, or the backbone has no attention.
    """
    from dinocli.data.given import given_pixels
    from dinocli.evals.attention import attention_maps, default_size

    return attention_maps(encoder, given_pixels(image, encoder.images), size or default_size(encoder))


def read_features(path: str | os.PathLike[str]) -> Features:
    """Open features that `dino extract` wrote; they are checked once, and stay on the disk until they are asked for.

    Args:
        path: Of a feature file, or of a folder of shards.

    Raises:
        DinoError: There are none, they are damaged, or it is another kind of file; or an image's are not finite.
    """
    from pathlib import Path

    from dinocli.features import read_features

    return read_features(Path(path))

"""DINO self-supervised pretraining for anyone with a folder of images.

From Python, with the objects that the commands use:

    encoder = dinocli.load("ckpt.safetensors")
    features = encoder(["a.jpg", "b.jpg"])                       # [2, D]
    maps = dinocli.attention(encoder, "a.jpg")                   # maps.heads: [heads, rows, columns]
    stored = dinocli.read_features("features/train.safetensors")

torch is imported only when one of these is called. User errors raise `dinocli.core.errors.DinoError`.

A comment at the end of a line gives the shape of the tensor that the line computes, in these letters:

    V  views (crops) of an image        B  images in a batch
    G  global crops among the views     C  image channels
    H  height    W  width               N  patch tokens of an image
    D  width of the backbone            R  register tokens
    K  prototypes of a head             S  samples in a feature file
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinocli.core.version import __version__ as __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from dinocli.core.device import Precision
    from dinocli.evals.attention import AttentionMaps
    from dinocli.features.encoder import Encoder
    from dinocli.features.inputs import Given
    from dinocli.features.store import Features


def load(
    source: str | os.PathLike[str],
    device: str = "auto",
    precision: Precision = "bfloat16",
    overrides: Sequence[str] = (),
) -> Encoder:
    """Load an encoder that computes features of images, as `dino extract` does.

    Args:
        source: A run folder, a `ckpt.safetensors`, an official DINO `.pth`, or `timm:NAME`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        precision: Precision of matrix products; bfloat16 is used only if the device supports it.
        overrides: Overrides `key=value` as for `--set`, such as `backbone.options.num_heads=6` for an official file.

    Raises:
        DinoError: If the source or device does not exist, the weights do not fit, or an override is not valid.
    """
    from dinocli.core.device import pick_device
    from dinocli.features.encoder import quick
    from dinocli.weights.load import load_encoder

    return quick(load_encoder(str(source), pick_device(device), overrides=overrides), precision, compiled=False)


def attention(encoder: Encoder, image: Given, size: int | None = None) -> AttentionMaps:
    """Compute the class token's attention maps for an image of any size and shape, as `dino attn-map` draws them.

    Args:
        encoder: Encoder with a vision transformer.
        image: A path, a Pillow image, or an array.
        size: Length in pixels to which the image's short side is resized. If None, a size that fits the encoder.

    Raises:
        DinoError: If the image cannot be read, or the backbone has no attention.
    """
    from dinocli.evals.attention import attention_maps, default_size
    from dinocli.features.inputs import given_pixels

    return attention_maps(encoder, given_pixels(image, encoder.images), size or default_size(encoder))


def read_features(path: str | os.PathLike[str]) -> Features:
    """Open features that `dino extract` wrote; they are checked once, and loaded only on use.

    Args:
        path: Feature file, or folder of shards.

    Raises:
        DinoError: If there are no features, they are corrupt or not finite, or the file is of another kind.
    """
    from pathlib import Path

    from dinocli.features.store import read_features

    return read_features(Path(path))

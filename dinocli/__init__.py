"""DINO self-supervised pretraining for anyone with a folder of images.

From Python, with the objects that the commands use:

    encoder = dinocli.load("ckpt.safetensors")
    features = encoder(["a.jpg", "b.jpg"])                       # [2, D]
    maps = dinocli.attention(encoder, "a.jpg")                   # maps.heads: [heads, rows, columns]
    stored = dinocli.read_features("features/train.safetensors")
    run = dinocli.pretrain("./images", "tiny", epochs=20)        # run.checkpoint
    transform = dinocli.views("vits16")                          # crops of an image, for another library's data set

torch is imported only when one of these is called. User errors raise `dinocli.core.errors.DinoError`.

A comment at the end of a line gives the shape of the tensor that the line computes, in these letters:

    V  views (crops) of an image        B  images in a batch
    G  global crops among the views     C  image channels
    H  height    W  width               N  patch tokens of an image
    D  width of the backbone            R  register tokens
    K  prototypes of a head             S  samples in a feature file
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dinocli.core.version import __version__ as __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from torch.utils.data import Dataset

    from dinocli.core.device import Precision
    from dinocli.evals.attention import AttentionMaps
    from dinocli.features.encoder import Encoder
    from dinocli.features.inputs import Given
    from dinocli.features.store import Features
    from dinocli.features.transform import ViewsTransform
    from dinocli.train.logger import Progress
    from dinocli.train.pretrain import Run


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
        image: A path, the bytes of an image file, a Pillow image, an array, or a uint8 tensor.
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


def pretrain(
    images: str | os.PathLike[str] | Sequence[Given] | Dataset[Any],
    preset: str = "vits16",
    *,
    out: str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    init: str | None = None,
    monitor: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    report: bool = True,
    callbacks: Sequence[Callable[[Progress], object]] = (),
    **overrides: object,
) -> Run:
    """Train a vision transformer with DINO, as `dino pretrain` does: the same steps, run folder and resuming.

    Args:
        images: A place as on the command line, a sequence of images as `Encoder` takes them, or a torch data set of
            images (or of tuples that start with an image) with random access.
        preset: Name of a shipped preset, or path of a `.toml` file.
        out: Run folder. If None, that of an unfinished run with the same settings, else a new `runs/<preset>-<n>`.
        epochs: Value of `training.epochs`.
        batch_size: Value of `training.batch_size`: images per step.
        seed: Value of `training.seed`.
        steps: Number of steps after which the run ends early. If None, it completes its schedules.
        init: Initial weights: a run folder, a file, or `timm:NAME`.
        monitor: Folder of labelled images, on which the k-NN accuracy is measured during training.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        workers: Number of decoding processes. If None, a number that suits the machine; but 0 for images that are not
            in files, since every process would get a copy of them.
        report: If True, write `report.html` and `curves.png` into the run folder.
        callbacks: Functions called with the progress at each logged step. An exception in one ends the run; the state
            is saved.
        overrides: Settings by key, as for `--set`: `**{"optimizer.lr.start": 0.001}`, or `training={"epochs": 3}` for
            several keys of a table. None removes a key.

    Raises:
        DinoError: If the images, the preset or a setting are not valid, or training diverges.
    """
    import logging
    from pathlib import Path

    from dinocli.core.config import as_overrides
    from dinocli.features.inputs import given_source
    from dinocli.method.preset import load_preset
    from dinocli.train.plan import cautions
    from dinocli.train.prepare import prepare
    from dinocli.train.pretrain import pretrain as train

    note = logging.getLogger("dinocli").warning  # on stderr, unless the program configures logging
    short = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    given = {f"training.{name}": value for name, value in short.items() if value is not None}
    loaded = load_preset(preset, as_overrides(overrides | given))
    source = given_source(images, loaded.images)
    for line in source.notes:
        note(line)
    plan = prepare(
        Path(preset).name.removesuffix(".toml"),
        loaded,
        source,
        steps=steps,
        out=None if out is None else Path(out),
        device=device,
        workers=workers if workers is not None or isinstance(images, str | os.PathLike) else 0,
        init=init,
        monitor=monitor,
        report=report,
    )
    for line in cautions(plan):
        note(line)

    def inform(progress: Progress) -> None:
        for callback in callbacks:
            callback(progress)

    return train(plan, inform, note)


def views(preset: str = "vits16", **overrides: object) -> ViewsTransform:
    """Return the random crops of a preset as a transform of images, for another library's data set or training loop.

    Args:
        preset: Name of a shipped preset, or path of a `.toml` file.
        overrides: Settings by key, as for `pretrain`: `**{"views.locals": 4}`.

    Returns:
        Transform from an image to a list of normalized tensors [C, H, W]: two global crops, then the local ones.

    Raises:
        DinoError: If the preset or a setting is not valid.
    """
    from dinocli.core.config import as_overrides
    from dinocli.features.transform import ViewsTransform
    from dinocli.method.preset import load_preset

    loaded = load_preset(preset, as_overrides(overrides))
    return ViewsTransform(loaded.views, loaded.images)

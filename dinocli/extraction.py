"""Extraction: encoder and images to features on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dinocli.data.loader import plain_batches
from dinocli.data.sources import Source
from dinocli.encoder import Encoder, TokenChoice
from dinocli.errors import DinoError
from dinocli.features import Recipe, write_features


@dataclass(frozen=True)
class Extracted:
    """What was written.

    Attributes:
        path: Of the feature file.
        images: How many rows it has.
        shape: Of one row.
        skipped: Path and reason of each file that could not be read.
    """

    path: Path
    images: int
    shape: tuple[int, ...]
    skipped: dict[str, str]


def extract(
    encoder: Encoder,
    source: Source,
    path: Path,
    *,
    data: str,
    tokens: TokenChoice = "cls",
    blocks: int = 1,
    size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    report: Callable[[int], None] = lambda images: None,
) -> Extracted:
    """Write the features of all images that can be read.

    Args:
        encoder: What makes them.
        source: The images.
        path: Of the file to write.
        data: The data set's name, which is kept with the features so that those of two sets are not compared.
        tokens: Which tokens; see `Encoder.features`.
        blocks: Of how many of the last blocks.
        size: Side of the images in pixels; absent, what the encoder was trained on.
        batch_size: Images at once.
        workers: Processes that decode.
        report: Called after each batch with the number of images done so far.

    Raises:
        DinoError: The size is below one patch, or no image can be read.
    """
    size = size or encoder.size
    if size < encoder.backbone.patch_size:
        raise DinoError(
            f"--size should be at least one patch of {encoder.backbone.patch_size} pixels; it is {size}",
            f"--size {encoder.size}",
        )
    recipe = Recipe(encoder.source, encoder.fingerprint, tokens, blocks, size, data)
    shape: tuple[int, ...] = ()
    done = 0
    with write_features(path, recipe, source.classes) as writer:
        for batch in plain_batches(
            source,
            size=size,
            mean=encoder.mean,
            std=encoder.std,
            batch_size=batch_size,
            workers=workers,
            device=encoder.device,
            images=encoder.images,
        ):
            if len(batch.images):
                values = encoder.features(batch.images, tokens, blocks).float().cpu().numpy()
                shape = values.shape[1:]
                writer.append(values)
            writer.labels += batch.labels
            writer.paths += batch.names
            writer.skipped |= dict(batch.bad)
            done += len(batch.names) + len(batch.bad)
            report(done)
        if not writer.paths:
            first = next(iter(writer.skipped.items()))
            raise DinoError(
                f"none of the {done} images in {source.where} can be read; {first[0]}: {first[1]}", "look at that file"
            )
    return Extracted(path, len(writer.paths), shape, writer.skipped)

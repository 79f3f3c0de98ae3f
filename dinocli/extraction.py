"""Extraction: encoder and images to features on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dinocli.data.fill import Cutter
from dinocli.data.loader import Plain, Share
from dinocli.data.shards import UNNUMBERED
from dinocli.data.sources import Source
from dinocli.distributed import any_of, gathered, rank
from dinocli.distributed import size as size_of_run
from dinocli.encoder import Encoder, TokenChoice, finite_rows
from dinocli.errors import DinoError
from dinocli.evals.linear import augmented
from dinocli.features import Recipe
from dinocli.storing import Dtype, FeatureWriter, write_features


@dataclass(frozen=True)
class Extracted:
    """What was written.

    Attributes:
        path: Of the feature file, or of the folder of shards that large features become.
        images: How many rows it has.
        shape: Of one row; with K views [1+K, D].
        skipped: Path and reason of each image that could not be read, or whose features are not finite.
        notes: Lines for the user about labels that were not stored.
    """

    path: Path
    images: int
    shape: tuple[int, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()


def extract(
    encoder: Encoder,
    source: Source,
    path: Path,
    *,
    data: str,
    tokens: TokenChoice = "cls",
    blocks: int = 1,
    size: int | None = None,
    dtype: Dtype = "float32",
    views: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    report: Callable[[int], None] = lambda images: None,
) -> Extracted:
    """Write the features of all images that can be read.

    The processes of a run take the batches in turns, and the first one writes what it would have written alone.

    Args:
        encoder: What makes them.
        source: The images.
        path: Of the file to write; see `write_features`.
        data: The data set's name, which is kept with the features so that those of two sets are not compared.
        tokens: Which tokens; see `Encoder.features`.
        blocks: Of how many of the last blocks.
        size: Side of the images in pixels; absent, what the encoder was trained on.
        dtype: Of the stored numbers.
        views: Random views of each image whose features are stored beside its own, for `linear`.
        seed: Of the views, which depend on nothing else but their image's number.
        batch_size: Images at once.
        workers: Processes that decode.
        report: Called after each batch with the number of images done so far.

    Raises:
        DinoError: The size is below one patch, views are asked for of patch tokens, or no image can be read and has
            finite features.
    """
    size = size or encoder.size
    if views and tokens == "patches":
        raise DinoError("--views are for a classifier, which wants one feature an image", "leave out --tokens patches")
    recipe = Recipe(encoder.source, encoder.fingerprint, tokens, blocks, size, data, views, encoder.precision)
    recipe = replace(recipe, run=encoder.run, step=encoder.step)
    cutter = Cutter(augmented(encoder, size, views), seed, encoder.images) if views else None
    share = Share(rank(), size_of_run())
    batches = encoder.batches(source, size=size, batch_size=batch_size, workers=workers, share=share, cutter=cutter)
    shape: tuple[int, ...] = ()
    images = unnumbered = 0
    skipped: dict[str, str] = {}
    with write_features(path, recipe, source.classes, dtype=dtype) if rank() == 0 else nullcontext() as writer:
        for part in _in_turns(_Part.of(batch, encoder, tokens, blocks) for batch in batches):
            if part.values is not None:
                shape = part.values.shape[1:]
            if writer is not None:
                part.write(writer)
            images += len(part.names)
            unnumbered += part.labels.count(UNNUMBERED)
            skipped |= dict(part.bad)
            report(images + len(skipped))
        if not images:
            name, reason = next(iter(skipped.items()))
            lost = reason.startswith("not finite")
            raise DinoError(
                f"none of the {len(skipped)} images in {source.where} can be {'used' if lost else 'read'}; "
                f"{name}: {reason}",
                "another checkpoint: its weights are too large for what it computes" if lost else "look at that file",
            )
    return Extracted(writer.place if writer else path, images, shape, skipped, tuple(_notes(unnumbered)))


def _notes(unnumbered: int) -> Iterator[str]:
    if unnumbered:
        yield (
            f"{unnumbered} labels are names, which have no numbers through a pipe, and are not stored: take local "
            "shards, or numbers as labels"
        )


class _Part(NamedTuple):
    """Features of a batch; no values if no image of it can be read and has finite ones."""

    values: NDArray[np.float32] | None
    names: list[str]
    labels: list[int]
    bad: list[tuple[str, str]]

    @classmethod
    def of(cls, batch: Plain, encoder: Encoder, tokens: TokenChoice, blocks: int) -> _Part:
        if not len(batch.images):
            return cls(None, batch.names, batch.labels, batch.bad)
        values = encoder.features(batch.images, tokens, blocks).float().cpu()
        if batch.views is not None:
            beside = (encoder.features(view, tokens, blocks).float().cpu() for view in batch.views)
            values = torch.stack([values, *beside], dim=1)  # [B, 1+K, D]
        kept, lost = finite_rows(values, batch.names)
        return cls(
            values[kept].numpy() if lost else values.numpy(),
            [batch.names[i] for i in kept],
            [batch.labels[i] for i in kept],
            [*batch.bad, *lost],
        )

    def write(self, writer: FeatureWriter) -> None:
        if self.values is not None and len(self.values):
            writer.append(self.values, [max(label, -1) for label in self.labels], self.names)
        writer.skipped |= dict(self.bad)


def _in_turns(mine: Iterator[_Part]) -> Iterator[_Part]:
    """The parts of all processes in the order of their batches, which the processes took in turns."""
    while True:
        part = next(mine, None)
        (more,) = any_of(part is not None)
        if not more:
            return
        yield from (each for each in gathered(part) if each is not None)

"""Extraction of image features to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dinocli.core.distributed import any_of, gathered, rank
from dinocli.core.distributed import size as size_of_run
from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Shard
from dinocli.data.loader.fill import Cutter
from dinocli.data.loader.plain import Plain
from dinocli.data.sources.open import Source
from dinocli.data.sources.shards import UNNUMBERED
from dinocli.features.encoder import Encoder, TokenChoice, augmented, finite_rows
from dinocli.features.store import Provenance
from dinocli.features.writer import Dtype, FeatureWriter, write_features


@dataclass(frozen=True)
class Extracted:
    """Result of an extraction.

    Attributes:
        path: Feature file, or folder of shards for large features.
        images: Number of rows.
        shape: Shape of one row; with K views [1+K, D].
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
    """Write the features of all readable images.

    In a distributed run the processes take batches in turns, and the first process writes all features. The file is
    the same as that of a single process.

    Args:
        encoder: Encoder that computes the features.
        source: Source of the images.
        path: Output file; see `write_features`.
        data: Name of the data set. It is stored, so that features of different data sets are never compared.
        tokens: Kind of tokens; see `Encoder.features`.
        blocks: Number of last blocks whose tokens are used.
        size: Side of the images, in pixels. If None, the training size.
        dtype: Type of the stored numbers.
        views: Number of random views per image. Their features are stored with the image's own, for `linear`.
        seed: Seed of the views. A view depends only on the seed, its number and the image's index.
        batch_size: Images encoded at once, in each process.
        workers: Number of decoding processes.
        report: Callback that receives the number of finished images after each batch.

    Raises:
        DinoError: If the size is below one patch, `views` is combined with patch tokens, or no image is readable with
            finite features.
    """
    size = size or encoder.size
    if views and tokens == "patches":
        raise DinoError(
            "--views needs one feature vector per image, unlike --tokens patches", "remove --tokens patches"
        )
    provenance = Provenance(encoder.source, encoder.fingerprint, tokens, blocks, size, data, views, encoder.precision)
    provenance = replace(provenance, run=encoder.run, step=encoder.step)
    on_cpu = encoder.device.type == "cpu"
    cutter = Cutter(augmented(encoder, size, views), seed, encoder.images, finish=on_cpu) if views else None
    shard = Shard(rank(), size_of_run())
    batches = encoder.batches(source, size=size, batch_size=batch_size, workers=workers, shard=shard, cutter=cutter)
    shape: tuple[int, ...] = ()
    images = unnumbered = 0
    skipped: dict[str, str] = {}
    with write_features(path, provenance, source.classes, dtype=dtype) if rank() == 0 else nullcontext() as writer:
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
                "use another checkpoint: the values of this network overflow" if lost else "check that file",
            )
    return Extracted(writer.place if writer else path, images, shape, skipped, tuple(_notes(unnumbered)))


def _notes(unnumbered: int) -> Iterator[str]:
    if unnumbered:
        yield (
            f"ignoring {unnumbered} labels: shards read through a pipe need numbers as labels, not class names; use "
            "numbers, or local shards"
        )


class _Part(NamedTuple):
    """Features of a batch; `values` is None if no image could be read."""

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
    """Yield the parts of all processes in the order of their batches."""
    while True:
        part = next(mine, None)
        (more,) = any_of(part is not None)
        if not more:
            return
        yield from (each for each in gathered(part) if each is not None)

"""Extraction of image features to disk."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.checksums import crc_of
from dinocli.core.copies import fetch
from dinocli.core.distributed import any_of, from_first, gathered, rank
from dinocli.core.distributed import size as size_of_run
from dinocli.core.errors import DinoError
from dinocli.core.version import __version__
from dinocli.data.loader.batch import Shard
from dinocli.data.loader.fill import Cutter
from dinocli.data.loader.plain import Plain
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import Source
from dinocli.data.sources.shards import UNNUMBERED, Shards
from dinocli.features.encoder import Encoder, TokenChoice, augmented, finite_rows
from dinocli.features.store import Provenance, checksum_of
from dinocli.features.unfinished import Job, forget, record, recorded
from dinocli.features.writer import WHOLE, Dtype, FeatureWriter, Part, write_features


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
    part: Part = WHOLE,
    recording: bool = False,
    report: Callable[[int], None] = lambda images: None,
    say: Callable[[str], None] = lambda line: None,
) -> Extracted:
    """Write the features of all readable images.

    In a distributed run the processes take batches in turns, and the first process writes all features. The file is
    the same as that of a single process.

    If this process is killed, the same call resumes after the batches that were saved, about every 30 seconds. The file
    is then the same as that of an uninterrupted call.

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
        part: Part of the batches to extract, for `join`. It may hold no image.
        recording: Record the result, for a command that extracts several splits. If the command is interrupted and
            repeated, it does not extract this split again. `forget` removes the record.
        report: Callback that receives the number of finished images after each batch is written.
        say: Callback that receives one-line messages for the user.

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
    job = _job(provenance, source, encoder, dtype=dtype, seed=seed if views else 0, batch=batch_size, workers=workers)
    if before := from_first(_recorded(path, job, part) if rank() == 0 else None):
        say(f"{path} is complete")
        return before
    writing = write_features(path, provenance, source.classes, dtype=dtype, part=part, job=job, say=say)
    with writing if rank() == 0 else nullcontext() as writer, ThreadPoolExecutor(1) as thread:
        there = (writer.batches, writer.rows, writer.shape, writer.skipped, writer.unnumbered) if writer else None
        batches, images, shape, skipped, unnumbered = from_first(there) or (0, 0, (), {}, 0)
        skipped = dict(skipped)
        first, step = part.number - 1, part.of  # the part's batches: first, first + step, ...
        shard = Shard(first + step * (batches + rank()), step * size_of_run())
        loaded = encoder.batches(source, size=size, batch_size=batch_size, workers=workers, shard=shard, cutter=cutter)
        computed = _in_turns(_compute(loaded, encoder, tokens, blocks))
        done = _write_beside(computed, partial(_write, writer, first, step), thread) if writer else computed
        for some in done:
            if some.values is not None:
                shape = some.values.shape[1:]
            images += len(some.names)
            unnumbered += some.labels.count(UNNUMBERED)
            skipped |= dict(some.bad)
            report(images + len(skipped))
        if not images and part == WHOLE:
            name, reason = next(iter(skipped.items()))
            lost = reason.startswith("not finite")
            raise DinoError(
                f"none of the {len(skipped)} images in {source.where} can be {'used' if lost else 'read'}; "
                f"{name}: {reason}",
                "use another checkpoint: the values of this network overflow" if lost else "check that file",
            )
    result = Extracted(writer.place if writer else path, images, shape, skipped, tuple(_notes(unnumbered)))
    if recording and writer:
        facts = {"checksum": checksum_of(result.path), **vars(result), "path": str(result.path)}
        record(path, {**job, "part": part}, facts)
    return result


def count_in_part(images: int, batch_size: int, part: Part) -> int:
    """Return the number of images in a part of an extraction."""
    batches = range(part.number - 1, -(-images // batch_size), part.of)
    return sum(min(batch_size, images - number * batch_size) for number in batches)


def _recorded(path: Path, job: Job, part: Part) -> Extracted | None:
    """Return the recorded result of this extraction, if its file is still there."""
    facts = recorded(path, {**job, "part": part})
    if not facts:
        return None
    place = Path(facts["path"])
    if not place.exists() or checksum_of(place) != facts["checksum"]:
        forget(path)
        return None
    return Extracted(place, facts["images"], tuple(facts["shape"]), facts["skipped"], tuple(facts["notes"]))


def _job(
    provenance: Provenance, source: Source, encoder: Encoder, *, dtype: Dtype, seed: int, batch: int, workers: int
) -> Job:
    """Return everything that decides the bytes of the features, under names for messages."""
    named = {"weights": provenance.fingerprint, "image settings": encoder.images.model_dump(mode="json")}
    labels = zlib.crc32(source.labels.tobytes()) if isinstance(source, Images) else 0
    return {
        **{name: value for name, value in vars(provenance).items() if name != "fingerprint"},
        **named,
        "images": source.fingerprint,
        "labels": f"{crc_of({'classes': source.classes}, labels):08x}",
        "normalization": [encoder.mean, encoder.std],
        "dtype": dtype,
        "seed": seed,
        "batch size": batch,
        # Workers take turns in reading tar shards, so their number decides the order of the images.
        "workers": workers if isinstance(source, Shards) else 0,
        "device": encoder.device.type,
        "version": __version__,
    }


def _notes(unnumbered: int) -> Iterator[str]:
    if unnumbered:
        yield (
            f"ignoring {unnumbered} labels: shards read through a pipe need numbers as labels, not class names; use "
            "numbers, or local shards"
        )


class _Features(NamedTuple):
    """Features of a batch; `values` is None if no image could be read."""

    number: int
    values: NDArray[np.float32] | None
    names: list[str]
    labels: list[int]
    bad: list[tuple[str, str]]

    @classmethod
    def of(cls, batch: Plain, arriving: Callable[[], Tensor] | None) -> _Features:
        """Wait for the features of a batch, and sort out those that are not finite."""
        if arriving is None:
            return cls(batch.number, None, batch.names, batch.labels, batch.bad)
        values = arriving()
        kept, lost = finite_rows(values, batch.names)
        return cls(
            batch.number,
            values[kept].numpy() if lost else values.numpy(),
            [batch.names[i] for i in kept],
            [batch.labels[i] for i in kept],
            [*batch.bad, *lost],
        )


# Batches that a device has been given before the host reads one. Elsewhere the host computes, and waits anyway.
_AHEAD = {"cuda": 1}


def _compute(loaded: Iterator[Plain], encoder: Encoder, tokens: TokenChoice, blocks: int) -> Iterator[_Features]:
    """Yield the features of batches; a GPU is given the next batch before the host waits for one."""
    launched: deque[Callable[[], _Features]] = deque()
    for batch in loaded:
        launched.append(_launch(batch, encoder, tokens, blocks))
        del batch  # its images, whose memory the next batch needs
        if len(launched) > _AHEAD.get(encoder.device.type, 0):
            yield launched.popleft()()
    for wait in launched:
        yield wait()


def _launch(batch: Plain, encoder: Encoder, tokens: TokenChoice, blocks: int) -> Callable[[], _Features]:
    """Start to compute the features of a batch, and return a function that waits for them."""
    arriving = None
    if len(batch.images):
        values = encoder.features(batch.images, tokens, blocks).float()
        if batch.views is not None:
            beside = (encoder.features(view, tokens, blocks).float() for view in batch.views)
            values = torch.stack([values, *beside], dim=1)  # [B, 1+K, D]
        arriving = fetch(values)
    return partial(_Features.of, batch._replace(images=torch.empty(0), views=None), arriving)


def _in_turns(mine: Iterator[_Features]) -> Iterator[_Features]:
    """Yield the parts of all processes in the order of their batches."""
    while True:
        part = next(mine, None)
        (more,) = any_of(part is not None)
        if not more:
            return
        yield from (each for each in gathered(part) if each is not None)


def _write(writer: FeatureWriter, first: int, step: int, some: _Features) -> None:
    """Write a batch of a part, whose batches are `first`, `first + step`, and so on."""
    if some.values is not None and len(some.values):
        writer.append(some.values, [max(label, -1) for label in some.labels], some.names)
    writer.skipped |= dict(some.bad)
    writer.unnumbered += some.labels.count(UNNUMBERED)
    writer.end_batch((some.number - first) // step + 1)


def _write_beside(
    computed: Iterator[_Features], write: Callable[[_Features], None], thread: ThreadPoolExecutor
) -> Iterator[_Features]:
    """Yield batches once they are written. A thread writes one at a time, while the next is computed.

    Its error is raised here, and no later batch is written: a file with a gap must not be saved to resume from.
    """
    writing: tuple[_Features, Future[None]] | None = None
    for some in chain(computed, [None]):
        if writing:
            before, written = writing
            written.result()
            yield before
        writing = (some, thread.submit(write, some)) if some else None

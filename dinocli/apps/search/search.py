"""Search: nearest gallery images of photos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dinocli.apps.search.gallery import Gallery
from dinocli.apps.search.index import Index
from dinocli.core.errors import DinoError
from dinocli.data.sources.open import Source
from dinocli.evals.units import Floats
from dinocli.features.encoder import Encoder, finite_rows
from dinocli.features.store import Provenance


@dataclass(frozen=True)
class Neighbour:
    """Search result.

    Attributes:
        image: Name of the image in the gallery.
        cosine: Cosine to the query.
        label: Class of the image, or None.
        row: Row of the image in the gallery.
    """

    image: str
    cosine: float
    label: str | None
    row: int


@dataclass(frozen=True)
class Hits:
    """Query with its neighbours, the nearest first."""

    query: str
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Queries:
    """Features of query photos.

    Attributes:
        names: Names of the readable photos. [Q]
        values: Features of the readable photos. [Q, D]
        skipped: Path and reason of each unreadable photo.
    """

    names: list[str]
    values: Floats
    skipped: dict[str, str]


def same_encoder(encoder: Encoder, provenance: Provenance) -> None:
    """Check that an encoder has the weights that made the features.

    Raises:
        DinoError: If it has other weights.
    """
    if encoder.fingerprint != provenance.fingerprint:
        raise DinoError(
            f"the features were made by {provenance.source} ({provenance.fingerprint}); {encoder.source} has other "
            f"weights ({encoder.fingerprint})",
            "use --checkpoint with the one that made them, or extract again",
        )


def encode(
    encoder: Encoder,
    source: Source,
    provenance: Provenance,
    *,
    batch_size: int = 64,
    workers: int = 0,
    report: Callable[[int], None] = lambda images: None,
) -> Queries:
    """Encode photos with the settings of a gallery.

    Args:
        encoder: Encoder of the gallery; see `same_encoder`.
        source: Photos to encode.
        provenance: Settings of the gallery's features.
        batch_size: Images per batch.
        workers: Number of decoding processes.
        report: Callback after each batch, with the number of photos done.

    Raises:
        DinoError: If no photo can be read.
    """
    names: list[str] = []
    values: list[Floats] = []
    skipped: dict[str, str] = {}
    for batch in encoder.batches(source, size=provenance.size, batch_size=batch_size, workers=workers):
        if batch.names:
            tokens = encoder.features(batch.images, provenance.tokens, provenance.blocks)  # type: ignore[arg-type]
            features = tokens.float().cpu()
            finite, not_finite = finite_rows(features, batch.names)
            values.append(features[finite].numpy())
            names += [batch.names[i] for i in finite]
            skipped |= dict(not_finite)
        skipped |= dict(batch.bad)
        report(len(names) + len(skipped))
    if not names:
        path, reason = next(iter(skipped.items()))
        raise DinoError(f"none of the photos can be read; {path}: {reason}", "name a photo such as a .jpg")
    return Queries(names, np.concatenate(values), skipped)


def search(index: Index, gallery: Gallery, queries: Queries, k: int) -> Iterator[Hits]:
    """Yield the k nearest images of each query, or all images of a smaller gallery."""
    cosines, rows = index.search(queries.values, k)
    for name, near, found in zip(queries.names, cosines.tolist(), rows.tolist(), strict=True):
        pairs = [(cosine, row) for cosine, row in zip(near, found, strict=True) if row >= 0]
        yield Hits(name, [Neighbour(gallery.name(row), cosine, gallery.label(row), row) for cosine, row in pairs])

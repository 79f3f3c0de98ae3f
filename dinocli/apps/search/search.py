"""Search: nearest gallery images of photos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dinocli.apps.search.index import Index
from dinocli.features.gallery import Gallery
from dinocli.features.photos import Encoded


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


def search(index: Index, gallery: Gallery, queries: Encoded, k: int) -> Iterator[Hits]:
    """Yield the k nearest images of each query, or all images of a smaller gallery."""
    cosines, rows = index.search(queries.values, k)
    for name, near, found in zip(queries.names, cosines.tolist(), rows.tolist(), strict=True):
        pairs = [(cosine, row) for cosine, row in zip(near, found, strict=True) if row >= 0]
        yield Hits(name, [Neighbour(gallery.name(row), cosine, gallery.label(row), row) for cosine, row in pairs])

"""Scans of local shards by their headers and labels, before any image is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dinocli.data.sources import kinds as file_kinds
from dinocli.data.sources.samples import MOST_CLASSES, Tally, read_label, samples
from dinocli.data.sources.tar import Content, LocalTar

_TRIES = 100  # JSON members per shard to search for labels, before assuming that the others have none


class Scan(NamedTuple):
    """Contents of a shard, from its headers and labels or from an index.

    Attributes:
        images: Number of samples.
        torn: Description of the damage; empty for a valid tar.
        labels: Distinct labels.
        unlabelled: Number of samples without a label.
        apart: True if labels are stored apart from their images.
        tally: Members that are not samples.
        ended: False if the archive is not closed by zeros, as if cut between two members.
    """

    images: int
    torn: str = ""
    labels: frozenset[int | str] = frozenset()
    unlabelled: int = 0
    apart: bool = False
    tally: Tally = Tally()
    ended: bool = True


def scan(url: str) -> Scan:
    """Read the headers and labels of a local shard."""
    first = _scan_once(url, {})
    if not (first.unlabelled and first.tally.orphans):
        return first
    again = _scan_once(url, first.tally.orphans)
    return again._replace(apart=True) if again.unlabelled < first.unlabelled else first


def _scan_once(url: str, apart: Mapping[str, Content]) -> Scan:
    tally, labels, opened = Tally(), set[int | str](), dict[str, int]()
    images = unlabelled = 0
    try:
        with contextlib.closing(LocalTar(url)) as tape:
            for raw in samples(tape, tally=tally, labels=apart):
                images += 1
                # Most JSON next to images holds a caption, and a million of them take minutes to read.
                useless = not labels and unlabelled >= _TRIES
                label = None if useless and raw.kind == "json" else read_label(raw.label, opened)
                if label is None:
                    unlabelled += 1
                else:
                    labels.add(label)
            return Scan(images, tape.torn, frozenset(labels), unlabelled, False, tally, tape.ended or bool(tape.torn))
    finally:
        for file in opened.values():
            os.close(file)


def labels_apart(url: str) -> Mapping[str, Content]:
    """Return the labels of a shard that are stored apart from their images."""
    tally = Tally()
    with contextlib.closing(LocalTar(url)) as tape:
        for _ in samples(tape, tally=tally):
            pass
    return tally.orphans


def notes_of(scans: Sequence[Scan], kinds: Mapping[str, int]) -> Iterator[str]:
    """Yield messages about members of shards that are not read, or read differently from WebDataset."""
    yield from file_kinds.notes_of(kinds, "not read in the shards")
    tallies = [scan.tally for scan in scans]
    if links := [name for tally in tallies for name in tally.links]:
        yield f"{len(links)} images are links to files outside their shard and are ignored, such as {links[0]}"
    if shared := [name for tally in tallies for name in tally.shared]:
        yield f"{len(shared)} images share a WebDataset key (such as {shared[0]} and {shared[1]}); each is read"
    if beside := [name for tally in tallies for name in tally.beside]:
        yield f"{len(beside)} images belong to another image's sample by their key and are ignored, such as {beside[0]}"
    labelled, bare = (sum(scan.images for scan in scans if scan.labels), sum(s.unlabelled for s in scans if s.labels))
    if not labelled and (texts := kinds.get(".txt")):
        yield f"{texts} .txt members are taken for captions and are ignored; labels are .cls and .json members"
    if bare:
        yield f"{bare} of {labelled} images in shards with labels have no label"
    if lost := [name for scan in scans if not scan.apart for name in scan.tally.lost]:
        yield f"{len(lost)} labels belong to no image and are ignored, such as {lost[0]}"
    if len(set().union(*(scan.labels for scan in scans))) > MOST_CLASSES:
        yield f"more than {MOST_CLASSES:,} different labels: too many for classes; labels are ignored"

"""Index: exact or approximate nearest-neighbour search over features, stored on disk for reuse."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from dinocli.core.atomic import atomic, atomic_folder, write_json
from dinocli.core.checksums import crc_of_file, unseal, verified
from dinocli.core.tensors import Indices, Values, map_tensors, write_tensors
from dinocli.evals.equal import first_nearly_equal
from dinocli.evals.nearest import bounded, nearest
from dinocli.evals.units import Floats, unit

Kind = Literal["exact", "ivf", "hnsw"]

# Exact search up to this many features: a query takes about a second, and nothing is built. Above it, an IVF index is
# built once, in the time of thirty to sixty exact searches. Measured: benchmarks/search.py.
EXACT_UP_TO = 500_000
GOAL = 0.95  # target recall
AT = 10  # neighbours for measuring the recall
_QUERIES = 200  # queries that tune the index, and as many others that measure its recall
_CANDIDATES = 4  # candidates per neighbour: the index has coarse codes, so more than k are reranked by exact cosine
_LINKS = 32  # links per feature in the HNSW graph
_TRAIN_PER_LIST = 40  # training features per IVF list
_LEARN_BYTES = 2**30  # largest memory of the training features
_BLOCK = 65_536  # features added at once
_ROUNDING = 1e-6  # tolerance in cosine: a neighbour is correct if it is as near as the k-th true one
_FILE, _EQUAL, _ABOUT = "index.faiss", "equal.safetensors", "about.json"
_CHECKSUMS = "files"  # key in about.json: checksums of the other files by name

Report = Callable[[int], None]


@dataclass(frozen=True)
class About:
    """Description of an index.

    Attributes:
        kind: `exact` compares all features, `ivf` the lists nearest to the query, `hnsw` follows a graph.
        images: Number of features.
        digest: Digest of the features; see `digest_of`.
        effort: Number of searched lists, or of candidates kept during the search; 0 for exact search.
        recall: Share of the ten nearest neighbours found, over 200 random features; 1 for exact search.
        distinct: Number of features in the index, with equal ones counted once; 0 for exact search.
    """

    kind: Kind
    images: int
    digest: str
    effort: int = 0
    recall: float = 1.0
    distinct: int = 0


@dataclass(frozen=True)
class Distinct:
    """Features that an index holds once each, with the rows equal to them up to rounding.

    In a graph, many equal features would hide all others: every link of a node would lead to its copies.

    Attributes:
        rows: All rows, with equal ones adjacent. [S]
        begins: Position in `rows` of each feature's first row, plus the end. [U+1]
    """

    rows: Indices
    begins: Indices

    @classmethod
    def of(cls, first: Indices) -> Distinct:
        """Group rows by the first row equal up to rounding; see `first_nearly_equal`. [S]"""
        rows = np.argsort(first, kind="stable")
        begins = np.flatnonzero(np.diff(first[rows], prepend=-1))
        return cls(rows, np.append(begins, len(rows)))

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def firsts(self) -> Indices:
        """First row of each feature, ascending. [U]"""
        return self.rows[self.begins[:-1]]

    def equal(self, number: int) -> Indices:
        """Return the rows equal to a feature up to rounding, by its number."""
        return self.rows[self.begins[number] : self.begins[number + 1]]


class Index:
    """Nearest-neighbour index over features.

    Args:
        about: Description of the index.
        values: Features for exact cosines. [S, D]
        coarse: FAISS index that proposes candidates; None for exact search.
        distinct: Features in the FAISS index.

    Attributes:
        about: Description of the index.
    """

    def __init__(self, about: About, values: Values, coarse: Any = None, distinct: Distinct | None = None) -> None:
        self.about, self._values, self._coarse, self._distinct = about, values, coarse, distinct

    def search(self, queries: Floats, k: int) -> tuple[Floats, Indices]:
        """Return the cosines and rows of each query's k nearest features, the nearest first. [Q, k] each

        The cosines are exact. Missing neighbours have cosine -inf and row -1.
        """
        k = min(k, len(self._values))
        if self._coarse is None or self._distinct is None:
            return nearest(self._values, queries, k)
        originals, queries = queries, unit(queries)
        if self.about.kind == "ivf":
            self._coarse.nprobe = self.about.effort
        else:
            self._coarse.hnsw.efSearch = max(self.about.effort, k * _CANDIDATES)
        proposed = self._coarse.search(queries, min(k * _CANDIDATES, len(self._distinct)))[1]  # [Q, k * _CANDIDATES]
        cosines = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for q, numbers in enumerate(proposed):
            # Of equal rows, the first k suffice.
            equal = [self._distinct.equal(number)[:k] for number in numbers if number >= 0]
            found = np.concatenate(equal) if equal else rows[q, :0]
            exact = unit(self._values[found]) @ queries[q]
            order = np.argsort(-exact, kind="stable")[:k]
            cosines[q, : len(order)], rows[q, : len(order)] = exact[order], found[order]
        return bounded(self._values, originals, cosines, rows)


def kind_for(images: int) -> Kind:
    """Return the recommended index kind for a number of features."""
    return "exact" if images <= EXACT_UP_TO else "ivf"


def digest_of(values: Values, more: str = "") -> str:
    """Return sixteen hexadecimal digits that identify features by their shape and 256 rows.

    Args:
        values: Features. [S, D]
        more: Text that further identifies the features.
    """
    rows = np.unique(np.linspace(0, len(values) - 1, 256).astype(np.int64))
    return hashlib.sha256(f"{values.shape} {more}".encode() + values[rows].tobytes()).hexdigest()[:16]


def open_index(values: Values, kind: Kind, folder: Path, digest: str, report: Report = lambda images: None) -> Index:
    """Open the stored index of these features, or build it and store it if the folder is writable.

    Args:
        values: Features. [S, D]
        kind: Kind of index; an exact one consists of the features alone.
        folder: Parent folder of the stored index, `index.KIND/`.
        digest: Digest of the features; see `digest_of`.
        report: Progress callback with the number of features in a new index.
    """
    if kind == "exact":
        return Index(About("exact", len(values), digest), values)
    place = folder / f"index.{kind}"
    return _read_index(values, place, kind, digest) or _build(values, kind, place, digest, report)


def _read_index(values: Values, place: Path, kind: Kind, digest: str) -> Index | None:
    """Return the stored index, or None if it is of other features, incomplete or corrupt."""
    try:
        stored = unseal((place / _ABOUT).read_bytes())
        # Unverified bytes may give wrong answers or crash the process, so the index is rebuilt.
        checksums = stored.pop(_CHECKSUMS)
        if not all(verified(place / name, checksums[name]) for name in (_FILE, _EQUAL)):
            return None
        about = About(digest=stored.pop("of"), **stored)  # "of" is the file's key since version 0.1
        # Indices of earlier versions repeat equal features.
        if (about.digest, about.kind, about.images) != (digest, kind, len(values)) or not about.distinct:
            return None
        # IVF lists stay on disk until searched; a graph is read completely.
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if about.kind == "ivf" else 0
        coarse = faiss.read_index(str(place / _FILE), flags)
        if coarse.d != values.shape[1]:
            return None
        return Index(about, values, coarse, _read_distinct(place / _EQUAL, len(values), coarse.ntotal))
    # Rebuilding repairs any corrupt index.
    except (OSError, ValueError, TypeError, LookupError, RuntimeError):
        return None


def _read_distinct(path: Path, images: int, distinct: int) -> Distinct:
    first = np.array(map_tensors(path)[0]["first"])
    if first.shape != (images,) or not ((first >= 0) & (first <= np.arange(images))).all():
        raise ValueError(f"{path} belongs to other features")
    groups = Distinct.of(first)
    if len(groups) != distinct:
        raise ValueError(f"{path} belongs to another index")
    return groups


def _build(values: Values, kind: Kind, place: Path, digest: str, report: Report) -> Index:
    first = first_nearly_equal(values)
    distinct = Distinct.of(first)
    rows, width = distinct.firsts, values.shape[1]
    coarse = _make_ivf(len(rows), width) if kind == "ivf" else _make_hnsw(width)
    sample = _draw_sample(values, rows, coarse.nlist * _TRAIN_PER_LIST if kind == "ivf" else _BLOCK)
    coarse.train(sample)
    del sample
    for begin in range(0, len(rows), _BLOCK):
        coarse.add(unit(values[rows[begin : begin + _BLOCK]]))
        end = begin + _BLOCK
        report(end if end < len(rows) else len(values))  # the last block also reports the equal rows
    index = _tune(Index(About(kind, len(values), digest, distinct=len(rows)), values, coarse, distinct), values)
    # An index that cannot be stored is rebuilt by each command; nothing else is lost.
    with contextlib.suppress(OSError, RuntimeError), atomic_folder(place) as draft:
        with atomic(draft / _FILE) as file:
            faiss.write_index(coarse, str(file))
        write_tensors(draft / _EQUAL, {"first": first}, {})
        checksums = {name: f"{crc_of_file(draft / name):08x}" for name in (_FILE, _EQUAL)}
        about = asdict(index.about)
        write_json(draft / _ABOUT, {"of": about.pop("digest"), **about, _CHECKSUMS: checksums})
    return index


def _make_ivf(count: int, width: int) -> Any:
    """Return an inverted file that stores each number in one byte."""
    lists = max(1, min(int(4 * count**0.5), count // _TRAIN_PER_LIST))
    coarse = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    coarse.cp.min_points_per_centroid = 1  # else FAISS warns on stderr
    return coarse


def _make_hnsw(width: int) -> Any:
    """Return a graph of neighbours that stores each number in one byte."""
    kind = faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexHNSWSQ(width, kind, _LINKS, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]


def _draw_sample(values: Values, rows: Indices, count: int) -> Floats:
    """Draw training features at random."""
    count = min(count, len(rows), max(1, _LEARN_BYTES // (4 * values.shape[1])))
    return unit(values[rows[np.sort(np.random.default_rng(0).choice(len(rows), count, replace=False))]])


def _tune(index: Index, values: Values) -> Index:
    """Return the index with the least effort that reaches the target recall, and its recall on other queries."""
    drawn = np.random.default_rng(1).permutation(len(values))[: 2 * _QUERIES]
    k = min(AT, len(values) - 1)
    queries = values[drawn]
    # Of the k-th true neighbour: the nearest is the feature itself.
    last_cosines = nearest(values, queries, k + 1)[0][:, -1]
    tuning, test = slice(0, None, 2), slice(1, None, 2)
    about = index.about
    max_effort = index._coarse.nlist if about.kind == "ivf" else 4096
    effort = 1 if about.kind == "ivf" else 16
    while True:
        index = Index(replace(about, effort=effort), values, index._coarse, index._distinct)
        if (
            effort >= max_effort
            or _measure_recall(index, queries[tuning], drawn[tuning], last_cosines[tuning], k) >= GOAL
        ):
            break
        effort = min(max_effort, effort * 2)
    recall = _measure_recall(index, queries[test], drawn[test], last_cosines[test], k)
    return Index(replace(index.about, recall=recall), values, index._coarse, index._distinct)


def _measure_recall(index: Index, queries: Floats, rows: Indices, last: Floats, k: int) -> float:
    """Measure the share of the k found neighbours that are as near as the k-th true one, without the feature itself.

    Row numbers are not compared: any of several equal features is correct.
    """
    if not k or not len(rows):
        return 1.0
    cosines, found = index.search(queries, k + 1)
    right = (cosines >= last[:, None] - _ROUNDING) & (found != rows[:, None])
    return float(np.minimum(right.sum(1), k).mean() / k)

"""Index: nearest features of many, found without a look at all of them; kept on disk and used again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from safetensors import SafetensorError

from dinocli.atomic import atomic, atomic_folder, write_json, write_tensors
from dinocli.checksums import crc_of_file, unseal, verified
from dinocli.evals.equal import first_nearly_equal
from dinocli.evals.nearest import bounded, nearest
from dinocli.evals.units import Floats, unit
from dinocli.mapped import Indices, Values, map_tensors

Kind = Literal["exact", "ivf", "hnsw"]

# Up to so many features all are looked at: a photo is found in about a second, and there is nothing to build.
# Above, an IVF index is built once, in the time of thirty to sixty exact searches. Measured: benchmarks/search.py.
EXACT_UP_TO = 500_000
GOAL = 0.95  # of the recall
AT = 10  # neighbours by which the recall is told
_ASKED = 200  # features by which the index is set, and as many by which its recall is told
_MORE = 4  # times k: so many come out of the index, whose codes are coarse, and are then held against the features
_LINKS = 32  # of each feature in HNSW's graph
_EACH = 40  # features for each list of an IVF index to learn from
_LEARN_BYTES = 2**30  # of them, at most
_BLOCK = 65_536  # features that are added at once
_ROUNDING = 1e-6  # of a cosine: neighbours as near as the last true one, but for this, are as good as it
_FILE, _EQUAL, _ABOUT = "index.faiss", "equal.safetensors", "about.json"
_CHECKSUMS = "files"  # in the last: those of the others, by their names

Report = Callable[[int], None]


@dataclass(frozen=True)
class About:
    """What an index is.

    Attributes:
        kind: `exact` looks at all features, `ivf` at the lists nearest to the query, `hnsw` goes along a graph.
        images: How many features there are.
        of: Tells the features from others.
        effort: Lists that are looked at, or candidates that are kept on the way; 0 where all are looked at.
        recall: Share of the ten nearest that it finds, of 200 features drawn by chance; 1 where all are looked at.
        distinct: Features in the index, which holds equal ones once; 0 where all are looked at.
    """

    kind: Kind
    images: int
    of: str
    effort: int = 0
    recall: float = 1.0
    distinct: int = 0


@dataclass(frozen=True)
class Distinct:
    """Features that an index holds once each, and the rows that are equal to them but for rounding.

    A graph with many equal features hides others: all links of a place lead to its copies.

    Attributes:
        rows: All rows, equal ones behind each other. [S]
        begins: Place in `rows` where those of each feature begin, and the end. [U+1]
    """

    rows: Indices
    begins: Indices

    @classmethod
    def of(cls, first: Indices) -> Distinct:
        """Group rows by the first one that is equal but for rounding; see `first_nearly_equal`. [S]"""
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
        """Return the rows that are equal to a feature but for rounding, by its number."""
        return self.rows[self.begins[number] : self.begins[number + 1]]


class Index:
    """Finds nearest features.

    Args:
        about: What it is.
        values: The features, from which the cosines come. [S, D]
        coarse: FAISS's index, which proposes; none where all are looked at.
        distinct: Features in that index.

    Attributes:
        about: What it is.
    """

    def __init__(self, about: About, values: Values, coarse: Any = None, distinct: Distinct | None = None) -> None:
        self.about, self._values, self._coarse, self._distinct = about, values, coarse, distinct

    def search(self, queries: Floats, k: int) -> tuple[Floats, Indices]:
        """Cosines and rows of each query's k nearest features, the nearest first. [Q, k] each

        The cosines are exact; where the index did not find as many, they are -inf and the rows -1.
        """
        k = min(k, len(self._values))
        if self._coarse is None or self._distinct is None:
            return nearest(self._values, queries, k)
        asked, queries = queries, unit(queries)
        if self.about.kind == "ivf":
            self._coarse.nprobe = self.about.effort
        else:
            self._coarse.hnsw.efSearch = max(self.about.effort, k * _MORE)
        proposed = self._coarse.search(queries, min(k * _MORE, len(self._distinct)))[1]  # [Q, k * _MORE]
        cosines = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for q, numbers in enumerate(proposed):
            # Of those that are equal the first k are as good as all.
            equal = [self._distinct.equal(number)[:k] for number in numbers if number >= 0]
            found = np.concatenate(equal) if equal else rows[q, :0]
            exact = unit(self._values[found]) @ queries[q]
            order = np.argsort(-exact, kind="stable")[:k]
            cosines[q, : len(order)], rows[q, : len(order)] = exact[order], found[order]
        return bounded(self._values, asked, cosines, rows)


def kind_for(images: int) -> Kind:
    """Which index so many features want."""
    return "exact" if images <= EXACT_UP_TO else "ivf"


def digest_of(values: Values, more: str = "") -> str:
    """Sixteen hexadecimal digits that differ between features, by their number and 256 of them.

    Args:
        values: [S, D]
        more: What else tells them apart.
    """
    rows = np.unique(np.linspace(0, len(values) - 1, 256).astype(np.int64))
    return hashlib.sha256(f"{values.shape} {more}".encode() + values[rows].tobytes()).hexdigest()[:16]


def open_index(values: Values, kind: Kind, folder: Path, of: str, report: Report = lambda images: None) -> Index:
    """The index of features: the one that is kept, if it is of these features; else a new one, which is kept
    where the folder may be written to.

    Args:
        values: [S, D]
        kind: Of the index; an exact one is nothing but the features.
        folder: That it is kept in, as `index.KIND/`.
        of: What tells the features from others; see `digest_of`.
        report: Called now and then with the number of features that are in a new index.
    """
    if kind == "exact":
        return Index(About("exact", len(values), of), values)
    place = folder / f"index.{kind}"
    return _kept(values, place, kind, of) or _build(values, kind, place, of, report)


def _kept(values: Values, place: Path, kind: Kind, of: str) -> Index | None:
    """Return the stored index, or None if it is of other features, incomplete or damaged."""
    try:
        told = unseal((place / _ABOUT).read_bytes())
        # An index whose bytes are not known may give wrong answers, or end the process: it is built again.
        checksums = told.pop(_CHECKSUMS)
        if not all(verified(place / name, checksums[name]) for name in (_FILE, _EQUAL)):
            return None
        about = About(**told)
        # Indices of earlier versions hold equal features as often as they come.
        if (about.of, about.kind, about.images) != (of, kind, len(values)) or not about.distinct:
            return None
        # Lists stay on the disk until they are looked at; a graph is read whole.
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if about.kind == "ivf" else 0
        coarse = faiss.read_index(str(place / _FILE), flags)
        if coarse.d != values.shape[1]:
            return None
        return Index(about, values, coarse, _read_distinct(place / _EQUAL, len(values), coarse.ntotal))
    # Whatever is wrong with what was kept, making it again mends it.
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError):
        return None


def _read_distinct(path: Path, images: int, distinct: int) -> Distinct:
    first = np.array(map_tensors(path)[0]["first"])
    if first.shape != (images,) or not ((first >= 0) & (first <= np.arange(images))).all():
        raise ValueError(f"{path} is of other features")
    found = Distinct.of(first)
    if len(found) != distinct:
        raise ValueError(f"{path} is of another index")
    return found


def _build(values: Values, kind: Kind, place: Path, of: str, report: Report) -> Index:
    first = first_nearly_equal(values)
    distinct = Distinct.of(first)
    rows, width = distinct.firsts, values.shape[1]
    coarse = _ivf(len(rows), width) if kind == "ivf" else _hnsw(width)
    sample = _sample(values, rows, coarse.nlist * _EACH if kind == "ivf" else _BLOCK)
    coarse.train(sample)
    del sample
    for begin in range(0, len(rows), _BLOCK):
        coarse.add(unit(values[rows[begin : begin + _BLOCK]]))
        end = begin + _BLOCK
        report(end if end < len(rows) else len(values))  # equal ones come in with the last
    index = _set(Index(About(kind, len(values), of, distinct=len(rows)), values, coarse, distinct), values)
    # Where it cannot be kept, it is made each time, and nothing else is lost.
    with contextlib.suppress(OSError, RuntimeError), atomic_folder(place) as draft:
        with atomic(draft / _FILE) as file:
            faiss.write_index(coarse, str(file))
        write_tensors(draft / _EQUAL, {"first": first}, {})
        checksums = {name: f"{crc_of_file(draft / name):08x}" for name in (_FILE, _EQUAL)}
        write_json(draft / _ABOUT, asdict(index.about) | {_CHECKSUMS: checksums})
    return index


def _ivf(count: int, width: int) -> Any:
    """An inverted file, of which a number takes a byte."""
    lists = max(1, min(int(4 * count**0.5), count // _EACH))
    coarse = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    coarse.cp.min_points_per_centroid = 1  # else it has words on stderr
    return coarse


def _hnsw(width: int) -> Any:
    """A graph of neighbours, of which a number takes a byte."""
    kind = faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexHNSWSQ(width, kind, _LINKS, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]


def _sample(values: Values, rows: Indices, wanted: int) -> Floats:
    """Features to learn from, drawn by chance."""
    wanted = min(wanted, len(rows), max(1, _LEARN_BYTES // (4 * values.shape[1])))
    return unit(values[rows[np.sort(np.random.default_rng(0).choice(len(rows), wanted, replace=False))]])


def _set(index: Index, values: Values) -> Index:
    """The index with the least effort that reaches the goal on some features, and its recall on others."""
    drawn = np.random.default_rng(1).permutation(len(values))[: 2 * _ASKED]
    k = min(AT, len(values) - 1)
    queries = values[drawn]
    last = nearest(values, queries, k + 1)[0][:, -1]  # of the true neighbours; a feature itself comes before them
    tried, told = slice(0, None, 2), slice(1, None, 2)
    about = index.about
    most = index._coarse.nlist if about.kind == "ivf" else 4096
    effort = 1 if about.kind == "ivf" else 16
    while True:
        index = Index(replace(about, effort=effort), values, index._coarse, index._distinct)
        if effort >= most or _recall(index, queries[tried], drawn[tried], last[tried], k) >= GOAL:
            break
        effort = min(most, effort * 2)
    recall = _recall(index, queries[told], drawn[told], last[told], k)
    return Index(replace(index.about, recall=recall), values, index._coarse, index._distinct)


def _recall(index: Index, queries: Floats, rows: Indices, last: Floats, k: int) -> float:
    """Measure the share of k neighbours of each feature that are as near as its k-th true one, without itself.

    Numbers of rows are not compared: of equal features any is right.
    """
    if not k or not len(rows):
        return 1.0
    cosines, found = index.search(queries, k + 1)
    right = (cosines >= last[:, None] - _ROUNDING) & (found != rows[:, None])
    return float(np.minimum(right.sum(1), k).mean() / k)

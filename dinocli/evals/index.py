"""Index: nearest features of many, found without a look at all of them; kept on disk and used again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from dinocli.atomic import atomic, atomic_folder, write_json
from dinocli.checksums import crc_of_file, unseal, verified
from dinocli.evals.nearest import Floats, nearest, unit
from dinocli.mapped import Indices, Values

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
_FILE, _ABOUT = "index.faiss", "about.json"
_CHECKSUM = "file"  # in the latter: the checksum of the former

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
    """

    kind: Kind
    images: int
    of: str
    effort: int = 0
    recall: float = 1.0


class Index:
    """Finds nearest features.

    Args:
        about: What it is.
        values: The features, from which the cosines come. [S, D]
        coarse: FAISS's index, which proposes; none where all are looked at.

    Attributes:
        about: What it is.
    """

    def __init__(self, about: About, values: Values, coarse: Any = None) -> None:
        self.about, self._values, self._coarse = about, values, coarse

    def search(self, queries: Floats, k: int) -> tuple[Floats, Indices]:
        """Cosines and rows of each query's k nearest features, the nearest first. [Q, k] each

        The cosines are exact; where the index did not find as many, they are -inf and the rows -1.
        """
        k = min(k, len(self._values))
        if self._coarse is None:
            return nearest(self._values, queries, k)
        queries = unit(queries)
        if self.about.kind == "ivf":
            self._coarse.nprobe = self.about.effort
        else:
            self._coarse.hnsw.efSearch = max(self.about.effort, k * _MORE)
        proposed = self._coarse.search(queries, min(k * _MORE, len(self._values)))[1]  # [Q, k * _MORE]
        cosines = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for q, found in enumerate(proposed):
            found = found[found >= 0]
            exact = unit(self._values[found]) @ queries[q]
            order = np.argsort(-exact, kind="stable")[:k]
            cosines[q, : len(order)], rows[q, : len(order)] = exact[order], found[order]
        return cosines, rows


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
        if not verified(place / _FILE, told.pop(_CHECKSUM)):
            return None
        about = About(**told)
        if (about.of, about.kind, about.images) != (of, kind, len(values)):
            return None
        # Lists stay on the disk until they are looked at; a graph is read whole.
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if about.kind == "ivf" else 0
        coarse = faiss.read_index(str(place / _FILE), flags)
        return Index(about, values, coarse) if (coarse.ntotal, coarse.d) == values.shape else None
    # Whatever is wrong with what was kept, making it again mends it.
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        return None


def _build(values: Values, kind: Kind, place: Path, of: str, report: Report) -> Index:
    coarse = _ivf(values) if kind == "ivf" else _hnsw(values)
    sample = _sample(values, coarse.nlist * _EACH if kind == "ivf" else _BLOCK)
    coarse.train(sample)
    del sample
    for first in range(0, len(values), _BLOCK):
        coarse.add(unit(values[first : first + _BLOCK]))
        report(min(len(values), first + _BLOCK))
    index = _set(Index(About(kind, len(values), of), values, coarse), values)
    # Where it cannot be kept, it is made each time, and nothing else is lost.
    with contextlib.suppress(OSError, RuntimeError), atomic_folder(place) as draft:
        with atomic(draft / _FILE) as file:
            faiss.write_index(coarse, str(file))
        write_json(draft / _ABOUT, asdict(index.about) | {_CHECKSUM: f"{crc_of_file(draft / _FILE):08x}"})
    return index


def _ivf(values: Values) -> Any:
    """An inverted file, of which a number takes a byte."""
    width = values.shape[1]
    lists = max(1, min(int(4 * len(values) ** 0.5), len(values) // _EACH))
    coarse = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    coarse.cp.min_points_per_centroid = 1  # else it has words on stderr
    return coarse


def _hnsw(values: Values) -> Any:
    """A graph of neighbours, of which a number takes a byte."""
    kind = faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexHNSWSQ(values.shape[1], kind, _LINKS, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]


def _sample(values: Values, wanted: int) -> Floats:
    """Features to learn from, drawn by chance."""
    wanted = min(wanted, len(values), max(1, _LEARN_BYTES // (4 * values.shape[1])))
    return unit(values[np.sort(np.random.default_rng(0).choice(len(values), wanted, replace=False))])


def _set(index: Index, values: Values) -> Index:
    """The index with the least effort that reaches the goal on some features, and its recall on others."""
    drawn = np.random.default_rng(1).permutation(len(values))[: 2 * _ASKED]
    k = min(AT, len(values) - 1)
    queries = unit(values[drawn])
    truth = nearest(values, queries, k + 1)[1]
    tried, told = slice(0, None, 2), slice(1, None, 2)
    about = index.about
    most = index._coarse.nlist if about.kind == "ivf" else 4096
    effort = 1 if about.kind == "ivf" else 16
    while True:
        about = About(about.kind, about.images, about.of, effort)
        index = Index(about, values, index._coarse)
        if effort >= most or _recall(index, queries[tried], drawn[tried], truth[tried], k) >= GOAL:
            break
        effort = min(most, effort * 2)
    recall = _recall(index, queries[told], drawn[told], truth[told], k)
    return Index(About(about.kind, about.images, about.of, effort, recall), values, index._coarse)


def _recall(index: Index, queries: Floats, rows: Indices, truth: Indices, k: int) -> float:
    """Share of each feature's k true neighbours that the index finds, itself left out."""
    found = index.search(queries, k + 1)[1]
    shares = [
        len((set(f.tolist()) & set(t.tolist())) - {row}) / max(1, len(set(t.tolist()) - {row}))
        for f, t, row in zip(found, truth, rows.tolist(), strict=True)
    ]
    return float(np.mean(shares))

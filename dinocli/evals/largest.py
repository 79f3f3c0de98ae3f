"""Largest cosines: the k rows with the largest cosine to each query, collected block by block."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinocli.core.tensors import Indices
from dinocli.evals.units import Floats

_COSINE_BYTES = 128 * 2**20  # of the cosines computed at once
_LEAST_QUERIES = 64  # for fewer, rounding the rows costs more than it saves
_WORTH = 64  # bfloat16 pays if at most one cosine in so many is computed again
_LARGEST_GROUP = 16
_ROWS_AT_ONCE = 8192  # of a matrix product; more no longer fit in the cache
_BITS = 2.0**-8  # largest relative error of rounding to bfloat16, which has 8 significant bits


class LargestCosines:
    """The k largest cosines of each query to the rows added so far.

    In float32 faiss searches each block.

    With `rounded`, all cosines are computed in bfloat16, and in float32 only those that may be among the k largest (see
    `Rounded`). The result is that of float32; cosines that differ by its rounding errors may swap places. A heap or a
    sort of all cosines costs as much as their computation. So columns are grouped, and a group is searched only if its
    maximum reaches a threshold: the k-th largest cosine so far, or at first the k-th largest maximum, which cannot
    exceed the k-th largest cosine.

    Args:
        queries: Queries of length 1 or 0. [Q, D]
        k: Number of rows to keep per query.
        rounded: True to compute in bfloat16 first. It pays where the processor multiplies bfloat16 fast.

    Attributes:
        cosines: Largest cosines, in descending order; -inf while fewer than k rows were added. [Q, k]
        rows: Their rows, or -1. [Q, k]
    """

    def __init__(self, queries: Floats, k: int, *, rounded: bool) -> None:
        self.cosines = np.full((len(queries), k), -np.inf, np.float32)
        self.rows = np.full((len(queries), k), -1, np.int64)
        self._queries, self._k = queries, k
        self._rounded = Rounded.of(queries) if rounded and len(queries) >= _LEAST_QUERIES else None
        self._memory = torch.empty(0, dtype=torch.uint8)  # of the cosines, reused: fresh memory costs page faults

    def add(self, rows: Floats, numbers: Indices) -> None:
        """Add a block of rows.

        Args:
            rows: Rows of length 1 or 0. [S, D]
            numbers: Numbers of these rows in the result. [S]
        """
        start = 0
        if self._rounded is not None and len(rows) > _WORTH * self._k:
            start = self._add_rounded(self._rounded, rows, numbers)
        if start < len(self._queries):
            rest, k = slice(start, None), min(self._k, len(rows))
            cosines, columns = faiss.knn(self._queries[rest], rows, k, metric=faiss.METRIC_INNER_PRODUCT)
            self._merge(rest, cosines, np.where(columns >= 0, numbers[columns], -1))

    def _add_rounded(self, queries: Rounded, rows: Floats, numbers: Indices) -> int:
        """Add a block of rows, and return the number of queries that have them."""
        rounded = Rounded.of(rows)
        error = queries.error(rounded)
        members = min(_LARGEST_GROUP, max(1, int((len(rows) / self._k) ** 0.5)))
        width = -(-len(rows) // members) * members
        step = max(1, _COSINE_BYTES // (4 * width))
        for start in range(0, len(queries.values), step):
            block = slice(start, start + step)
            found = self._search(block, queries.values[block], rows, rounded, error[block], members, width)
            if found is None:
                # The rows are too close together for bfloat16, and probably also to the other queries.
                self._rounded = None
                return start
            cosines, columns = found
            self._merge(block, cosines, np.where(columns >= 0, numbers[columns], -1))
        return len(queries.values)

    def _multiply(self, queries: Tensor, rows: Tensor, width: int) -> Tensor:
        """Return all products, padded with -inf. [q, D], [S, D] -> [q, width]"""
        size = len(queries) * width * queries.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        cosines = self._memory[:size].view(queries.dtype).view(len(queries), width)
        cosines[:, len(rows) :] = -torch.inf
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            some = slice(first, min(first + _ROWS_AT_ONCE, len(rows)))
            torch.mm(queries, rows[some].T, out=cosines[:, some])
        return cosines

    def _search(
        self,
        block: slice,
        queries: Tensor,
        rows: Floats,
        rounded: Rounded,
        error: NDArray[np.float64],
        members: int,
        width: int,
    ) -> tuple[Floats, Indices] | None:
        """Return candidates for the k largest and their columns, padded with -inf and -1. [q, c] each

        None if too many cosines are within the error bound.
        """
        cosines = self._multiply(queries, rounded.values, width)
        maxima = _maxima(cosines, members)
        least = self._threshold(block, maxima, error)
        if least is None:
            return None
        found = _find(cosines, maxima, _lowest_rounded(least, error), members, len(rows) // 8)
        if found is None or len(found[0]) > len(queries) * len(rows) // _WORTH:
            return None
        query, column, _ = found
        exact = np.empty(len(query), np.float32)
        pointers = (faiss.swig_ptr(a) for a in (self._queries[block], query, rows, column, exact))
        faiss.pairwise_indexed_inner_product(rows.shape[1], len(query), *pointers)  # type: ignore[attr-defined]  # SWIG
        keep = exact >= least[query]
        return _pad(query[keep], column[keep], exact[keep], len(queries))

    def _threshold(self, block: slice, maxima: Floats, error: NDArray[np.float64]) -> Floats | None:
        """Return the least cosine that can be among the k largest. None if there are too few rows to tell. [q]

        Args:
            block: Queries of the cosines.
            maxima: Maxima of groups of cosines. [q, G]
            error: Largest error of the maxima before their rounding to bfloat16. [q]
        """
        so_far = self.cosines[block, -1]
        if np.isfinite(so_far).all():
            return np.nextafter(so_far, np.float32(np.inf))  # equal ones change nothing
        groups = maxima.shape[1]
        if groups < self._k:
            return None
        kth = np.partition(maxima, groups - self._k, axis=1)[:, groups - self._k]
        return _round_down(kth - _BITS * np.abs(kth.astype(np.float64)) - error)

    def _merge(self, block: slice, cosines: Floats, rows: Indices) -> None:
        if np.isfinite(self.cosines[block, 0]).any():
            cosines = np.concatenate([self.cosines[block], cosines], 1)
            rows = np.concatenate([self.rows[block], rows], 1)
        best = torch.from_numpy(cosines).topk(min(self._k, cosines.shape[1]))
        kept = best.indices.shape[1]
        self.cosines[block, :kept] = best.values.numpy()
        self.rows[block, :kept] = np.take_along_axis(rows, best.indices.numpy(), 1)


@dataclass(frozen=True)
class Rounded:
    """Rows of length 1 or 0, rounded to bfloat16.

    Attributes:
        values: Rounded rows. [S, D], bfloat16
        residual: Upper bound of the length of each row's rounding error. [S]
    """

    values: Tensor
    residual: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Floats) -> Rounded:
        """Round rows, and measure the rounding errors."""
        values = torch.empty(rows.shape, dtype=torch.bfloat16)
        residual = np.empty(len(rows))
        step = max(1, 2**18 // rows.shape[1])  # numbers that fit in the cache
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            exact = torch.from_numpy(rows[some])
            values[some] = exact
            # The difference is exact: both numbers are within a factor of 2.
            residual[some] = torch.linalg.vector_norm(exact - values[some], dim=1).numpy()
        return cls(values, residual * (1 + _gamma(rows.shape[1])))  # the length has a relative error below gamma

    def error(self, rows: Rounded) -> NDArray[np.float64]:
        """Return an upper bound of each query's error over all rows, before a cosine is rounded to bfloat16. [Q]

        For a query x and a row y with rounded copies x' and y':

            x.y - x'.y' = (x - x').y + x'.(y - y')
            |x.y - x'.y'| <= |x - x'| |y| + |x'| |y - y'|             (Cauchy-Schwarz)

        Lengths of rounding errors are measured, so they are below the worst case of 2**-8 per row. A sum of D products
        in float32, in any order, has an error of at most gamma |x'| |y'| with gamma = D 2**-24 / (1 - D 2**-24) <=
        D 2**-23; products of two bfloat16 are exact in float32. The float32 cosine of a candidate has an error of
        at most gamma |x| |y|. Rows of length 1 have a length of at most 1 + gamma after rounding, and x' one of at most
        1 + gamma + |x - x'|. Finally, rounding the sum s to bfloat16 adds at most 2**-8 |s|; see `_lowest_rounded`.

        Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1.
        """
        gamma = _gamma(self.values.shape[1])
        length = 1 + gamma
        mine, theirs = self.residual, rows.residual.max(initial=0)
        sums = (length + mine) * (length + theirs) + length**2
        return mine * length + (length + mine) * theirs + gamma * sums


def _gamma(width: int) -> float:
    return width * 2.0**-23


def _lowest_rounded(least: Floats, error: NDArray[np.float64]) -> Floats:
    """Return the lowest bfloat16 cosine whose true value may be `least`. [q]

    A rounded sum r differs from the sum by at most 2**-8 |r|, so the true value is at most r + 2**-8 |r| + error.
    """
    rest = least - error
    return _round_down(rest / np.where(rest >= 0, 1 + _BITS, 1 - _BITS))


def _round_down(values: NDArray[np.float64]) -> Floats:
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _maxima(cosines: Tensor, members: int) -> Floats:
    """Return the maximum of each group of columns: group g has g, g + G, g + 2 G and so on. [q, G]"""
    return cosines.unflatten(1, (members, -1)).amax(1).float().numpy()


def _find(
    cosines: Tensor, maxima: Floats, least: Floats, members: int, most: int
) -> tuple[Indices, Indices, Floats] | None:
    """Return query, column and value of all cosines of at least a threshold, by query. [N] each

    None if a query has more than `most` of them.
    """
    groups = maxima.shape[1]
    query, group = np.divmod(np.flatnonzero(maxima >= least[:, None]), groups)
    if len(query) * members > cosines.numel() // 4:
        return None
    parts = cosines.unflatten(1, (members, -1))
    values = parts[torch.from_numpy(query), :, torch.from_numpy(group)].float().numpy()
    found, member = np.divmod(np.flatnonzero(values >= least[query, None]), members)
    query = query[found]
    if len(query) and np.bincount(query).max() > most:
        return None
    return query, group[found] + member * groups, values[found, member]


def _pad(query: Indices, columns: Indices, values: Floats, queries: int) -> tuple[Floats, Indices]:
    """Return one row per query with its values and columns, padded with -inf and -1. [q, c] each"""
    counts = np.bincount(query, minlength=queries)
    place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
    padded = np.full((queries, counts.max(initial=0)), -np.inf, np.float32)
    padded_columns = np.full(padded.shape, -1, np.int64)
    padded[query, place], padded_columns[query, place] = values, columns
    return padded, padded_columns

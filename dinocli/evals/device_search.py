"""Exact search for nearest neighbours on a device, such as a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dinocli.core.device import exactly, float32_products
from dinocli.core.errors import DinoError
from dinocli.core.resources import format_bytes, memory_of
from dinocli.core.tensors import Indices, Values
from dinocli.evals.nearest import bounded
from dinocli.evals.units import Floats, normalized

_BLOCK_BYTES = 512 * 2**20  # of the features and of the cosines computed at once
_LEAST_BYTES = 2**20  # of a block; if not even this fits, the search fails
_PARTS = 32  # blocks in the free memory: normalizing takes three of them, and equal cosines up to ten
_KEPT = 2  # the features stay on the device if they take at most one part in so many of its free memory


class DeviceSearch:
    """Exact search by cosine among features, as products in float32 on a device.

    The features are read in blocks, so they may be larger than the memory. If they fit into half of the device's free
    memory, they stay there for further searches. If memory runs out, the search starts again with blocks of half the
    size.

    Args:
        values: Features to search. [S, D]
        device: Device of the search.
    """

    def __init__(self, values: Values, device: torch.device) -> None:
        self._values, self._device = values, device
        free = memory_of(device)[0]
        self._bytes = min(_BLOCK_BYTES, max(_LEAST_BYTES, free // _PARTS))
        self._keeps = 4 * len(values) * values.shape[1] <= free // _KEPT
        self._kept: dict[int, Tensor] = {}

    def search(self, queries: Floats, k: int) -> tuple[Floats, Indices]:
        """Return the cosines and rows of each query's k nearest features, the nearest first. [Q, k] each

        As with `nearest`, rows equal to the query have a cosine of exactly 1, and equal cosines come in the order of
        their rows. If there are fewer than k features, the rest has the cosine -inf and the row -1. Queries and
        neighbours stay on the device during the search.

        Args:
            queries: Features to search for. [Q, D]
            k: Number of neighbours.

        Raises:
            DinoError: If the queries are not [Q, D], or the device's memory is too small.
        """
        width = self._values.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise DinoError(
                f"the queries have the shape {list(queries.shape)}; expected [Q, {width}], as wide as the features",
                "extract both with the same weights and --tokens",
            )
        while True:
            try:
                with torch.no_grad(), exactly(self._device), float32_products("float32"):
                    cosines, rows = self._search(queries, k)
                break
            except torch.OutOfMemoryError:
                full = self._bytes <= _LEAST_BYTES
            # Outside of the except clause, which still refers to the tensors.
            self._free()
            if full:
                free, total = (format_bytes(amount) for amount in memory_of(self._device))
                raise DinoError(
                    f"the memory of {self._device} is too small for {len(queries)} queries with {k} neighbours: "
                    f"{free} of {total} are free",
                    "use --device cpu",
                )
            self._bytes //= 2
        return bounded(self._values, queries, cosines, rows)

    def _free(self) -> None:
        self._kept.clear()
        self._keeps = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # a smaller block may not fit into the freed pieces

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the normalized rows of each block on the device."""
        step = max(1, self._bytes // (4 * self._values.shape[1]))
        for first in range(0, len(self._values), step):
            block = self._kept.get(first)
            if block is None:
                block = self._load(self._values[first : first + step])
                if self._keeps:
                    self._kept[first] = block
            yield first, block

    def _load(self, values: Floats) -> Tensor:
        # torch warns of memory that it could not write, such as a mapped file; "W" copies that.
        return normalized(torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(self._device))

    def _search(self, queries: Floats, k: int) -> tuple[Floats, Indices]:
        units = self._load(queries)
        cosines = torch.full((len(units), k), -torch.inf, device=self._device)
        rows = torch.full((len(units), k), -1, device=self._device)
        for first, block in self._blocks():
            step = max(1, self._bytes // (4 * len(block)))
            for start in range(0, len(units), step):
                some = slice(start, start + step)
                found, columns = _largest(units[some] @ block.T, k)
                # Rows of earlier blocks come first, so that the order of columns stays that of rows.
                together = torch.cat([cosines[some], found], 1)
                cosines[some], order = _largest(together, k)
                rows[some] = torch.cat([rows[some], columns + first], 1).gather(1, order)
        return cosines.cpu().numpy(), rows.cpu().numpy()


def _largest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines, or all if fewer, and their columns; equal ones in the order of columns.

    [q, S] -> [q, min(k, S)] each
    """
    best = cosines.topk(min(k + 1, cosines.shape[1]))  # one more shows whether equal ones compete for the last place
    columns = best.indices[:, :k]
    if best.values.shape[1] > k:
        tied = (best.values[:, k - 1] == best.values[:, k]).nonzero()[:, 0]
        if len(tied):  # topk keeps any of them
            columns[tied] = cosines[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(1).values
    values, order = cosines.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)

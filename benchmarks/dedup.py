"""Time, memory and recall of `dino dedup` for a million images, against a comparison of all pairs.

    python benchmarks/dedup.py [--features DIR] [--images 1000000] [--threshold T] [--queries 20000] [--planted 20000]

With --features, each feature is a real one plus a random combination of its differences to 16 nearest neighbours, so
local and global spread are real. Without, features are drawn around centers, as in benchmarks/search.py. Then --planted
features are replaced by near-duplicates of others. Their cosines are spread evenly over twice the distance of the
threshold to 1, and they lie in the direction of another feature. Without --threshold, it is the one that `dino dedup`
suggests: one image in a hundred has a neighbour this near before any is planted.

The full search compares --queries features with all others, block by block: half of them planted, half of them random.
The time of all pairs is derived from it. Seconds are processor time of one thread; "memory" is the peak of private
memory above the start.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table
from search import draw, peak

from dinocli.apps.search import dedup
from dinocli.core.tensors import Rows
from dinocli.evals.near_pairs import near_pairs
from dinocli.evals.nearest import Tile, nearest
from dinocli.evals.units import unit
from dinocli.features.gallery import open_gallery

NEIGHBOURS, BLOCK = 16, 10_000


def around(real: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yield blocks of random features around real ones. [10000, D]"""
    neighbours = nearest(real, real, NEIGHBOURS + 1)[1][:, 1:]
    generator = np.random.default_rng(0)
    for first in range(0, count, BLOCK):
        rows = generator.integers(0, len(real), min(BLOCK, count - first))
        weights = generator.standard_normal((len(rows), NEIGHBOURS), dtype=np.float32) * 0.5 * NEIGHBOURS**-0.5
        mixed = (1 - weights.sum(1, keepdims=True)) * real[rows]
        for k in range(NEIGHBOURS):
            mixed += weights[:, k : k + 1] * real[neighbours[rows, k]]
        yield mixed


def plant(values: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """Replace features by near-duplicates of others, at cosines around the threshold. Return their rows."""
    generator = np.random.default_rng(1)
    originals, copies, others = generator.permutation(len(values))[: 3 * count].reshape(3, count)
    x, away = unit(values[originals]).astype(np.float64), unit(values[others]).astype(np.float64)
    away -= (away * x).sum(1, keepdims=True) * x
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    cosines = 1 - 2 * (1 - threshold) * generator.random((count, 1))
    values[copies] = np.linalg.norm(values[originals], axis=1, keepdims=True) * (
        cosines * x + np.sqrt(1 - cosines**2) * away
    )
    return copies


def search_fully(values: np.ndarray, rows: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    """Compare some features with all others; return the pairs at the threshold."""
    queries, pairs = unit(values[rows]), []
    for first in range(0, len(values), 4096):
        block = unit(values[first : first + 4096])
        for top in range(0, len(rows), 4096):
            a, b = np.nonzero(queries[top : top + 4096] @ block.T >= threshold)
            pairs.append(np.sort(np.column_stack([rows[top + a], first + b]), axis=1))
    found = np.concatenate(pairs)
    return set(map(tuple, found[found[:, 0] < found[:, 1]].tolist()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384, help="of drawn features")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--planted", type=int, default=20_000)
    chosen = parser.parse_args()
    faiss.omp_set_num_threads(1)
    if chosen.features:
        blocks = around(open_gallery(Path(chosen.features)).values[:], chosen.images)
    else:
        blocks = (draw(min(BLOCK, chosen.images - i), chosen.width, i + 1) for i in range(0, chosen.images, BLOCK))
    values = np.concatenate([block.astype(np.float16) for block in blocks])  # as `dino extract --dtype float16` stores
    threshold = chosen.threshold or float(np.quantile(dedup.sample_best(Rows([values])), 0.99))
    planted = plant(values, chosen.planted, threshold)
    tiles: list[Tile] = []

    def recorded(*given) -> Iterator[Tile]:  # type: ignore[no-untyped-def]
        for tile in near_pairs(*given):
            tiles.append(tile)
            yield tile

    dedup.near_pairs = recorded
    with peak() as most:
        start = time.process_time()
        found = dedup.find_alike(Rows([values]), threshold)
        seconds = time.process_time() - start
    half = planted[: chosen.queries // 2]
    others = np.setdiff1d(np.random.default_rng(2).permutation(len(values))[: chosen.queries], half)
    rows = np.sort(np.concatenate([half, others[: chosen.queries - len(half)]]))
    start = time.process_time()
    truth = search_fully(values, rows, threshold)
    full = (time.process_time() - start) * len(values) / (2 * len(rows))
    pairs = {pair for tile in tiles for pair in zip(tile.first.tolist(), tile.second.tolist(), strict=True)}
    table = Table(
        "threshold", "pairs", "groups", "s", "s of all pairs", "times less", "memory, MB", "pairs of queries", "missed",
        title=f"{len(values)} x {values.shape[1]}, {chosen.planted} planted, {len(rows)} queries",
    )  # fmt: skip
    table.add_row(
        f"{threshold:.6f}", str(found.pairs), str(len(found.members)), f"{seconds:.0f}", f"{full:.0f}",
        f"{full / seconds:.1f}", f"{most[0]:.0f}", str(len(truth)), str(len(truth - pairs)),
    )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

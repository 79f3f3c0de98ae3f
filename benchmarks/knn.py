"""Seconds for k-NN classification with four values of k: the original's implementation and dinocli's.

    python benchmarks/knn.py [--voters 50000] [--queries 10000] [--width 384] [--threads 1 2] [--rounds 5] [--search]
                            [--device cuda]

The original searches again for each k, in chunks of a hundredth of the queries. It is reimplemented below: a matrix
product, top-k, gathered labels, a weighted sum of one-hot vectors, and a sort of all classes. The features are random
unit vectors around one center per class. Both implementations have them in memory; dinocli normalizes them once more,
as always. "faiss" is one exact search for the largest k with an IndexFlatIP, without votes; "search" is dinocli's, and
"search, float32" the same where bfloat16 is slow. All run in turn, round after round. The table shows the median of
the rounds, the ratio within each round by wall time and by processor time, and the peak memory above that of the
features. --search leaves out those with votes; then the ratios are to faiss. --device adds dinocli's search on that
device, with and without votes; copying the features to it counts as part of both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dinocli.core.device import pick_device
from dinocli.evals import nearest as module
from dinocli.evals.device_search import DeviceSearch
from dinocli.evals.knn import knn
from dinocli.evals.nearest import nearest
from dinocli.features.store import Features, Provenance

CLASSES = 1000  # hard-coded in the original
TEMPERATURE = 0.07


def drawn(images: int, width: int, seed: int) -> Features:
    """Return random unit features around the centers of their classes."""
    centers = np.random.default_rng(0).standard_normal((CLASSES, width), dtype=np.float32)
    generator = np.random.default_rng((1, seed))
    labels = generator.integers(0, CLASSES, images)
    values = 0.3 * centers[labels] + generator.standard_normal((images, width), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    provenance = Provenance("drawn", "", "cls", 1, 224, "drawn")
    return Features(values, labels, [], [str(c) for c in range(CLASSES)], {}, provenance)


@torch.no_grad()
def original(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int) -> tuple[float, float]:
    """Return top-1 and top-5 of the original's classifier, in percent."""
    chunk = len(test) // 100
    voters = train.t()
    first = five = 0
    for start in range(0, len(test), chunk):
        queries, truth = test[start : start + chunk], test_labels[start : start + chunk]
        similarities, found = torch.mm(queries, voters).topk(k, largest=True, sorted=True)
        labels = train_labels.view(1, -1).expand(len(queries), -1).gather(1, found)
        one_hot = torch.zeros(len(queries) * k, CLASSES).scatter_(1, labels.view(-1, 1), 1)
        weights = (similarities / TEMPERATURE).exp()
        sums = (one_hot.view(len(queries), k, CLASSES) * weights.view(len(queries), k, 1)).sum(1)
        right = sums.sort(1, descending=True).indices.eq(truth.view(-1, 1))
        first += int(right[:, :1].sum())
        five += int(right[:, : min(5, k)].sum())
    return 100 * first / len(test), 100 * five / len(test)


def search_by_faiss(train: Features, test: Features, k: int) -> list[float]:
    """Search once, without votes."""
    index = faiss.IndexFlatIP(test.values.shape[1])
    index.add(np.asarray(train.values))
    index.search(np.asarray(test.values), k)
    return []


def search_by_dinocli(train: Features, test: Features, k: int) -> list[float]:
    """Search once, without votes."""
    nearest(train.values, np.asarray(test.values), k)
    return []


def search_in_float32(train: Features, test: Features, k: int) -> list[float]:
    """Search once, without votes, as on a processor whose bfloat16 is slow."""
    with mock.patch.object(module, "multiplies_bfloat16_fast", lambda: False):
        return search_by_dinocli(train, test, k)


def search_on(device: torch.device, train: Features, test: Features, k: int) -> list[float]:
    """Search once on a device, without votes."""
    DeviceSearch(train.values, device).search(np.asarray(test.values), k)
    return []


class Cost(NamedTuple):
    """Cost of an implementation, and its top-1 in percent for each k."""

    wall: float
    processor: float
    megabytes: float
    top1: list[float]


def measure(way: Callable[[], list[float]]) -> Cost:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, so that the peak belongs to this run
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, processor = _read_status("VmRSS"), time.perf_counter(), time.process_time()
    top1 = way()
    took = time.perf_counter() - wall, time.process_time() - processor
    return Cost(*took, (_read_status("VmHWM") - before) / 1024, top1)


def _read_status(key: str) -> int:
    """Return a figure of this process in /proc/self/status, in kilobytes."""
    text = Path("/proc/self/status").read_text().split()
    return int(text[text.index(f"{key}:") + 1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voters", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--device")
    chosen = parser.parse_args()
    train, test = drawn(chosen.voters, chosen.width, 0), drawn(chosen.queries, chosen.width, 1)
    tensors = [torch.from_numpy(np.asarray(x)) for f in (train, test) for x in (f.values, f.labels)]
    ways: dict[str, Callable[[], list[float]]] = {
        "the original": lambda: [original(*tensors, k)[0] for k in chosen.k],
        "this": lambda: [score.top1 for score in knn(train, test, chosen.k, TEMPERATURE).scores],
        "faiss": lambda: search_by_faiss(train, test, max(chosen.k)),
        "search": lambda: search_by_dinocli(train, test, max(chosen.k)),
        "search, float32": lambda: search_in_float32(train, test, max(chosen.k)),
    }
    with_votes = ["the original", "this"]
    if chosen.device:
        device = pick_device(chosen.device)
        ways[f"this on {device}"] = lambda: [
            score.top1
            for score in knn(train, test, chosen.k, TEMPERATURE, DeviceSearch(train.values, device).search).scores
        ]
        ways[f"search on {device}"] = lambda: search_on(device, train, test, max(chosen.k))
        with_votes.append(f"this on {device}")
        ways[f"search on {device}"]()  # loads the device's libraries
    if chosen.search:
        ways = {name: way for name, way in ways.items() if name not in with_votes}
    base = next(iter(ways))
    table = Table(
        "threads", "way", "seconds", "processor s", f"times {base}", "by processor time", "MB above", "top-1 %",
        title=f"{chosen.voters} voters, {chosen.queries} queries, {chosen.width} wide, k = {chosen.k}, "
        f"median of {chosen.rounds}",
    )  # fmt: skip
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        rounds = [{name: measure(way) for name, way in ways.items()} for _ in range(chosen.rounds)]
        for name in ways:
            costs = [r[name] for r in rounds]
            ratios = []
            for part in ("wall", "processor"):
                quotients = sorted(getattr(r[base], part) / getattr(r[name], part) for r in rounds)
                ratios.append(f"{statistics.median(quotients):.2f} [{quotients[0]:.2f} .. {quotients[-1]:.2f}]")
            table.add_row(
                str(threads),
                name,
                f"{statistics.median(t.wall for t in costs):.2f}",
                f"{statistics.median(t.processor for t in costs):.2f}",
                *ratios,
                f"{max(t.megabytes for t in costs):.0f}",
                " ".join(f"{top1:.2f}" for top1 in costs[0].top1),
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

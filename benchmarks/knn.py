"""Seconds to classify by k nearest neighbours, for four k: the original's way, and this tool's.

    python benchmarks/knn.py [--voters 50000] [--queries 10000] [--width 384] [--threads 1 2] [--rounds 5]

The original searches anew for each k, in chunks of a hundredth of the queries; its way is written out below from what
it does: a matrix product, top-k, the labels gathered, a one-hot of each neighbour weighed and summed, all classes
sorted. The features are drawn: unit vectors around a center for each class. Both ways have them in memory; this tool
normalizes them once more, as it does any. They run in turn, round after round; what is printed is the median of the
rounds, the ratio within each round by the wall clock and by processor time, and the most memory above what the
features take.
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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dinocli.evals.knn import knn
from dinocli.features.store import Features, Provenance

CLASSES = 1000  # the original knows no other number
TEMPERATURE = 0.07


def drawn(images: int, width: int, seed: int) -> Features:
    """Unit features around the centers of their classes."""
    centers = np.random.default_rng(0).standard_normal((CLASSES, width), dtype=np.float32)
    generator = np.random.default_rng((1, seed))
    labels = generator.integers(0, CLASSES, images)
    values = 0.3 * centers[labels] + generator.standard_normal((images, width), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    provenance = Provenance("drawn", "", "cls", 1, 224, "drawn")
    return Features(values, labels, [], [str(c) for c in range(CLASSES)], {}, provenance)


@torch.no_grad()
def original(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int) -> tuple[float, float]:
    """Top-1 and top-5 as the original's classifier finds them, in percent."""
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


class Taken(NamedTuple):
    """What a way took, and what it found: for each k, percent of the queries."""

    wall: float
    processor: float
    megabytes: float
    top1: list[float]


def measured(way: Callable[[], list[float]]) -> Taken:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that the peak is this way's own
    Path("/proc/self/clear_refs").write_text("5")
    before, wall, processor = _status("VmRSS"), time.perf_counter(), time.process_time()
    top1 = way()
    took = time.perf_counter() - wall, time.process_time() - processor
    return Taken(*took, (_status("VmHWM") - before) / 1024, top1)


def _status(key: str) -> int:
    """Kilobytes that the system counts for this process."""
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
    chosen = parser.parse_args()
    train, test = drawn(chosen.voters, chosen.width, 0), drawn(chosen.queries, chosen.width, 1)
    tensors = [torch.from_numpy(np.asarray(x)) for f in (train, test) for x in (f.values, f.labels)]
    ways: dict[str, Callable[[], list[float]]] = {
        "the original": lambda: [original(*tensors, k)[0] for k in chosen.k],
        "this": lambda: [score.top1 for score in knn(train, test, chosen.k, TEMPERATURE).scores],
    }
    table = Table(
        "threads", "way", "seconds", "processor s", "times the original", "by processor time", "MB above", "top-1 %",
        title=f"{chosen.voters} voters, {chosen.queries} queries, {chosen.width} wide, k = {chosen.k}, "
        f"median of {chosen.rounds}",
    )  # fmt: skip
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        rounds = [{name: measured(way) for name, way in ways.items()} for _ in range(chosen.rounds)]
        for name in ways:
            mine = [r[name] for r in rounds]
            ratios = []
            for part in ("wall", "processor"):
                found = sorted(getattr(r["the original"], part) / getattr(r[name], part) for r in rounds)
                ratios.append(f"{statistics.median(found):.1f} [{found[0]:.1f} .. {found[-1]:.1f}]")
            table.add_row(
                str(threads),
                name,
                f"{statistics.median(t.wall for t in mine):.2f}",
                f"{statistics.median(t.processor for t in mine):.2f}",
                *ratios,
                f"{max(t.megabytes for t in mine):.0f}",
                " ".join(f"{top1:.2f}" for top1 in mine[0].top1),
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

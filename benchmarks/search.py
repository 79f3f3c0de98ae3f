"""Time, memory and recall of nearest-neighbour search: exact, IVF and HNSW.

    python benchmarks/search.py [--images 1000000] [--width 384] [--threads 1] [--kinds exact ivf hnsw] [--features DIR]

Without --features, random float16 features are written to a temporary folder. They lie around 5,000 centers, with a
standard deviation that falls from one dimension to the next, which gives them an effective dimension like that of real
features. Queries are further random features, or some of those of --features. The file is memory-mapped, as by
`dino search`. "memory" is the peak of the process's private memory above the start, without pages of the file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from dinocli.apps.search.index import open_index
from dinocli.evals.nearest import nearest
from dinocli.features.store import Provenance, read_features
from dinocli.features.writer import write_features

CENTERS, QUERIES, AT = 5000, 1000, 10


def draw(count: int, width: int, seed: int) -> np.ndarray:
    """Draw random features around centers. [count, width]"""
    spread = (1 + np.arange(width, dtype=np.float32)) ** -0.5
    centers = np.random.default_rng(0).standard_normal((CENTERS, width), dtype=np.float32)
    generator = np.random.default_rng((1, seed))
    noise = generator.standard_normal((count, width), dtype=np.float32)
    return (0.8 * centers[generator.integers(0, CENTERS, count)] + noise) * spread


def write(path: Path, images: int, width: int) -> Path:
    with write_features(path, Provenance("drawn", "0", "cls", 1, 224, "drawn"), [], dtype="float16") as writer:
        for first in range(0, images, 10_000):
            count = min(10_000, images - first)
            writer.append(draw(count, width, first + 1), [-1] * count, [str(first + i) for i in range(count)])
    return writer.place


@contextmanager
def peak() -> Iterator[list[float]]:
    """Yield a list with the peak of the process's private memory above the start, in megabytes."""

    def own() -> float:
        text = Path("/proc/self/status").read_text().split()
        return int(text[text.index("RssAnon:") + 1]) / 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory
    before, most, over = own(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], own() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=["exact", "ivf", "hnsw"])
    parser.add_argument("--features", type=Path)
    chosen = parser.parse_args()
    faiss.omp_set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        place = chosen.features or write(folder / "drawn.safetensors", chosen.images, chosen.width)
        values = read_features(place).values
        rows = np.sort(np.random.default_rng(2).choice(len(values), QUERIES, replace=False))
        queries = values[rows] if chosen.features else draw(QUERIES, chosen.width, 0)
        truth = nearest(values, queries, AT + 1)[1]
        table = Table(
            "index", "effort", "build s", "memory MB", "on disk MB", "open s", "one query ms", "1,000 queries s",
            "memory MB", "recall@10", "as told", title=f"{len(values)} x {values.shape[1]}, {chosen.threads} thread",
        )  # fmt: skip
        for kind in chosen.kinds:
            began = time.process_time()
            with peak() as building:
                open_index(values, kind, folder, "0")
            build = time.process_time() - began
            began = time.process_time()
            with peak() as asking:
                index = open_index(values, kind, folder, "0")
                opened = time.process_time() - began
                singles = []
                for query in queries[:5] if kind == "exact" else queries[:50]:
                    began = time.process_time()
                    index.search(query[None], AT)
                    singles.append(time.process_time() - began)
                began = time.process_time()
                found = index.search(queries, AT + 1)[1]
                many = time.process_time() - began
            # A query that is one of the features finds itself, which does not count.
            own = rows[:, None] if chosen.features else np.full((QUERIES, 1), -1)
            right = [
                len((set(f) & set(t)) - set(o)) / len(set(t) - set(o))
                for f, t, o in zip(found, truth, own, strict=True)
            ]
            stored = folder / f"index.{kind}" / "index.faiss"
            size = stored.stat().st_size / 1e6 if stored.exists() else 0
            table.add_row(
                kind, str(index.about.effort), f"{build:.0f}", f"{building[0]:.0f}", f"{size:.0f}", f"{opened:.2f}",
                f"{1000 * statistics.median(singles):.1f}", f"{many:.1f}", f"{asking[0]:.0f}", f"{np.mean(right):.3f}",
                f"{index.about.recall:.3f}",
            )  # fmt: skip
            Console(width=150, stderr=True).print(table)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

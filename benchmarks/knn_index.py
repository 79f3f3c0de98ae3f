"""Seconds, memory and recall of `dino knn --index ivf` against the exact search, by number of training images.

    python benchmarks/knn_index.py --features DIR [--images 100000 1000000] [--queries 1000] [--k 20]

The features are random ones around real ones, as in benchmarks/dedup.py. Seconds are processor time of one thread. Both
searches find the k nearest of the same queries; "found" is the share of the exact ones that IVF finds. "memory" is the
peak of private memory above the start, for building and for searching.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np
import torch
from dedup import around
from rich.console import Console
from rich.table import Table
from search import peak

from dinocli.apps.search.index import digest_of, open_index
from dinocli.core.tensors import Rows
from dinocli.evals.nearest import nearest
from dinocli.features.gallery import open_gallery


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=20)
    chosen = parser.parse_args()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    table = Table(
        "images", "build s", "memory, MB", "exact s", "ivf s", "times less", "memory, MB", "found", "as reported",
        title=f"{chosen.queries} queries, k = {chosen.k}",
    )  # fmt: skip
    real = open_gallery(Path(chosen.features)).values[:]
    for count in chosen.images:
        made = np.concatenate([block.astype(np.float16) for block in around(real, count + chosen.queries)])
        values, queries = Rows([made[: -chosen.queries]]), made[-chosen.queries :].astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            with peak() as building:
                start = time.process_time()
                index = open_index(values, "ivf", Path(folder), digest_of(values))
                built = time.process_time() - start
            start = time.process_time()
            truth = nearest(values, queries, chosen.k)[0]
            exact = time.process_time() - start
            with peak() as searching:
                start = time.process_time()
                cosines = index.search(queries, chosen.k)[0]
                seconds = time.process_time() - start
        found = float((cosines >= truth[:, -1:] - 1e-6).mean())
        table.add_row(
            f"{count:,}", f"{built:.0f}", f"{building[0]:.0f}", f"{exact:.1f}", f"{seconds:.1f}",
            f"{exact / seconds:.1f}", f"{searching[0]:.0f}", f"{found:.3f}", f"{index.about.recall:.3f}",
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

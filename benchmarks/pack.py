"""Processor time of a worker per image, from files, from the cache of decoded images, and from packed pixels.

    python benchmarks/pack.py PHOTOS [--images 256] [--rounds 12] [--sides 448 320 256]

Measured are the crops of 2x224 + 8x96 views, in this process and one thread. A worker of a GPU run only cuts
crops; one of a CPU run also makes the views (last column). The variants run in turn, round after round, and the ratios
are of one round, because other load changes both sides equally. The cache is filled, and the packed files are read,
before the first round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from dinocli.apps.pack import PIXELS_SIDE, pack
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import Images, open_images
from dinocli.method.preset import load_preset

BATCH = 32
DEVICES = ("meta", "cpu")


def reader(source: Images, cache: str | None = None, *, device: str) -> Callable[[int], float]:
    """Return a function that does a worker's part of some batches, and returns its processor seconds per image.

    Args:
        source: Images to read.
        cache: Cache of decoded images.
        device: `cpu` for crops and views. `meta` for crops alone: for every other device, views are made there.
    """
    preset = load_preset("vits16", ["views.locals=8"])
    batches = TrainBatches(
        source, preset.views, batch_size=BATCH, seed=0, images=preset.images, device=torch.device(device), cache=cache
    )
    slots = iter(batches._ring)

    def take(count: int) -> float:
        began = time.process_time()
        for _ in range(count):
            slot, _, _ = next(slots)
            batches._ring.release(slot)
        return (time.process_time() - began) / (count * BATCH)

    return take


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sides", type=int, nargs="+", default=[PIXELS_SIDE, 320, 256])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    source = open_images(chosen.photos)
    with tempfile.TemporaryDirectory() as scratch:
        sources: dict[str, tuple[Images, str | None]] = {"files": (source, None), "--cache ram": (source, "ram")}
        sizes = dict.fromkeys(sources, 0.0)
        for side in chosen.sides:
            name = f"--pixels --short-side {side}"
            sizes[name] = pack(source, Path(scratch) / str(side), side=side, pixels=True).bytes / len(source)
            sources[name] = open_images(f"{scratch}/{side}"), None
        variants = {
            (name, device): reader(*from_, device=device) for name, from_ in sources.items() for device in DEVICES
        }
        for take in variants.values():
            take(max(1, len(source) // BATCH))
        batches = max(1, chosen.images // BATCH)
        rounds = [{variant: take(batches) for variant, take in variants.items()} for _ in range(chosen.rounds)]
    table = Table("variant", "crops, ms per image", "relative to files", "MB per image", "crops and views, ms")
    for name in sources:
        ratios = sorted(each[name, "meta"] / each["files", "meta"] for each in rounds)
        spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
        size = f"{sizes[name] / 1e6:.2f}" if sizes[name] else ""
        crops, views = (f"{1000 * statistics.median(each[name, device] for each in rounds):.2f}" for device in DEVICES)
        table.add_row(name, crops, spread, size, views)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""Images per second and core, from files to views of 2x224 + 8x96: the original's pipeline and dinocli's.

    python benchmarks/data.py PHOTOS [--images 64] [--rounds 5] [--others FOLDER]

The methods run in turn, round after round, in one thread. The table shows the median processor time of the rounds, of
parent and workers together. It also shows ratios within each round: to the original as it runs, from files through its
DataLoader; to its ten pipelines alone, from bytes in memory without collating; to dinocli's own path in floats; and to
lightly-train. Other load on the machine changes both sides of a ratio equally.

With `--others`, also lightly-train's and torchcodec's, from the environment that `other_views.sh` makes. They start
from files and do not collate.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from other_views import WAYS
from PIL import Image, ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from dinocli.core.device import keep_freed_memory
from dinocli.data.loader import train
from dinocli.data.sources.open import open_images
from dinocli.method.preset import load_preset

ORIGINAL, PIPELINES = "the original, in its loader", "the original's pipelines alone"
FLOATS = "this, all on the CPU, in floats"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOCALS = 8
SIZES = ((224, (0.25, 1.0), 1.0, 0.0), (224, (0.25, 1.0), 0.1, 0.2)) + ((96, (0.05, 0.25), 0.5, 0.0),) * LOCALS


def original() -> list[Callable[[Image.Image], torch.Tensor]]:
    """Return the original's augmentations: ten pipelines of PIL operations, one per view."""

    def blur(chance: float) -> Callable[[Image.Image], Image.Image]:
        def apply(image: Image.Image) -> Image.Image:
            if random.random() > chance:
                return image
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

        return apply

    def solarize(chance: float) -> Callable[[Image.Image], Image.Image]:
        return lambda image: ImageOps.solarize(image) if random.random() < chance else image

    jitter = v1.Compose([v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v1.RandomGrayscale(p=0.2)])
    end = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])
    bicubic = v1.InterpolationMode.BICUBIC
    return [
        v1.Compose(
            [
                v1.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
                v1.RandomHorizontalFlip(),
                jitter,
                blur(blurred),
                *([solarize(solarized)] if solarized else []),
                end,
            ]
        )
        for size, scale, blurred, solarized in SIZES
    ]


class OriginalFiles(Dataset[tuple[list[torch.Tensor], int]]):
    """Data set that opens and decodes files as torchvision's ImageFolder does, then runs the original's pipelines."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.pipelines = files, original()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[list[torch.Tensor], int]:
        with self.files[row].open("rb") as file:
            image = Image.open(file).convert("RGB")
        return [p(image) for p in self.pipelines], 0


class OriginalLoader:
    """The original's DataLoader, whose worker processes collate and send batches."""

    def __init__(self, files: list[Path], batch: int) -> None:
        self.batches = DataLoader(
            OriginalFiles(files), batch_size=batch, shuffle=True, num_workers=1, persistent_workers=True, drop_last=True
        )

    def take(self) -> None:
        """Load one epoch; no batch is prefetched before it or for the next one."""
        for crops, _ in self.batches:
            assert len(crops) == len(SIZES)

    @property
    def processes(self) -> list[int]:
        return [p.pid for p in self.batches._iterator._workers]


def per_crop_v2() -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return the same augmentations with torchvision's v2 operations on uint8 tensors, one pipeline per view."""
    bicubic = v2.InterpolationMode.BICUBIC
    return [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=bicubic, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blurred),
                *([v2.RandomSolarize(128, p=solarized)] if solarized else []),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        for size, scale, blurred, solarized in SIZES
    ]


def processor_seconds(processes: list[int]) -> float:
    """Return the user and system time of this process and of running worker processes."""
    mine = os.times()
    tick = os.sysconf("SC_CLK_TCK")
    theirs = (Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split() for p in processes)
    return mine.user + mine.system + sum((int(s[11]) + int(s[12])) / tick for s in theirs)


def measure(work: Callable[[], None], processes: list[int] | None = None) -> float:
    began = wait_until_idle(processes or [])
    work()
    return wait_until_idle(processes or []) - began


def wait_until_idle(processes: list[int]) -> float:
    """Wait until the workers have filled the ring, so that no work is counted twice; return the processor time."""
    seconds = -1.0
    while seconds < (seconds := processor_seconds(processes)) and processes:
        time.sleep(0.2)
    return seconds


class Ours:
    """dinocli's loader: the workers' output only, or complete views.

    Views of a CPU are made in bytes by compiled C++, as for `dino pretrain`; in bytes by numpy, as where there is no
    compiler; or in floats, as a GPU makes them.
    """

    def __init__(
        self,
        folder: str,
        batch: int,
        device: str,
        *,
        whole: bool,
        workers: int,
        reduce_above: float = 2,
        way: Literal["compiled", "numpy", "floats"] = "compiled",
        on_device: bool = False,
    ) -> None:
        preset = load_preset("vits16", [f"views.locals={LOCALS}", f"images.reduce_above={reduce_above}"])
        with patch.object(train, "compile_library", lambda: None) if way == "numpy" else nullcontext():
            self.batches = train.TrainBatches(
                open_images(folder),
                preset.views,
                batch_size=batch,
                seed=0,
                images=preset.images,
                workers=workers,
                device=torch.device("meta" if way == "floats" else device),
                on_device=on_device,
            )
        self.batches._device = torch.device(device)
        self.whole, self.batch, self.device = whole, batch, device
        self.views = iter(self.batches)
        self.slots = iter(self.batches._ring)

    def take(self, images: int) -> None:
        for _ in range(images // self.batch):
            if self.whole:
                next(self.views)
            else:
                slot, _, _ = next(self.slots)
                self.batches._ring.release(slot)
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def processes(self) -> list[int]:
        return [p.pid for p in self.batches._ring._processes]


def other(folder: str, way: str, paths: list[Path]) -> Callable[[], float]:
    """Start another package in its environment; return a function that makes all views there."""
    script = Path(__file__).with_name("other_views.py")
    process = subprocess.Popen(
        [str(Path(folder) / "bin/python"), str(script), way, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )

    def measure_there() -> float:
        assert process.stdin and process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    measure_there()  # imports and warms up
    return measure_there


def ways(folder: str, images: int, batch: int, others: str | None) -> dict[str, Callable[[], float]]:
    """Return one function per method, which makes the views of `images` images and returns its processor seconds."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()][:images]
    files = [path.read_bytes() for path in paths]
    rgb = [np.array(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]

    def by_original() -> None:
        pipelines = original()
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            torch.stack([p(image) for p in pipelines[:2]])
            torch.stack([p(image) for p in pipelines[2:]])

    def by_v2() -> None:
        pipelines = per_crop_v2()
        for data in files:
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
            torch.stack([p(image) for p in pipelines[:2]])
            torch.stack([p(image) for p in pipelines[2:]])

    def ours(**options: object) -> Callable[[], float]:
        loader = Ours(folder, batch, **options)  # type: ignore[arg-type]
        loader.take(2 * batch)  # fills the ring and compiles
        count = images // batch * batch
        return lambda: measure(lambda: loader.take(count), loader.processes) * len(rgb) / count

    def in_its_loader() -> Callable[[], float]:
        loader = OriginalLoader(paths, batch)
        loader.take()  # starts the workers
        return lambda: measure(loader.take, loader.processes) * len(rgb) / (len(paths) // batch * batch)

    found = {
        ORIGINAL: in_its_loader(),
        PIPELINES: lambda: measure(by_original),
        "torchvision v2's pipelines alone": lambda: measure(by_v2),
        # Batches for any device but a CPU: here the workers' part is all that runs.
        "this, workers only (the rest on a GPU)": ours(device="meta", whole=False, workers=1),
        "this, workers only, no photo decoded smaller": ours(device="meta", whole=False, workers=1, reduce_above=1e6),
        "this, workers only, JPEGs decoded on a GPU": ours(device="meta", whole=False, workers=1, on_device=True),
        "this, all on the CPU": ours(device="cpu", whole=True, workers=0),
        "this, all on the CPU, without a compiler": ours(device="cpu", whole=True, workers=0, way="numpy"),
        FLOATS: ours(device="cpu", whole=True, workers=0, way="floats"),
    }
    for way, name in WAYS.items() if others else ():
        found[name] = other(str(others), way, paths)
    if torch.cuda.is_available():
        found["this, the host's part beside a GPU"] = ours(device="cuda", whole=True, workers=1)
        found["this, the host's part beside a GPU that decodes"] = ours(
            device="cuda", whole=True, workers=1, on_device=True
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", help="folder of the environment of other_views.sh")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as `dino pretrain` does
    warnings.simplefilter("ignore")
    measured = ways(chosen.photos, chosen.images, min(32, chosen.images), chosen.others)
    rounds = [{name: way() for name, way in measured.items()} for _ in range(chosen.rounds)]
    bases = {ORIGINAL: "the original", PIPELINES: "its pipelines", FLOATS: "floats"}
    bases |= {WAYS["lightly-train"]: "lightly-train"} if chosen.others else {}
    table = Table("way", "ms an image", "images/s a core", *(f"times {short}" for short in bases.values()))
    for name in measured:
        each = statistics.median(r[name] for r in rounds) / chosen.images
        spreads = []
        for base in bases:
            ratios = sorted(r[base] / r[name] for r in rounds)
            spreads.append(f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]")
        table.add_row(name, f"{1000 * each:.2f}", f"{1 / each:.0f}", *spreads)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()

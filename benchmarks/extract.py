"""Images per second from files to features on disk: the original's loop and dinocli's; and the cost of writing them.

    python benchmarks/extract.py PHOTOS [--images 64] [--rounds 5] [--device auto] [--rows 1000000]

The original's loop is that of its evaluation: Pillow resizes to 256 and crops the central 224 pixels, the network runs
in float32 on all tokens, and the features of all images stay in memory. The methods run in turn, round after round. On
a CPU with one thread and no workers, the table shows processor time, else wall time. The smallest cosine of an image to
its float32 features shows the loss of precision. "Decoding alone" is the lower bound for a fast device.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dinocli.core.device import has_bfloat16, pick_device
from dinocli.data.sources.listing import Names
from dinocli.data.sources.open import Images, open_images
from dinocli.features.encoder import Encoder, quick
from dinocli.features.extract import extract
from dinocli.features.store import Provenance, read_features
from dinocli.features.writer import write_features
from dinocli.models.architecture import BackboneConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Data set that reads photos as the original's evaluation does."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        bicubic = transforms.InterpolationMode.BICUBIC
        self.pipeline = transforms.Compose(
            [
                transforms.Resize(256, interpolation=bicubic),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with self.files[row].open("rb") as file:
            return self.pipeline(Image.open(file).convert("RGB")), row


@torch.no_grad()
def original(encoder: Encoder, files: list[Path], batch: int, workers: int) -> NDArray[np.float32]:
    """Run the original's loop: all tokens through all blocks, in float32, into one array."""
    model = encoder.backbone.model  # timm's own forward, which computes the last block for all tokens
    features = torch.zeros(len(files), encoder.backbone.width)
    loader = DataLoader(Files(files), batch_size=batch, num_workers=workers, pin_memory=encoder.device.type == "cuda")
    for images, rows in loader:
        features.index_copy_(0, rows, model.forward_features(images.to(encoder.device))[:, 0].cpu())
    return features.numpy()


def ours(encoder: Encoder, source: Images, out: Path, batch: int, workers: int) -> NDArray[np.float32]:
    """Extract with dinocli to a file, and read it."""
    extract(encoder, source, out, data="x", size=224, batch_size=batch, workers=workers)
    return np.asarray(read_features(out).values)


def decode_all(encoder: Encoder, source: Images, batch: int, workers: int) -> None:
    """Decode all batches without running the network."""
    for _ in encoder.batches(source, size=224, batch_size=batch, workers=workers):
        pass


def untrained_encoder(name: str, device: torch.device) -> Encoder:
    """Return an encoder with random weights."""
    torch.manual_seed(0)
    backbone = BackboneConfig(name=name, positions="dino").build(drop_path=False).eval().requires_grad_(False)
    return Encoder(backbone.to(device), name, "", 224, MEAN, STD)


def measure_writing(rows: int) -> tuple[float, float, float]:
    """Write float16 features; return the seconds, the additional memory in MB, and the size on disk in MB."""
    values = np.random.default_rng(0).standard_normal((1000, 384), dtype=np.float32)
    labels, provenance = [0] * len(values), Provenance("x", "", "cls", 1, 224, "x")
    with tempfile.TemporaryDirectory() as folder:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with write_features(Path(folder) / "train.safetensors", provenance, ["x"], dtype="float16") as writer:
            for start in range(0, rows, len(values)):
                writer.append(values, labels, [f"{i:09}.jpg" for i in range(start, start + len(values))])
        seconds = time.process_time() - began
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, size / 2**20


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos")
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=1_000_000, help="features to write; 0 for none")
    chosen = parser.parse_args()
    console, device = Console(width=150), pick_device(chosen.device)
    if chosen.rows:  # first, while the process is small
        seconds, above, size = measure_writing(chosen.rows)
        console.print(f"{chosen.rows} x 384 float16: {seconds:.2f} s, {above:.0f} MB of memory, {size:.0f} MB on disk")
    torch.set_num_threads(chosen.threads)
    source = open_images(chosen.photos)
    names = [source.names[i] for i in range(min(chosen.images, len(source)))]
    source = replace(source, names=Names.of(names), labels=source.labels[: len(names)])
    files = [source.root / name for name in names]
    batch, workers = chosen.batch_size, chosen.workers
    plain = untrained_encoder(chosen.backbone, device)
    coarse = quick(untrained_encoder(chosen.backbone, device), "bfloat16", compiled=False)
    swift = quick(untrained_encoder(chosen.backbone, device), "bfloat16", compiled=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "train.safetensors"
        ways: dict[str, Callable[[], NDArray[np.float32] | None]] = {
            "the original's loop, float32": lambda: original(plain, files, batch, workers),
            "this, float32": lambda: ours(plain, source, out, batch, workers),
            "this, bfloat16": lambda: ours(coarse, source, out, batch, workers),
            "this, bfloat16, compiled": lambda: ours(swift, source, out, batch, workers),
            "decoding alone": lambda: decode_all(plain, source, batch, workers),
        }
        found = {name: way() for name, way in ways.items()}  # this run also compiles
        clock = time.process_time if device.type == "cpu" and not workers else time.perf_counter
        rounds: list[dict[str, float]] = []
        for _ in range(chosen.rounds):
            rounds.append({})
            for name, way in ways.items():
                began = clock()
                way()
                rounds[-1][name] = clock() - began
    exact = found["this, float32"]
    assert exact is not None
    table = Table("way", "ms an image", "images/s", "times the original", "least cosine to float32", "median")
    for name in ways:
        taken = statistics.median(r[name] for r in rounds) / len(files)
        ratios = sorted(r["the original's loop, float32"] / r[name] for r in rounds)
        values = found[name]
        near = ["", ""]
        if values is not None:
            cosines = (values * exact).sum(1) / np.linalg.norm(values, axis=1) / np.linalg.norm(exact, axis=1)
            near = [f"{cosines.min():.5f}", f"{np.median(cosines):.5f}"]
        ratio = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]"
        table.add_row(name, f"{1000 * taken:.2f}", f"{1 / taken:.1f}", ratio, *near)
    console.print(table)
    kind = "processor time" if clock is time.process_time else "time"
    console.print(
        f"{chosen.backbone} on {device}, {len(files)} images in batches of {batch}, {workers} workers, "
        f"{chosen.threads} threads, {kind}, median of {chosen.rounds}; bfloat16 products: {has_bfloat16(device)}; "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()

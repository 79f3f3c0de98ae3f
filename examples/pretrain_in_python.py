"""Pretrain from Python: on images in memory, with a callback; and the same crops in a training loop of your own.

    python examples/pretrain_in_python.py [STEPS]

The images are drawn discs and squares. A path, a list of paths, Pillow images, or a torch data set work as well.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import dinocli
from dinocli.train.logger import Progress
from dinocli.train.pretrain import Run


def draw(count: int = 24) -> NDArray[np.uint8]:
    """Draw red discs and blue squares, alternating. [count, 64, 64, 3]"""
    rows, columns = np.mgrid[:64, :64]
    images = np.full((count, 64, 64, 3), 255, dtype=np.uint8)
    for i, (x, y) in enumerate(np.random.default_rng(0).integers(20, 44, (count, 2))):
        far = np.maximum(abs(rows - y), abs(columns - x)) if i % 2 else np.hypot(rows - y, columns - x)
        images[i, far < 15] = (0, 0, 255) if i % 2 else (255, 0, 0)
    return images


class Drawings(Dataset[list[Tensor]]):
    """Crops of each drawing, as a data set of torch."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images, self.transform = images, dinocli.views("tiny")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def print_loss(progress: Progress) -> None:
    """Print the loss of a logged step."""
    print(f"step {progress.step}: loss {progress.loss:.2f}")


def main(folder: Path, steps: int = 20) -> tuple[Run, list[torch.Size]]:
    """Pretrain a small network, then print the shapes of one batch of views; return both."""
    images = draw()
    run = dinocli.pretrain(
        images,
        "tiny",
        out=folder / "run",
        batch_size=8,
        steps=steps,
        callbacks=[print_loss],
        optimizer={"lr": {"warmup_epochs": 0}},  # settings by key, as for --set
    )
    encoder = dinocli.load(run.checkpoint)
    print(f"features of {encoder(images).shape[1]} numbers in {run.checkpoint}")

    # Your own loop, or that of another library: the crops are a transform.
    views = next(iter(DataLoader(Drawings(images), batch_size=8)))  # V batches [B, C, H, W]
    print("views", *(tuple(view.shape) for view in views))
    return run, [view.shape for view in views]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 20)

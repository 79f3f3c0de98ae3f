"""Features, nearest neighbours and attention maps from Python.

    python examples/features_in_python.py [CHECKPOINT]

CHECKPOINT is a run folder, a ckpt.safetensors, an official .pth or timm:NAME. Without it, the script first writes an
untrained `tiny` network, which takes seconds and needs no downloads.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch.nn.functional import normalize

import dinocli


def draw(folder: Path, count: int = 12) -> list[Path]:
    """Draw red discs and blue squares, alternating, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        image = Image.new("RGB", (64, 64), "white")
        left, top = generator.integers(4, 28, 2).tolist()
        pen, box = ImageDraw.Draw(image), (left, top, left + 30, top + 30)
        pen.rectangle(box, fill="blue") if i % 2 else pen.ellipse(box, fill="red")
        paths.append(folder / f"{'square' if i % 2 else 'disc'}-{i:02}.png")
        image.save(paths[-1])
    return paths


def untrained(folder: Path) -> Path:
    """Write an untrained network, as `dino pretrain --steps 0` does."""
    run = folder / "run"
    command = ["pretrain", str(folder / "photos"), "--preset", "tiny", "--batch-size", "4", "--steps", "0"]
    subprocess.run(
        [sys.executable, "-m", "dinocli", *command, "--device", "cpu", "--out", str(run)], check=True, cwd=folder
    )
    return run


def main(folder: Path, checkpoint: str | None = None) -> list[str]:
    """Print the nearest neighbour of each image; return the names of these neighbours."""
    paths = draw(folder / "photos")
    encoder = dinocli.load(checkpoint or str(untrained(folder)), device="cpu")

    # One feature per image: paths, Pillow images and arrays all work, alone or in a list.
    features = encoder(paths)  # [S, D]
    print(f"{len(features)} features of {features.shape[1]} numbers")

    # Nearest neighbours by cosine similarity.
    unit = normalize(features, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1).tolist()
    for path, i in zip(paths, nearest, strict=True):
        print(f"{path.name} -> {paths[i].name}")

    # The same for patches, and attention maps of each head.
    patches = encoder(paths[:1], tokens="patches")  # [1, N, D]
    maps = dinocli.attention(encoder, paths[0])  # maps.heads: [heads, rows, columns]
    print(f"patches {tuple(patches.shape)}, attention {tuple(maps.heads.shape)}")
    return [paths[i].name for i in nearest]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), sys.argv[1] if len(sys.argv) > 1 else None)

"""Features on a Ray cluster: CPU tasks decode the photos, and actors on GPUs compute the features.

    pip install "ray[data]"
    python examples/ray_data.py [CHECKPOINT PHOTOS]

Without arguments, the script draws photos and writes an untrained `tiny` network, which takes seconds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from features_in_python import draw, untrained
from ray.data import ActorPoolStrategy

import dinocli
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.views.augment import normalize
from dinocli.data.views.crops import resize_and_center, resize_for

Columns = dict[str, Any]


def decoded(batch: Columns, size: int) -> Columns:
    """Decode files as `dino extract` does, in a task without a GPU; skip those that are not images.

    Returns:
        `path`, and `pixels` in uint8. [B, 3, size, size]
    """
    read = [(path, decode(data)) for path, data in zip(batch["path"], batch["bytes"], strict=True)]
    good = [(path, pixels) for path, pixels in read if not isinstance(pixels, BadImage)]
    crops = [resize_and_center(pixels, resize_for(size), size).numpy() for _, pixels in good]
    pixels = np.array(crops, np.uint8).reshape(-1, 3, size, size)  # also without any image
    return {"path": np.array([path for path, _ in good]), "pixels": pixels}


class Extractor:
    """An encoder that stays loaded in an actor, for many batches."""

    def __init__(self, checkpoint: str, device: str) -> None:
        self.encoder = dinocli.load(checkpoint, device=device)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (self.encoder.mean, self.encoder.std))

    def __call__(self, batch: Columns) -> Columns:
        """Return `path`, and `features` in float32. [B, D]"""
        pixels = torch.from_numpy(np.array(batch["pixels"])).to(self.encoder.device)
        images = normalize(pixels.float() / 255, self.mean, self.std)
        return {"path": batch["path"], "features": self.encoder.features(images).float().cpu().numpy()}


def extract(checkpoint: str, photos: list[str], actors: int = 1, gpus: int = 0) -> ray.data.Dataset:
    """Return the features of photos, computed when the result is read or written.

    Args:
        checkpoint: Weights, in a place that all machines see.
        photos: Files or folders, in such a place or at an address that Ray reads, such as s3://.
        actors: Number of encoders.
        gpus: GPUs per encoder; 0 computes on CPUs.
    """
    size = dinocli.load(checkpoint, device="cpu").size
    files = ray.data.read_binary_files(photos, include_paths=True)
    pixels = files.map_batches(decoded, fn_kwargs={"size": size}, batch_size=64)
    return pixels.map_batches(
        Extractor,
        fn_constructor_args=(checkpoint, "cuda" if gpus else "cpu"),
        batch_size=256,
        compute=ActorPoolStrategy(size=actors),
        num_gpus=gpus,
    )


def main(folder: Path, checkpoint: str | None = None, photos: str | None = None) -> dict[str, np.ndarray]:
    """Write the features to Parquet files; return them by path."""
    draw(folder / "photos")
    checkpoint = checkpoint or str(untrained(folder))
    dataset = extract(checkpoint, [photos or str(folder / "photos")], gpus=int(torch.cuda.is_available()))
    dataset.write_parquet(str(folder / "features"))
    rows = ray.data.read_parquet(str(folder / "features")).take_all()
    print(f"{len(rows)} features of {len(rows[0]['features'])} numbers, in Parquet files")
    return {row["path"]: np.asarray(row["features"]) for row in rows}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), *sys.argv[1:3])

"""Largest differences, in levels of 255, between dinocli's crops, Pillow's and a resize in float64.

    python benchmarks/crops.py PHOTOS [--images 200] [--preset vits16]

Crops are those of the preset's views in the first epoch. Pillow is the installed version. To compare another one:

    pip install --no-deps --target pillow12 pillow==12.3.0
    PYTHONPATH=pillow12 python benchmarks/crops.py PHOTOS
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dinocli.data.views.crops import Box, crop_boxes, crop_tries, cut, uniforms
from dinocli.method.preset import load_preset

_LIMIT = 2


def resize_exactly(pixels: np.ndarray, box: Box, size: int) -> Tensor:
    """Cut and resize in float64, clipped to [0, 255] after each pass. [3, size, size]"""
    top, left, height, width = box
    image = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)[None].double()
    for shape in ((height, size), (size, size)):
        image = torch.nn.functional.interpolate(image, shape, mode="bicubic", antialias=True).clamp(0, 255)
    return image[0]


def resize_by_pillow(photo: Image.Image, box: Box, size: int) -> Tensor:
    """Cut and resize as the original does. [3, size, size], uint8"""
    top, left, height, width = box
    crop = photo.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--preset", default="vits16")
    chosen = parser.parse_args()
    views = load_preset(chosen.preset).views.all
    scale = np.array([view.scale for view in views])
    found = defaultdict(list)
    paths = sorted(path for path in chosen.photos.rglob("*") if path.is_file())[: chosen.images]
    for index, path in enumerate(paths):
        photo = Image.open(path).convert("RGB")
        pixels = np.array(photo)
        numbers, _ = uniforms(seed=0, epoch=0, index=index, views=len(views))
        boxes = crop_boxes(crop_tries(numbers[None], scale)[0], *pixels.shape[:2])
        for view, box in zip(views, boxes, strict=True):
            ours, pillows = cut(pixels, box, (view.size, view.size)).double(), resize_by_pillow(photo, box, view.size)
            exact = resize_exactly(pixels, box, view.size)
            found["dinocli and Pillow"].append((ours - pillows).abs().max().item())
            found["dinocli and float64"].append((ours - exact).abs().max().item())
            found["Pillow and float64"].append((pillows - exact).abs().max().item())
    table = Table(
        "difference of",
        "crops",
        "largest",
        f"crops above {_LIMIT}",
        title=f"Pillow {PIL.__version__}, torch {torch.__version__}",
    )
    for pair, levels in found.items():
        table.add_row(pair, f"{len(levels):,}", f"{max(levels):.2f}", str(sum(each > _LIMIT for each in levels)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

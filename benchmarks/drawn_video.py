"""Draw a video for `dino track`: two objects of the demo's set cross, turn and grow before a drifting background.

    python benchmarks/drawn_video.py OUT [--frames 32]

writes `OUT/frames/00.png ...` and `OUT/masks/00.png ...`, whose palette distinguishes the two objects.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

from dinocli.apps.demo.drawings import Drawing, draw, scene
from dinocli.data.sources.label_maps import LabelMap, write_labels

WIDTH, HEIGHT, SIDE = 432, 240, 240
PALETTE = bytes([0, 0, 0, 230, 60, 60, 50, 140, 240]) + bytes(759)


def draw_inside(kind: int, skip: int = 0) -> Drawing:
    """Return a drawing of a class whose object does not touch the border."""
    inside = (draw(index, SIDE, seed=5) for index in range(kind, 1000, 10))
    fitting = [d for d, _ in zip((d for d in inside if not _touches(d)), range(skip + 1), strict=False)]
    return fitting[skip]


def _touches(d: Drawing) -> bool:
    return bool(d.mask[[0, -1]].any() or d.mask[:, [0, -1]].any())


def lay(
    page: Image.Image,
    labels: Image.Image,
    thing: Drawing,
    number: int,
    at: tuple[float, float],
    turn: float,
    size: float,
) -> None:
    """Paste an object onto a page and its number onto the labels, rotated by `turn` degrees and `size` pixels wide."""
    side = round(size)
    shape = Image.fromarray(thing.mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BILINEAR)
    shape = shape.rotate(turn, Image.Resampling.BILINEAR)
    picture = Image.fromarray(thing.image).resize((side, side), Image.Resampling.LANCZOS)
    place = round(at[0] - side / 2), round(at[1] - side / 2)
    page.paste(picture.rotate(turn, Image.Resampling.BICUBIC), place, shape)
    labels.paste(number, place, shape.point(lambda value: 255 * (value > 127)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--kinds", type=int, nargs=2, default=[7, 1])
    options = parser.parse_args()
    background = Image.fromarray((np.clip(scene(600, np.random.default_rng(3)), 0, 1) * 255).astype(np.uint8))
    first, second = (draw_inside(kind) for kind in options.kinds)
    for i in range(options.frames):
        t = i / (options.frames - 1)
        left = 40 + 60 * t
        page = background.crop((round(left), 150, round(left) + WIDTH, 150 + HEIGHT))
        labels = Image.new("L", page.size)
        lay(page, labels, second, 2, (350 - 280 * t, 90 + 60 * math.sin(math.pi * t)), -50 * t, 150 + 30 * t)
        lay(page, labels, first, 1, (90 + 250 * t, 150 - 40 * math.sin(math.pi * t)), 60 * t, 170 - 20 * t)
        (options.out / "frames").mkdir(parents=True, exist_ok=True)
        page.save(options.out / "frames" / f"{i:02}.png")
        write_labels(options.out / "masks" / f"{i:02}.png", LabelMap(np.asarray(labels), PALETTE))


if __name__ == "__main__":
    main()

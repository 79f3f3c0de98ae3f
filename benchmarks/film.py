"""Draw the frames of the README's film: a goldfish swims across a background.

python benchmarks/film.py frames && dino attn-map frames --film strip
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dinocli.apps.demo.drawings import CLASSES, draw, scene

SIDE, FRAMES = 160, 48
FISH, SEED = 271, 0  # the first goldfish that lies completely inside its picture


def main(folder: Path) -> None:
    """Write the frames."""
    folder.mkdir(parents=True, exist_ok=True)
    thing = draw(FISH, size=128, seed=SEED)
    assert CLASSES[thing.label] == "goldfish"
    # It faces left, but swims to the right.
    alpha = Image.fromarray((thing.mask[:, ::-1] * 255).astype(np.uint8))
    fish = Image.fromarray(thing.image[:, ::-1])
    water = Image.fromarray((scene(SIDE * 2, np.random.default_rng(SEED)) * 255).astype(np.uint8))
    for i in range(FRAMES):
        turn = i / (FRAMES - 1)
        # The camera follows slowly, so that the scene moves too.
        frame = water.crop((round(40 * turn), 40, round(40 * turn) + 2 * SIDE - 40, 40 + SIDE)).copy()
        place = round((frame.width + 60) * turn - 100), round(16 + 16 * math.sin(2 * math.pi * turn))
        angle = 12 * math.sin(6 * math.pi * turn)
        frame.paste(fish.rotate(angle), place, alpha.rotate(angle))
        frame.save(folder / f"{i:02}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

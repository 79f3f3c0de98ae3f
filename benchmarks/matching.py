"""Accuracy of patch matching between photos: 68 landmarks on faces, and a wall under a homography.

    python benchmarks/matching.py DATA CHECKPOINT... [--size 240] [--layer -1] [--facet token] [--pairs 500]

DATA holds `faces69/face_landmarks.csv` with its photos, `graf1.png`, `graf3.png` and `H1to3p.xml`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from dinocli.apps.match.correspond import PatchMap, match, mean_pck, pck
from dinocli.apps.match.keypoints import landmarks, read_keypoints
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage, Pixels
from dinocli.evals.units import normalized
from dinocli.features.encoder import Encoder
from dinocli.weights.load import load_encoder


def read(path: Path) -> Pixels:
    pixels = decode(path.read_bytes())
    assert not isinstance(pixels, BadImage), path
    return pixels


def encode_photo(encoder: Encoder, pixels: Pixels, options: argparse.Namespace) -> PatchMap:
    patches = encoder.patches(encoder.photo(pixels, options.size), options.layer or [-1], options.facet)[0]
    return PatchMap(normalized(patches), pixels.shape[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--size", type=int, default=240)
    parser.add_argument("--layer", type=int, action="append")
    parser.add_argument("--facet", default="token")
    parser.add_argument("--pairs", type=int, default=500)
    options = parser.parse_args()
    faces = landmarks(options.data / "faces69" / "face_landmarks.csv")
    names = [name for name in faces if (options.data / "faces69" / name).is_file()]
    pairs = [(a, b) for a in names for b in names if a != b]
    np.random.default_rng(0).shuffle(pairs)
    wall = options.data / "graf1.png", options.data / "graf3.png"
    print(f"{options.pairs} pairs of {len(names)} faces (near: of the box), and graf1, graf3 (of the image); {options}")
    for checkpoint in options.checkpoints:
        encoder = load_encoder(checkpoint, torch.device("cpu"))
        maps = {name: encode_photo(encoder, read(options.data / "faces69" / name), options) for name in names}
        scores = [pck(maps[a], maps[b], match(maps[a], maps[b]), faces[a], faces[b]) for a, b in pairs[: options.pairs]]
        a, b = (encode_photo(encoder, read(path), options) for path in wall)
        points = read_keypoints(options.data / "H1to3p.xml", *wall, (a.size, b.size))
        for name, rows in (("faces", mean_pck(scores)), ("graf", pck(a, b, match(a, b), *points, "image"))):
            for row in rows:
                beside = f"same place {row.same_place:.1f}, chance {row.chance:.1f}"
                print(f"{checkpoint} {name} {row.alpha}: {row.found:.1f}; {beside}")


if __name__ == "__main__":
    main()

"""Detection of other kinds: one drawn kind of the demo is normal, and the test images of the nine others are defects.

    dino demo && python benchmarks/anomaly.py dino-demo

Prints the AUROC of images and of pixels for each kind, with the trained network and with its untrained twin. The masks
of the drawings count as defects, except in images of the normal kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dinocli.apps.anomaly.bank import BankSettings
from dinocli.apps.anomaly.detect import build, detect
from dinocli.apps.anomaly.evaluate import evaluate, read_truth
from dinocli.data.sources.open import image_folder, photos
from dinocli.data.sources.photos import named_photos
from dinocli.evals.attention import default_size
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.load import load_encoder, untrained_encoder


def main(demo: Path, area: float = 0.05) -> None:
    checkpoint, device = demo / "run" / "ckpt.safetensors", torch.device("cpu")
    test = demo / "data" / "val"
    names = {str(path): name for path, name in named_photos([test]).items()}
    networks = {
        "trained by DINO": load_encoder(str(checkpoint), device),
        "untrained twin": untrained_encoder(read_weights(checkpoint), device),
    }
    for network, encoder in networks.items():
        scores = []
        for kind in sorted(path.name for path in test.iterdir() if path.is_dir()):
            normal = demo / "data" / "train" / kind
            bank, _ = build(encoder, image_folder(normal), BankSettings(default_size(encoder), area=area))
            found = detect(encoder, bank, photos([test]))
            result = evaluate(found.photos, read_truth(names, str(normal), None, demo / "masks"))
            scores.append((result.images or 0, result.pixels or 0))
            print(f"{network:16} {kind:10} images {scores[-1][0]:5.1f}  pixels {scores[-1][1]:5.1f}", flush=True)
        images, pixels = (sum(column) / len(scores) for column in zip(*scores, strict=True))
        print(f"{network:16} {'mean':10} images {images:5.1f}  pixels {pixels:5.1f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))

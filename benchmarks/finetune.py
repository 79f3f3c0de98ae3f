"""Accuracy of fine-tuning and of a linear probe, on a few images per class.

    python benchmarks/finetune.py CHECKPOINT DATA [--per-class 100] [--seeds 3] [--set KEY=VALUE]

DATA holds `train`, and `val` or `test`, with class folders. Each seed draws its own training images. The probe has the
features of the checkpoint; fine-tuning has the same images, a tenth of them held out. Both are scored on the same test
images, at most 200 per class.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_TEST_IMAGES = 200  # per class


def link_images(data: Path, folder: Path, per_class: int, seed: int) -> None:
    """Link training images, drawn at random for each class, and test images."""
    draw = random.Random(seed)
    test = next(data / name for name in ("val", "test") if (data / name).is_dir())
    for source, name in ((data / "train", "train"), (test, "val")):
        for kind in sorted(path for path in source.iterdir() if path.is_dir()):
            files = sorted(kind.iterdir())
            chosen = draw.sample(files, per_class) if name == "train" else files[:_TEST_IMAGES]
            (folder / name / kind.name).mkdir(parents=True)
            for file in chosen:
                (folder / name / kind.name / file.name).symlink_to(file.resolve())


def dino(folder: Path, *words: str) -> dict[str, Any]:
    """Run a command with --json in a folder; return what it prints."""
    command = [sys.executable, "-m", "dinocli", *words, "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(words: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=Path)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(words)
    checkpoint = options.checkpoint if ":" in options.checkpoint else str(Path(options.checkpoint).resolve())
    settings = [word for each in options.set for word in ("--set", each)]
    found: dict[str, list[float]] = {"linear probe": [], "fine-tuned": []}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data, features = str(folder / "data"), str(folder / "features")
            link_images(options.data, folder / "data", options.per_class, seed)
            where = ["--out", features, "--precision", "float32", "--workers", "0"]
            dino(folder, "extract", checkpoint, data, *where)
            found["linear probe"].append(dino(folder, "linear", "--features", features, "--seed", str(seed))["top1"])
            start = ["--from", checkpoint, "--seed", str(seed), "--workers", "0", "--out", str(folder / "run")]
            found["fine-tuned"].append(dino(folder, "finetune", data, *start, *settings)["top1"])
        print(f"seed {seed}: " + ", ".join(f"{way} {scores[-1]:.1f}" for way, scores in found.items()), flush=True)
    table = Table("way", "top-1, % (range)")
    for way, scores in found.items():
        table.add_row(way, f"{statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})")
    Console().print(table)
    return found


if __name__ == "__main__":
    main()

"""A run's network as the file that comes with the package: the averaged backbone alone, in float16.

python benchmarks/ship.py runs/mini-1 dinocli/weights/mini.safetensors --data "..." --license CC0-1.0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dinocli.core.tensors import write_tensors
from dinocli.weights.checkpoint import metadata_of, read_weights


def main(args: list[str]) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="Images that it was trained on.")
    parser.add_argument("--license", required=True, help="Licence of these images.")
    options = parser.parse_args(args)
    weights = read_weights(options.run)
    assert weights.architecture is not None
    kept = {f"backbone.{name}": value.to(torch.float16).numpy() for name, value in weights.backbone.items()}
    about = {"data": options.data, "data_license": options.license, "license": "Apache-2.0"}
    write_tensors(options.out, kept, metadata_of(weights, weights.architecture) | about)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])

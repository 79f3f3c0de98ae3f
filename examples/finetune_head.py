"""Train a small classifier on frozen features, and use it on new images.

    python examples/finetune_head.py [CHECKPOINT]

`dino linear` does this with a learning-rate sweep. This script shows the loop, for you to change: another head, another
loss, class weights, several labels. Without CHECKPOINT it uses an untrained `tiny` network.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from features_in_python import draw, untrained
from torch import Tensor, nn

import dinocli

CLASSES = ("disc", "square")


def labelled(paths: list[Path]) -> Tensor:
    """Read the class of each image from its name. [S]"""
    return torch.tensor([CLASSES.index(path.name.split("-")[0]) for path in paths])


def main(folder: Path, checkpoint: str | None = None) -> float:
    """Train, print the accuracy on held-out images, and return it."""
    paths = draw(folder / "photos", count=40)
    encoder = dinocli.load(checkpoint or str(untrained(folder)), device="cpu")

    # The backbone runs once; the head then trains on the stored features.
    features, labels = encoder(paths), labelled(paths)
    train, test = slice(0, 30), slice(30, 40)
    mean, std = features[train].mean(0), features[train].std(0) + 1e-6
    features = (features - mean) / std

    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(features.shape[1], 64), nn.GELU(), nn.Linear(64, len(CLASSES)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for step in range(100):
        loss = nn.functional.cross_entropy(head(features[train]), labels[train])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    with torch.no_grad():
        accuracy = (head(features[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"{accuracy:.0%} of {len(labels[test])} held-out images right")
    # Keep mean and std beside the head: new features must be scaled the same way.
    torch.save({"head": head.state_dict(), "mean": mean, "std": std}, folder / "head.pt")
    return accuracy


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place), sys.argv[1] if len(sys.argv) > 1 else None)

"""Memory bank: patch features that cover those of normal photos, and the file that keeps them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinocli.core.checksums import seal, unseal
from dinocli.core.errors import DinoError
from dinocli.core.tensors import Indices, is_of_kind, map_tensors, write_tensors
from dinocli.evals.units import Floats
from dinocli.features.store import Provenance, read_provenance

KIND = "bank"  # of the file, in its metadata
_AGAIN = "create it with `dino anomaly NORMAL`"
_DIMENSIONS = 128  # of the random projection; distances keep their order well enough to spread patches
_REPORT_EVERY = 100  # patches


@dataclass(frozen=True)
class BankSettings:
    """Settings of a bank and of the scores made with it.

    Attributes:
        short_side: Short side in pixels of the resized photos.
        layers: Numbers of the blocks whose patch features are concatenated.
        area: Share of a photo's patches, those with the largest distances, whose mean distance is its score.
    """

    short_side: int
    layers: tuple[int, ...] = (-1,)
    area: float = 0.05


@dataclass(frozen=True, eq=False)
class Bank:
    """Patch features of normal photos.

    Attributes:
        patches: Patch features of length 1. [M, D]
        scores: Scores of normal photos, each compared with the patches of the others only. [S]
        usual: Median distance of the patches of these photos.
        settings: Settings of features and scores.
        provenance: Origin of the features.
    """

    patches: Floats
    scores: Floats
    usual: float
    settings: BankSettings
    provenance: Provenance

    def percentile(self, score: float) -> float:
        """Return the percent of normal photos with a lower score."""
        return 100 * float((self.scores < score).mean())


def select(
    patches: Floats,
    count: int,
    *,
    device: torch.device,
    seed: int = 0,
    report: Callable[[int], None] = lambda done: None,
) -> Indices:
    """Select patches that cover all: in turn, the patch farthest from those selected so far.

    Args:
        patches: Patch features. [S, D]
        count: Number of patches to select, at most S.
        device: Device for the distances.
        seed: Seed of the first patch and of the random projection.
        report: Callback with the number of selected patches.

    Returns:
        Rows of the selected patches, sorted. [count]

    Source: Roth et al., arXiv 2106.08265, algorithm 1: a greedy coreset over randomly projected features.
    """
    if count >= len(patches):
        return np.arange(len(patches))
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(patches).to(device)
    if patches.shape[1] > _DIMENSIONS:
        projection = rng.standard_normal((patches.shape[1], _DIMENSIONS), np.float32) / math.sqrt(_DIMENSIONS)
        values = values @ torch.from_numpy(projection).to(device)
    squares = values.square().sum(1)
    newest = torch.tensor(int(rng.integers(len(patches))), device=device)
    chosen, nearest = [newest], torch.full_like(squares, torch.inf)
    for done in range(1, count):
        distances = squares + squares[newest] - 2 * (values @ values[newest])
        nearest = torch.minimum(nearest, distances.clamp(min=0))
        nearest[newest] = -1  # else equal patches would be selected twice
        newest = nearest.argmax()
        chosen.append(newest)
        if done % _REPORT_EVERY == 0:
            report(done)
    report(count)
    return np.sort(torch.stack(chosen).cpu().numpy())


def check_bank_file(path: Path) -> None:
    """Check that a bank would replace no other file.

    Raises:
        DinoError: If the path is a file that is no bank.
    """
    if path.exists() and not is_bank(path):
        raise DinoError(f"{path} exists and is no memory bank; it would be overwritten", "use another --out")


def write_bank(path: Path, bank: Bank) -> None:
    """Write a bank as a safetensors file with its settings and provenance.

    Raises:
        OSError: If the disk is full or the place is not writable.
    """
    about = asdict(bank.settings) | {"usual": bank.usual, "crc32_of_patches": _checksum(bank.patches)}
    metadata = {
        "dinocli": KIND,
        "bank": json.dumps(seal(about)),
        "recipe": json.dumps(asdict(bank.provenance)),
        "classes": "[]",
    }
    write_tensors(path, {"patches": bank.patches, "scores": bank.scores}, metadata)


def read_bank(path: Path) -> Bank:
    """Read a bank.

    Raises:
        DinoError: If the file is no bank, or is corrupt.
    """
    if not is_bank(path):
        raise DinoError(f"{path} is no memory bank", _AGAIN)
    try:
        tensors, metadata = map_tensors(path)
        provenance, _ = read_provenance(path, metadata, _AGAIN)
        about: dict[str, Any] = unseal(metadata["bank"])
        patches, scores = (np.array(tensors[key], np.float32) for key in ("patches", "scores"))
        settings = BankSettings(int(about["short_side"]), tuple(map(int, about["layers"])), float(about["area"]))
        if patches.ndim != 2 or not patches.size or scores.ndim != 1 or not scores.size:
            raise ValueError(f"it has patches of shape {patches.shape} and scores of shape {scores.shape}")
        if _checksum(patches) != about["crc32_of_patches"] or not np.isfinite(scores).all():
            raise ValueError("the checksum of its patches does not match")
        return Bank(patches, scores, float(about["usual"]), settings, provenance)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DinoError(f"{path} is damaged: {why}", _AGAIN) from error


def is_bank(path: Path) -> bool:
    """Return whether a path is a file with a memory bank."""
    return is_of_kind(path, KIND)


def _checksum(patches: NDArray[np.float32]) -> str:
    return f"{zlib.crc32(patches.tobytes()):08x}"

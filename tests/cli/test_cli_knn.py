"""`dino knn` on a device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import Dino, dino  # noqa: F401  a fixture

from dinocli.core import device as devices
from dinocli.evals import device_search
from dinocli.evals.device_search import DeviceSearch
from dinocli.features.store import Provenance
from dinocli.features.writer import write_features


@pytest.fixture
def stored(tmp_path: Path) -> None:
    """Write features of two classes in a training and a test split."""
    for seed, (split, count) in enumerate({"train": 40, "val": 15}.items()):
        labels = np.arange(count) % 2
        values = np.random.default_rng(seed).normal(size=(count, 8)) + labels[:, None]
        provenance = Provenance("x", "0", "cls", 1, 224, "data")
        with write_features(tmp_path / "features" / f"{split}.safetensors", provenance, ["a", "b"]) as writer:
            writer.append(values.astype(np.float32), labels.tolist(), [f"{i}.png" for i in range(count)])


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let CPU products stand for those of a CUDA device and of MPS; return the list of devices that searched."""
    used: list[str] = []

    def pretend(values: np.ndarray, device: torch.device) -> DeviceSearch:
        used.append(str(device))
        return DeviceSearch(values, torch.device("cpu"))

    monkeypatch.setattr(device_search, "DeviceSearch", pretend)
    return used


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("words", "available", "device"),
    [
        ([], "cuda", "cuda"),
        ([], "mps", None),
        ([], "", None),
        (["--device", "cuda"], "cuda", "cuda"),
        (["--device", "mps"], "mps", "mps"),
        (["--device", "cpu"], "cuda", None),
        (["--index", "ivf"], "cuda", None),
    ],
)
def test_knn_searches_on_cuda_unless_the_user_names_another_device(
    dino: Dino,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    searched: list[str],
    words: list[str],
    available: str,
    device: str | None,
) -> None:
    expected = dino("knn", "--device", "cpu", "--json").stdout
    monkeypatch.setattr(
        devices, "pick_device", lambda name: torch.device((available or "cpu") if name == "auto" else name)
    )
    found = json.loads(dino("knn", *words, "--json").stdout)
    assert found["scores"] == json.loads(expected)["scores"]
    assert searched == ([device] if device else [])


@pytest.mark.usefixtures("stored")
def test_knn_refuses_a_device_that_is_missing_or_that_an_index_does_not_use(dino: Dino) -> None:  # noqa: F811
    done = dino("knn", "--device", "cuda:99", code=1)
    assert "--device cuda:99 is not available" in done.stderr
    assert "hint: --device auto" in done.stderr
    done = dino("knn", "--index", "ivf", "--device", "cuda", code=1)
    assert "--index ivf searches on the CPU, not on --device cuda" in done.stderr
    assert "hint: omit --index ivf, or --device" in done.stderr

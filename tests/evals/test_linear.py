from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images

from dinocli.data.sources import splits
from dinocli.encoder import Encoder
from dinocli.errors import DinoError
from dinocli.evals.linear import RATES, linear, linear_on_images
from dinocli.features import Features, Recipe

CPU = torch.device("cpu")


def clusters(images: int, classes: int = 4, seed: int = 0) -> Features:
    """Features a linear classifier can tell apart, but not all of them."""
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    values = np.random.default_rng(99).normal(size=(classes, 16))[labels] + generator.normal(size=(images, 16))
    return Features(
        values.astype(np.float32), labels, [""] * images, list("abcd")[:classes], {}, Recipe("x", "0", "cls", 1, 8, "d")
    )


def test_the_probe_learns_and_picks_its_rate_on_held_out_training_images() -> None:
    result = linear(clusters(400), clusters(200, seed=1), epochs=20, device=CPU)
    assert result.top1 > 90
    assert result.top5 == 100
    assert set(result.sweep) == set(RATES)
    assert result.sweep[result.lr] == max(result.sweep.values())
    assert (result.train_images, result.held_out, result.test_images, result.split_off) == (400, 40, 200, False)


def test_labels_without_meaning_are_not_learned() -> None:
    noise = clusters(400)
    shuffled = Features(
        noise.values, np.random.default_rng(0).permutation(noise.labels), *list(vars(noise).values())[2:]
    )
    assert linear(shuffled, None, epochs=20, device=CPU).top1 < 50


def test_one_split_is_divided() -> None:
    result = linear(clusters(200), None, epochs=5, device=CPU)
    assert result.split_off
    assert (result.train_images, result.test_images) == (160, 40)


def test_the_same_seed_gives_the_same_result() -> None:
    assert linear(clusters(80), None, epochs=3, device=CPU) == linear(clusters(80), None, epochs=3, device=CPU)


def test_a_sweep_trains_each_rate_as_if_it_were_alone() -> None:
    from dinocli.evals.linear import _Probes, _stored_batches, _trainer
    from dinocli.schedules import Clock, Cosine

    data, weights = clusters(64), []
    for rates in ((0.1, 0.01), (0.01,)):
        probes = _Probes(16, 4, rates, seed=0)
        batches = _stored_batches(
            torch.from_numpy(data.values), torch.from_numpy(data.labels), np.arange(64), 16, seed=0
        )
        clock = Clock(4, 2)
        _trainer(probes, Cosine(kind="cosine", start=1.0, end=0.0), clock, 16).fit(batches, 8, lambda c, v: False)
        weights.append(probes.weights[-1].data)
    torch.testing.assert_close(*weights)


def test_too_little_is_said() -> None:
    for data in (clusters(5), clusters(50, classes=1)):
        with pytest.raises(DinoError, match="two classes"):
            linear(data, None, epochs=1, device=CPU)


def test_the_papers_protocol_learns_from_images(tmp_path: Path, encoder: Encoder) -> None:
    from PIL import Image

    for split, count in (("train", 16), ("val", 8)):
        for name, color in (("dark", (40, 30, 60)), ("light", (200, 220, 190))):
            folder = write_images(tmp_path / split / name, count, 24)
            for path in folder.iterdir():
                Image.blend(Image.open(path), Image.new("RGB", (24, 24), color), 0.8).save(path)
    parts = splits(str(tmp_path))
    done = []
    result = linear_on_images(
        encoder,
        parts["train"],
        parts["val"],
        blocks=2,
        epochs=8,
        lr=0.5,
        batch_size=8,
        report=lambda d, total: done.append((d, total)),
    )
    assert (result.protocol, result.top1) == ("paper", 100.0)
    assert done[-1] == (32, 32)
    with pytest.raises(DinoError, match="batch of 1024"):
        linear_on_images(encoder, parts["train"], parts["val"])


def test_a_probe_starts_as_the_originals() -> None:
    from dinocli.evals.linear import _Probes

    probes = _Probes(384, 100, [0.1, 1.0], seed=0)
    for weights, biases in zip(probes.weights, probes.biases, strict=True):
        assert weights.std().item() == pytest.approx(0.01, rel=0.02)
        assert weights.mean().item() == pytest.approx(0, abs=2e-4)
        assert biases.eq(0).all()

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dinocli.core.errors import DinoError
from dinocli.evals.calibration import softmax
from dinocli.evals.linear import RATES, LinearResult, _split_off, train_probe
from dinocli.features.store import Features, Provenance, read_features
from dinocli.features.writer import write_features

CPU = torch.device("cpu")
PROVENANCE = Provenance("x", "0", "cls", 1, 8, "d")


def linear(*features: Features | None, **options: object) -> LinearResult:
    return train_probe(*features, **options).result


def clusters(images: int, classes: int = 4, seed: int = 0) -> Features:
    """Return noisy class clusters, which a linear classifier separates almost completely."""
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    values = np.random.default_rng(99).normal(size=(classes, 16))[labels] + generator.normal(size=(images, 16))
    return Features(values.astype(np.float32), labels, [""] * images, list("abcd")[:classes], {}, PROVENANCE)


def test_the_probe_selects_its_learning_rate_on_held_out_training_images() -> None:
    result = linear(clusters(400), clusters(200, seed=1), epochs=20, device=CPU)
    assert result.top1 > 90
    assert result.top5 == 100
    assert set(result.sweep) == set(RATES)
    assert result.sweep[result.lr] == max(result.sweep.values())
    assert (result.train_images, result.held_out, result.test_images, result.split_off) == (400, 40, 200, False)


def test_shuffled_labels_are_not_learned() -> None:
    noise = clusters(400)
    shuffled = Features(
        noise.values, np.random.default_rng(0).permutation(noise.labels), *list(vars(noise).values())[2:]
    )
    assert linear(shuffled, None, epochs=20, device=CPU).top1 < 50


def test_a_single_split_is_divided_into_training_and_test_images() -> None:
    result = linear(clusters(200), None, epochs=5, device=CPU)
    assert result.split_off
    assert (result.train_images, result.test_images) == (160, 40)


def test_the_same_seed_gives_the_same_result() -> None:
    assert linear(clusters(80), None, epochs=3, device=CPU) == linear(clusters(80), None, epochs=3, device=CPU)


def test_too_few_images_or_classes_are_an_error() -> None:
    for data, message in (
        (clusters(5), r"needs at least 12 training images in a class; the largest"),
        (clusters(50, classes=1), "two classes"),
    ):
        with pytest.raises(DinoError, match=message):
            linear(data, None, epochs=1, device=CPU)


def clusters_with_views(images: int, views: int) -> Features:
    """Return clusters whose views carry all information: the centered features are zero."""
    data = clusters(images)
    noise = np.random.default_rng(1).normal(size=(images, views, 16)).astype(np.float32)
    return replace(
        data,
        values=np.zeros_like(data.values),
        views=data.values[:, None] + 0.1 * noise,
        provenance=replace(data.provenance, views=views),
    )


def test_training_uses_the_views_and_testing_the_centered_images() -> None:
    data = clusters_with_views(400, 3)
    result = linear(data, clusters(200, seed=1), epochs=20, rates=[0.1], device=CPU)
    assert (result.protocol, result.test_images) == ("stored, 3 views", 200)
    assert result.top1 > 90, "only the views carry information"
    assert result.sweep == {0.1: 25.0}, "held-out images are centered, and carry no information here"
    assert linear(data, clusters(200, seed=1), epochs=20, rates=[0.1], device=CPU) == result


def test_each_epoch_draws_one_view_per_image() -> None:
    from dinocli.evals.linear import _draw_batches, _Stored

    images, views = 12, 5
    numbers = np.arange(images * views, dtype=np.float32).reshape(images, views, 1)
    batches = _draw_batches(_Stored(numbers, CPU), np.arange(images), np.arange(images), 4, seed=0, views=views)
    taken = []
    for _ in range(40):
        epoch = [next(batches) for _ in range(3)]
        x, y = torch.cat([x for x, _ in epoch])[:, 0].long(), torch.cat([y for _, y in epoch])
        assert (x // views).equal(y)
        assert y.sort().values.tolist() == list(range(images))
        taken.append(x)
    assert len(torch.cat(taken).unique()) == images * views, "every view is drawn at some time"


def write_wide(path: Path, images: int = 4000) -> Features:
    """Write features of 512 dimensions in float16, and open them."""
    generator = np.random.default_rng(0)
    with write_features(path, PROVENANCE, list("abcd"), dtype="float16") as writer:
        for _ in range(images // 100):
            values = generator.normal(size=(100, 512)).astype(np.float32)
            writer.append(values, [0, 1, 2, 3] * 25, ["x.png"] * 100)
    return read_features(path)


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that numpy and Python hold at once during a call; torch's own are not counted."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_stored_features_are_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dinocli.evals import linear as module

    monkeypatch.setattr(module, "_SCORED", 64)
    data = write_wide(tmp_path / "train.safetensors")
    whole = 4 * 4000 * 512
    assert peak_of(lambda: data.values[:]) >= whole, "the measurement sees a copy of all features"
    assert peak_of(lambda: linear(data, None, epochs=1, rates=[0.1], device=CPU)) < whole / 4
    assert peak_of(lambda: module._hold(data.values, CPU, 1.0)) < whole / 4, "nor on the way to a GPU"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_features_held_on_a_device_equal_those_read_for_each_step(tmp_path: Path, scale: float) -> None:
    from dinocli.evals.linear import _hold, _Stored

    data, rows = write_wide(tmp_path / "train.safetensors", 5000), np.array([4999, 0, 4096, 4095, 7])
    stored = _Stored(data.values, CPU, scale)
    assert stored.held is None
    read = stored[(rows,)]
    stored.held = _hold(data.values, CPU, scale)
    assert stored[(rows,)].equal(read)
    np.testing.assert_array_equal(read.numpy(), scale * data.values[rows])


def test_the_block_size_of_test_images_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinocli.evals import linear as module

    whole = linear(clusters(200), clusters(100, seed=1), epochs=3, device=CPU)
    monkeypatch.setattr(module, "_SCORED", 7)
    assert linear(clusters(200), clusters(100, seed=1), epochs=3, device=CPU) == whole


@pytest.mark.parametrize("scale", [2.0**66, 2.0**-100])
def test_the_scale_of_features_does_not_change_the_accuracy(scale: float) -> None:
    """Features are scaled to near 1 by a power of two, which changes no other bit."""
    plain = clusters(200)
    plain.values[:] /= np.sqrt(np.square(plain.values).mean())
    far = replace(plain, values=(plain.values * scale).astype(np.float32))
    assert linear(far, None, epochs=5, device=CPU) == linear(plain, None, epochs=5, device=CPU)
    assert linear(far, None, epochs=5, device=CPU).top1 > 60


def test_a_diverging_probe_is_an_error() -> None:
    outlier = clusters(200)
    outlier.values[::20] *= np.float32(1e30)
    with pytest.raises(DinoError, match="diverged"):
        linear(outlier, None, epochs=5, device=CPU)


def test_every_tenth_shuffled_image_of_each_class_is_split_off() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 300)
    rows = np.arange(300) * 3
    shuffled = np.random.default_rng(5).permutation(300)
    expected = np.concatenate([shuffled[labels[shuffled] == label][9::10] for label in range(7)])
    left, split_off = _split_off(rows, labels, 10, 5)
    assert split_off.tolist() == rows[np.sort(expected)].tolist()
    assert sorted([*left, *split_off]) == rows.tolist()


def test_the_weights_give_the_predictions_at_any_scale() -> None:
    for scale in (1.0, 2.0**-40):
        train, test = (replace(c, values=(c.values * scale).astype(np.float32)) for c in (clusters(200), clusters(60)))
        probe = train_probe(train, test, epochs=5, device=CPU)
        logits = test.values @ probe.weight.T + probe.bias
        assert logits.argmax(1).tolist() == probe.predictions.predicted.tolist()
        assert probe.predictions.percent(1) == probe.result.top1
        assert probe.result.interval.low < probe.result.top1 <= probe.result.interval.high
        assert probe.result.calibration is not None
        assert probe.result.calibration.images == probe.result.held_out == 20
        chances = softmax(logits, probe.result.calibration.temperature)
        np.testing.assert_allclose(chances.max(1), probe.predictions.confidence, rtol=1e-4)

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinocli.engine.schedules import Clock, Cosine
from dinocli.evals.probes import Probes, trainer


def test_a_sweep_trains_each_rate_as_a_single_run_does() -> None:
    generator = np.random.default_rng(0)
    x, y = (
        torch.from_numpy(generator.normal(size=(8, 16, 16))).float(),
        torch.from_numpy(generator.integers(0, 4, (8, 16))),
    )
    weights = []
    for rates in ((0.1, 0.01), (0.01,)):
        probes = Probes(16, 4, rates, seed=0)
        clock = Clock(4, 2)
        trainer(probes, Cosine(kind="cosine", start=1.0, end=0.0), clock, 16).fit(
            iter(zip(x, y, strict=True)), 8, lambda c, v: None
        )
        weights.append(probes.weights[-1].data)
    torch.testing.assert_close(*weights)


def test_the_group_size_of_classifiers_does_not_change_scores_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(16, 4, [0.1, 0.2, 0.3], seed=0)
    for i, weights in enumerate(probes.weights):
        weights.data *= 1 + i
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 16, generator=generator), torch.tensor([0, 3, 1, 2, 0])
    whole, losses = probes.scores(x), probes((x, y))
    assert whole.shape == (5, 3, 4)
    assert len({loss.item() for loss in losses.values()}) == 3
    for i, (weights, loss) in enumerate(zip(probes.weights, losses.values(), strict=True)):
        torch.testing.assert_close(whole[:, i], x @ weights.T)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ weights.T, y))
    for least in (1, 2 * 16 * 4):
        monkeypatch.setattr("dinocli.evals.probes._MAX_WEIGHTS", least)
        torch.testing.assert_close(probes.scores(x), whole)
        torch.testing.assert_close(probes((x, y)), losses)


def test_initial_weights_are_distributed_as_in_the_original() -> None:
    probes = Probes(384, 100, [0.1, 1.0], seed=0)
    for weights, biases in zip(probes.weights, probes.biases, strict=True):
        assert weights.std().item() == pytest.approx(0.01, rel=0.02)
        assert weights.mean().item() == pytest.approx(0, abs=2e-4)
        assert biases.eq(0).all()

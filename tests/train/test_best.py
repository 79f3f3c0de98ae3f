from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from conftest import SMALL

from dinocli.method.preset import load_preset
from dinocli.train.best import BEST, BestWeights
from dinocli.train.knn_monitor import Answers
from dinocli.weights.load import load_encoder


def answers(correct: int) -> Answers:
    return Answers(0.0, np.arange(10) < correct, np.zeros(10, np.bool_))


def test_only_better_weights_are_kept_also_after_a_resume(tmp_path: Path) -> None:
    preset, path = load_preset("tiny-dino", SMALL), str(tmp_path / BEST)
    networks = [preset.network() for _ in range(4)]

    def kept() -> int | None:
        return load_encoder(path, torch.device("cpu")).step

    best = BestWeights(tmp_path, preset, "set")
    best.update(answers(5), networks[0], 1)
    best.update(answers(4), networks[1], 2)
    assert (kept(), best.accuracy) == (1, 50.0)
    again = BestWeights(tmp_path, preset, "set")
    assert again.accuracy == 50.0
    again.update(answers(5), networks[2], 3)
    assert kept() == 1, "an equal accuracy is no better"
    again.update(answers(6), networks[3], 4)
    assert kept() == 4


def test_a_corrupt_file_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(b"x")
    preset = load_preset("tiny-dino", SMALL)
    best = BestWeights(tmp_path, preset, "set")
    best.update(answers(0), preset.network(), 3)
    assert load_encoder(str(tmp_path / BEST), torch.device("cpu")).step == 3


def test_weights_that_another_monitor_chose_are_replaced(tmp_path: Path) -> None:
    preset = load_preset("tiny-dino", SMALL)
    BestWeights(tmp_path, preset, "one").update(answers(9), preset.network(), 1)
    other = BestWeights(tmp_path, preset, "other")
    other.update(answers(3), preset.network(), 2)
    assert load_encoder(str(tmp_path / BEST), torch.device("cpu")).step == 2


def test_an_accuracy_without_an_end_in_decimals_is_kept_exactly(tmp_path: Path) -> None:
    preset = load_preset("tiny-dino", SMALL)
    third = Answers(0.0, np.arange(3) < 1, np.zeros(1, np.bool_))
    BestWeights(tmp_path, preset, "set").update(third, preset.network(), 1)
    BestWeights(tmp_path, preset, "set").update(third, preset.network(), 2)
    assert load_encoder(str(tmp_path / BEST), torch.device("cpu")).step == 1

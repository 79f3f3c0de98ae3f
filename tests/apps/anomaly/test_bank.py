from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dinocli.apps.anomaly.bank import Bank, BankSettings, check_bank_file, is_bank, read_bank, select, write_bank
from dinocli.core.errors import DinoError
from dinocli.evals.units import unit
from dinocli.features.store import Provenance

CPU = torch.device("cpu")
PROVENANCE = Provenance("ckpt.safetensors", "0123456789abcdef", "patches", 1, 48, "normal", step=7)


def a_bank() -> Bank:
    rng = np.random.default_rng(0)
    patches = unit(rng.normal(size=(20, 8)))
    return Bank(patches, np.array([0.1, 0.2, 0.3, 0.4], np.float32), 0.05, BankSettings(48, (1, -1), 0.1), PROVENANCE)


def test_selected_patches_are_the_farthest_in_turn() -> None:
    rng = np.random.default_rng(1)
    patches = rng.normal(size=(200, 5)).astype(np.float32)
    told: list[int] = []
    rows = select(patches, 12, device=CPU, seed=3, report=told.append)
    assert told[-1] == 12 and len(set(rows.tolist())) == 12 and (np.diff(rows) > 0).all()
    # The definition, with the same first patch.
    chosen = [int(np.random.default_rng(3).integers(200))]
    while len(chosen) < 12:
        distances = np.linalg.norm(patches[:, None] - patches[chosen], axis=2).min(1)
        chosen.append(int(distances.argmax()))
    assert rows.tolist() == sorted(chosen)


def test_a_coreset_covers_better_than_chance() -> None:
    rng = np.random.default_rng(2)
    many = rng.normal(size=(1, 200)) + 0.05 * rng.normal(size=(400, 200))
    patches = unit(np.concatenate([many, rng.normal(size=(8, 200))]))  # one crowd, and eight rare patches
    rows = select(patches, 12, device=CPU)
    assert set(range(400, 408)) <= set(rows.tolist()), "rare patches are kept, also after the projection"
    assert len(set(range(400, 408)) & set(rng.choice(408, 12, replace=False).tolist())) < 8


def test_equal_patches_are_selected_once_each_and_few_patches_all() -> None:
    same = np.ones((6, 3), np.float32)
    assert len(set(select(same, 4, device=CPU).tolist())) == 4
    assert select(same, 9, device=CPU).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_bank_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, bank = tmp_path / "bank.safetensors", a_bank()
    write_bank(path, bank)
    again = read_bank(path)
    assert (again.patches == bank.patches).all() and (again.scores == bank.scores).all()
    assert (again.usual, again.settings, again.provenance) == (bank.usual, bank.settings, PROVENANCE)
    assert [again.percentile(score) for score in (0.0, 0.25, 1.0)] == [0, 50, 100]


def test_other_and_damaged_files_are_errors(tmp_path: Path) -> None:
    path, other = tmp_path / "bank.safetensors", tmp_path / "mine.safetensors"
    write_bank(path, a_bank())
    save_file({"patches": np.zeros((2, 2), np.float32)}, other)
    assert is_bank(path) and not is_bank(other) and not is_bank(tmp_path / "none")
    check_bank_file(path)
    with pytest.raises(DinoError, match="would be overwritten"):
        check_bank_file(other)
    with pytest.raises(DinoError, match="is no memory bank"):
        read_bank(other)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(DinoError, match="is damaged"):
        read_bank(path)
    write_bank(path, replace(a_bank(), scores=np.array([np.nan], np.float32)))
    with pytest.raises(DinoError, match="is damaged"):
        read_bank(path)
    assert load_file(other)["patches"].shape == (2, 2)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dinocli.demo import demo


def test_the_demo_measures_what_it_trained_beside_what_it_must_beat(tmp_path: Path) -> None:
    stages: list[str] = []

    @contextmanager
    def stage(what: str, total: int, unit: str) -> Iterator[object]:
        stages.append(what)
        yield lambda done, note="": None

    result = demo(
        tmp_path / "demo", device=torch.device("cpu"), workers=0, stage=stage, train_images=120, val_images=30, steps=2
    )
    assert [row.features for row in result.rows] == ["trained by DINO", "untrained twin", "raw pixels"]
    for row in result.rows:
        assert 0 <= row.knn <= 100
        assert 0 <= row.linear <= 100
    assert [row.overlap is None for row in result.rows] == [False, False, True]
    assert 0.1 < result.everything < 0.6
    assert len(result.pictures) == 10
    assert all(path.is_file() for path in result.pictures)
    assert stages[:2] == ["draw", "pretrain"]
    assert sorted(p.name for p in result.folder.iterdir()) == ["attention", "data", "features", "masks", "run"]

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dinocli.apps.demo.demo import DemoResult, demo
from dinocli.core.atomic import write_json
from dinocli.core.errors import DinoError
from dinocli.data.sources.outputs import marked


class Played:
    """Demo of few images, with its stages and notes.

    Args:
        folder: Folder of the demo.
        stop: Stage that Ctrl-C interrupts after some progress.
    """

    def __init__(self, folder: Path, stop: str = "") -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.stop = stop
        self.folder = folder

    def play(self, **changed: int) -> DemoResult:
        settings = {"train_images": 120, "val_images": 30, "steps": 2} | changed
        return demo(
            self.folder, device=torch.device("cpu"), workers=0, stage=self.stage, note=self.notes.append, **settings
        )

    @contextmanager
    def stage(self, what: str, total: int, unit: str) -> Iterator[object]:
        self.stages.append(what)

        def advance(done: int, note: str = "") -> None:
            if what == self.stop:
                self.stop = ""
                os.kill(os.getpid(), signal.SIGINT)

        yield advance


def test_an_interrupted_demo_resumes_and_scores_features_and_baselines(tmp_path: Path) -> None:
    """Interrupt one stage after another; each further call resumes the demo and repeats no finished stage."""
    for stop, stages in (
        ("draw", ["draw"]),
        ("pretrain", ["draw", "pretrain"]),
        (
            "extract trained by DINO, val",
            ["pretrain", "extract trained by DINO, train", "extract trained by DINO, val"],
        ),
    ):
        played = Played(tmp_path / "demo", stop)
        with pytest.raises(KeyboardInterrupt):
            played.play()
        assert played.stages == stages
    played = Played(tmp_path / "demo")
    result = played.play()
    assert played.notes == [
        f"resuming the demo in {tmp_path / 'demo'}",
        f"{tmp_path / 'demo' / 'run'} is finished: 2 steps done, 2 requested",
    ]
    assert [row.features for row in result.rows] == ["trained by DINO", "untrained twin", "raw pixels"]
    for row in result.rows:
        assert 0 <= row.knn <= 100
        assert 0 <= row.linear <= 100
    assert [row.overlap is None for row in result.rows] == [False, False, True]
    assert 0.1 < result.everything < 0.6
    assert len(result.pictures) == 10
    assert all(path.is_file() for path in result.pictures)
    names = ["attention", "data", "demo.json", "features", "masks", "run"]
    assert sorted(p.name for p in result.folder.iterdir()) == names
    with pytest.raises(DinoError, match="is finished"):
        played.play()


def test_a_folder_with_only_a_marker_counts_as_new(tmp_path: Path) -> None:
    played = Played(tmp_path / "demo", "draw")
    with pytest.raises(KeyboardInterrupt), marked(tmp_path / "demo", "demo"):
        played.play()
    assert (tmp_path / "demo" / "demo.json").is_file()


def test_other_folders_and_other_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DinoError, match="holds no demo to resume"):
        Played(tmp_path / "mine").play()
    (tmp_path / "mine" / "demo.json").write_text("{")
    with pytest.raises(DinoError, match="holds no demo to resume"):
        Played(tmp_path / "mine").play()
    write_json(tmp_path / "mine" / "demo.json", {"dinocli": "demo", "steps": 3, "drawn": True})
    with pytest.raises(DinoError, match="other settings"):
        Played(tmp_path / "mine").play()
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["demo.json", "notes.txt"]

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_images

from dinocli.data.sources.open import open_source
from dinocli.method.preset import load_preset
from dinocli.train.prepare import prepare
from dinocli.train.pretrain import pretrain


def test_an_unfinished_run_with_the_same_settings_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = open_source(str(write_images(tmp_path / "images", 6)))
    preset = load_preset("tiny-dino", ["training.batch_size=4"])
    plan = prepare("tiny-dino", preset, source, steps=1, device="cpu", workers=0)
    assert (plan.out, plan.stop, plan.clock.total) == (Path("runs/tiny-dino-1"), 1, 400)
    pretrain(plan, lambda progress: None)
    assert prepare("tiny-dino", preset, source, steps=2, device="cpu").out == plan.out
    assert prepare("tiny-dino", preset, source, device="cpu").stop == 400
    other = load_preset("tiny-dino", ["training.batch_size=5"])
    assert prepare("tiny-dino", other, source, device="cpu").out == Path("runs/tiny-dino-2")
    assert prepare("tiny-dino", preset, source, out=tmp_path / "mine", device="cpu").out == tmp_path / "mine"

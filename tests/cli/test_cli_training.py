from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_images

from dinocli.cli.training import list_notes
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train import plan as plans
from dinocli.train.plan import Plan


def test_a_note_on_two_heads_is_printed_once(tmp_path: Path) -> None:
    preset = load_preset("tiny-dinov2", ["training.epochs=2", "training.steps_per_epoch=2", "training.batch_size=4"])
    source = image_folder(write_images(tmp_path, 8, size=8))
    plan = Plan("tiny", preset, source, 4, tmp_path / "run", torch.device("cpu"), 0, None)
    notes = list(list_notes(plan, begun=False))
    assert sum("too few to train most" in note for note in notes) == 1


@pytest.mark.parametrize("begun", [False, True])
def test_another_precision_than_the_presets_is_noted(
    tmp_path: Path, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may also be resumed on another device."""
    preset = load_preset("tiny-dino", ["training.precision=bfloat16", "training.batch_size=4"])
    source = image_folder(write_images(tmp_path, 8, size=8))
    plan = Plan("tiny", preset, source, 4, tmp_path / "run", torch.device("cpu"), 0, None)
    for native, line in (("float16", "float16 with loss scaling"), ("float32", "float32"), ("bfloat16", None)):
        monkeypatch.setattr(plans, "training_precision", lambda device, wanted, native=native: native)
        notes = [note for note in list_notes(plan, begun=begun) if "training in" in note]
        assert notes == ([f"cpu has no native bfloat16: training in {line}"] if line else [])

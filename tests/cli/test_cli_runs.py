from __future__ import annotations

from pathlib import Path

import torch
from conftest import write_images

from dinocli.cli.runs import list_notes
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan


def test_a_note_on_two_heads_is_printed_once(tmp_path: Path) -> None:
    preset = load_preset("tiny-dinov2", ["training.epochs=2", "training.steps_per_epoch=2", "training.batch_size=4"])
    source = image_folder(write_images(tmp_path, 8, size=8))
    plan = Plan("tiny", preset, source, 4, tmp_path / "run", torch.device("cpu"), 0, None)
    notes = list(list_notes(plan, begun=False))
    assert sum("too few to train most" in note for note in notes) == 1

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_film, write_images
from safetensors.torch import load_file
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture

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


def test_two_frames_of_a_film_are_the_global_views_of_a_run(dino: Dino, tmp_path: Path) -> None:  # noqa: F811
    for name, frames in (("a", 6), ("b", 6)):
        write_film(tmp_path / "films" / f"{name}.mp4", frames)
    write_images(tmp_path / "films", 1)
    every, pair = ("--set", "images.every=0.5"), ("--set", "images.pair_within=0.5")
    run = (
        "pretrain",
        "films",
        "--preset",
        "tiny-dino",
        *SMALL,
        *every,
        "--epochs",
        "2",
        "--set",
        "training.steps_per_epoch=none",
    )
    note = "note: 1 of 13 images has no other frame within 0.5 seconds; both views are cut from one frame"

    # The option alone, and one that reaches no frame, are one line with a hint.
    alone = dino("pretrain", "films", "--preset", "tiny-dino", *SMALL, *pair, code=1).stderr
    assert "images.pair_within is not valid: without images.every, videos are not read" in alone
    assert "hint: --set images.every=0.5" in alone
    assert note in dino(*run, *pair, "--dry-run").stderr
    rare = (*run, "--set", "images.every=5", "--set", "images.pair_within=5", "--batch-size", "2")
    assert (
        "no image in films has another frame within 5 seconds; 2 of 3 images are frames" in dino(*rare, code=1).stderr
    )

    whole = dino(*run, *pair, "--out", "whole")
    assert note in whole.stderr
    dino(*run, *pair, "--out", "parts", "--steps", "3")
    other = dino(*run, "--set", "images.pair_within=1", "--out", "parts", code=1).stderr
    assert "the run began with images.pair_within = 0.5; 1.0 is now set" in other
    resumed = dino(*run, *pair, "--out", "parts", "--workers", "2")
    assert "resuming from step 3 of 6" in resumed.stderr and note not in resumed.stderr
    dino(*run, "--out", "single")
    files = [(tmp_path / name / "ckpt.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    weights = [load_file(tmp_path / name / "ckpt.safetensors") for name in ("whole", "single")]
    assert not all(values.equal(weights[1][key]) for key, values in weights[0].items()), "the second view matters"

    # Commands that read frames one by one take the weights, with frames further apart than those of a pair too.
    write_images(tmp_path / "photos", 8)
    dino("adapt", "photos", "--from", "whole", "--device", "cpu", "--dry-run")
    dino("extract", "whole", "films", "--set", "images.every=1", "--out", "features", "--workers", "0")
    assert (
        "images.pair_within=2 has no effect here"
        in dino("extract", "whole", "films", "--set", "images.pair_within=2", code=1).stderr
    )

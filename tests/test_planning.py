from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_images

from dinocli.data.sources import image_folder
from dinocli.errors import DinoError
from dinocli.planning import Plan, estimate, start_clock
from dinocli.preset import load_preset


def plan(images: Path, *overrides: str, preset: str = "tiny", stop: int = 10) -> Plan:
    return Plan(
        preset, load_preset(preset, overrides), image_folder(images), stop, Path("run"), torch.device("cpu"), 0, None
    )


def test_an_epoch_is_one_pass_unless_the_preset_says_otherwise() -> None:
    assert start_clock(load_preset("vits16"), 5000).steps_per_epoch == 4
    tiny = load_preset("tiny")
    assert (
        start_clock(tiny, 5000).total
        == start_clock(tiny, 500).total
        == tiny.training.steps_per_epoch * tiny.training.epochs
    )


@pytest.mark.parametrize(("images", "hint"), [(1, "1"), (100, "64"), (1023, "512")])
def test_fewer_images_than_a_batch_is_said_with_a_batch_that_fits(images: int, hint: str) -> None:
    with pytest.raises(DinoError, match=f"a batch of 1024 images was wanted; the folder has {images}") as error:
        start_clock(load_preset("vits16"), images)
    assert error.value.hint == f"--batch-size {hint}"


def test_counts_of_the_papers_network(images: Path) -> None:
    cost = estimate(plan(images, "views.locals=8", "training.batch_size=8", preset="vits16"))
    assert cost.backbone_parameters == 21_665_664
    # Two network passes over 2x224 + 8x96, backward twice a forward: 113.4 GFLOP by hand.
    assert cost.flops / 1e9 == pytest.approx(113.4, rel=0.03)
    assert cost.seconds > 0
    assert 1e9 < cost.memory < 10e9


def test_an_estimate_grows_with_the_run(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    small, large = (estimate(plan(folder, f"training.batch_size={b}", stop=5)) for b in (4, 32))
    assert large.memory > small.memory
    assert large.flops == small.flops


def test_the_rate_counts_the_batch_in(images: Path) -> None:
    made = plan(images, "training.batch_size=512", preset="vits16")
    assert made.lr.start == 5e-4 * 2

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_images

from dinocli.data.sources import image_folder
from dinocli.errors import DinoError
from dinocli.planning import Plan, cautions, start_clock
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


def test_the_rate_counts_the_batch_in(images: Path) -> None:
    made = plan(images, "training.batch_size=512", preset="vits16")
    assert made.lr.start == 5e-4 * 2


@pytest.mark.parametrize(
    ("overrides", "stop", "words"),
    [
        ([], None, []),
        ([], 40, ["the learning rate's warm-up takes 50 steps and this run ends at 40", "freeze of the prototypes"]),
        (["heads.dino.prototypes=65536"], None, ["400 steps show 19200 images to 65536 prototypes"]),
        (["optimizer.lr.warmup_epochs=5"], None, ["the learning rate's warm-up takes 250 of 400 steps"]),
        (["training.epochs=9", "heads.dino.prototypes=1024"], None, ["450 steps show 21600 images to 1024 prototypes"]),
        (["views.low_resolution={epochs=3, global_size=32}"], 151, []),
        (
            ["views.low_resolution={epochs=3, global_size=32}"],
            150,
            ["low resolution lasts 150 steps and this run ends at 150"],
        ),
        (["optimizer.lr.start=1.0"], None, ["a learning rate of 0.19 for 48 images is far from the paper's"]),
        (
            ["losses.dino.targets.temperature={kind='linear_by_epoch', start=0.04, end=0.07, epochs=30}"],
            None,
            ["the teacher temperature's warm-up takes 1500 steps and this run ends at 400"],
        ),
    ],
)
def test_what_is_unlikely_to_be_meant_is_said_with_the_value_to_take(
    tmp_path: Path, overrides: list[str], stop: int | None, words: list[str]
) -> None:
    preset = load_preset("tiny", overrides)
    source = image_folder(write_images(tmp_path, 48, size=8))
    total = start_clock(preset, 48).total
    plan = Plan("tiny", preset, source, stop or total, Path("x"), torch.device("cpu"), 0, None)
    said = list(cautions(plan))
    assert len(said) == len(words)
    for line, expected in zip(said, words, strict=True):
        assert expected in line
        changed = [value.strip(", ") for value in re.findall(r"--set (\S+)", line)]
        assert changed, "there is a value to take"
        mended = load_preset("tiny", [*overrides, *changed])
        assert not [w for w in cautions(replace(plan, preset=mended)) if expected in w], "which is right"


def test_a_run_has_a_part_for_each_size_of_its_crops(tmp_path: Path) -> None:
    images = write_images(tmp_path, 48, size=8)
    whole = plan(images, stop=400)
    assert whole.phases == [(400, whole)]
    low = "views.low_resolution={epochs=3, global_size=32, local_size=16}"
    assert [(n, p.preset.views.global_1.size) for n, p in plan(images, low, stop=400).phases] == [(150, 32), (250, 48)]
    assert [(n, p.preset.views.local.size) for n, p in plan(images, low, stop=151).phases] == [(150, 16), (1, 24)]
    assert [(n, p.preset.views.local.size) for n, p in plan(images, low, stop=150).phases] == [(150, 16)]
    assert [n for n, _ in plan(images, low, stop=0).phases] == [0]


def test_what_is_said_of_few_prototypes_is_never_to_take_more(tmp_path: Path) -> None:
    made = plan(write_images(tmp_path, 4, size=8), "heads.dino.prototypes=32", "training.batch_size=2", stop=400)
    (line,) = cautions(made)
    assert "800 images to 32 prototypes" in line
    assert line.endswith("will learn: --epochs 10")
    longer = ("heads.dino.prototypes=32", "training.batch_size=2", "training.epochs=10")
    assert not list(cautions(plan(tmp_path, *longer, stop=500)))


def test_a_batch_goes_into_parts_of_the_same_size_alone(tmp_path: Path) -> None:
    """Parts of other sizes would weigh their images otherwise."""
    made = plan(write_images(tmp_path, 48, size=8), "heads.dino.batch_norm=false")
    for parts, hint in ((5, "4"), (49, "48"), (32, "24")):
        with pytest.raises(DinoError, match=f"a batch of 48 .* {parts} do not divide it") as error:
            replace(made, accumulate=parts)
        assert error.value.hint == f"--accumulate {hint}"
    assert replace(made, accumulate=48).accumulate == 48


def test_parts_before_a_batch_norm_are_cautioned_of(tmp_path: Path) -> None:
    made = plan(write_images(tmp_path, 48, size=8), stop=400)
    (line,) = cautions(replace(made, accumulate=4))
    assert "sees 12 images at a time" in line
    without = plan(tmp_path, "heads.dino.batch_norm=false", stop=400)
    assert not list(cautions(replace(without, accumulate=4)))

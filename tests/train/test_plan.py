from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import of_channels, write_images

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.open import image_folder, open_images, open_source
from dinocli.method import shipped
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan, cautions, check_schedules, short_stop, start_clock


def plan(images: Path, *overrides: str, preset: str = "tiny-dino", stop: int = 10) -> Plan:
    return Plan(
        preset,
        load_preset(preset, overrides),
        open_images(str(images)),
        stop,
        Path("run"),
        torch.device("cpu"),
        0,
        None,
    )


def test_an_epoch_is_one_pass_unless_the_preset_sets_its_steps() -> None:
    assert start_clock(load_preset("vits16"), 5000).steps_per_epoch == 4
    tiny = load_preset("tiny-dino")
    assert (
        start_clock(tiny, 5000).total
        == start_clock(tiny, 500).total
        == tiny.training.steps_per_epoch * tiny.training.epochs
    )


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        (1, "--batch-size 1"),
        (47, "--batch-size 32"),
        (100, "use --preset tiny, or --batch-size 64; dino doctor IMAGES suggests settings for your images"),
        (1023, "use --preset tiny, or --batch-size 512; dino doctor IMAGES suggests settings for your images"),
    ],
)
def test_fewer_images_than_a_batch_is_an_error_with_a_batch_that_fits(images: int, hint: str) -> None:
    with pytest.raises(DinoError, match=f"a batch of 1024 images is larger than the set of {images}") as error:
        start_clock(load_preset("vits16"), images)
    assert error.value.hint == hint


def test_a_small_preset_gets_only_the_hint_of_a_smaller_batch() -> None:
    with pytest.raises(DinoError) as error:
        start_clock(load_preset("tiny-dino"), 40)
    assert error.value.hint == "--batch-size 32"


RAMP = "{kind='linear_by_epoch', start=0.04, end=0.07, epochs=30}"
COSINE = "{kind='cosine', start=0.9, end=0.99, warmup_epochs=8}"


@pytest.mark.parametrize(
    ("preset", "overrides", "message", "hint"),
    [
        ("vits16", ["training.epochs=10"],
         "optimizer.lr.warmup_epochs=10 (at most 9) and losses.dino.targets.temperature.epochs=30 (at most 10) do not fit a run "
         "of 10 epochs",
         "use --set optimizer.lr.warmup_epochs=1 --set losses.dino.targets.temperature.epochs=3, or --epochs 30"),
        ("tiny", ["training.epochs=1"],
         "optimizer.lr.warmup_epochs=1 (at most 0) and heads.dino.freeze_last_layer_epochs=1 (at most 0) do not fit a run of 1 epoch",
         "use --set optimizer.lr.warmup_epochs=0 --set heads.dino.freeze_last_layer_epochs=0, or --epochs 2"),
        ("tiny", [f"losses.dino.targets.temperature={RAMP}"],
         "losses.dino.targets.temperature.epochs=30 (at most 8) does not fit a run of 8 epochs", "temperature.epochs=2, or --epochs 30"),
        ("tiny", [f"teacher.momentum={COSINE}"], "teacher.momentum.warmup_epochs=8 (at most 7) does not", "warmup_epochs=0, or --epochs 9"),
        ("tiny", ["optimizer.weight_decay.warmup_epochs=9"], "optimizer.weight_decay.warmup_epochs=9 (at most 7)", "--epochs 10"),
        ("tiny", ["heads.dino.freeze_last_layer_epochs=8"], "heads.dino.freeze_last_layer_epochs=8 (at most 7)", "--epochs 9"),
        ("tiny", ["backbone.learning.frozen_epochs=8"], "backbone.learning.frozen_epochs=8 (at most 7)", "--epochs 9"),
    ],
)  # fmt: skip
def test_all_schedules_that_do_not_fit_the_run_are_one_error(
    preset: str, overrides: list[str], message: str, hint: str
) -> None:
    with pytest.raises(DinoError) as error:
        start_clock(load_preset(preset, overrides), 5000)
    assert message in error.value.message
    assert hint in error.value.hint
    typed = re.findall(r"--set (\S+?)(?:,|$|\s)", error.value.hint.partition(", or")[0])
    start_clock(load_preset(preset, [*overrides, *typed]), 5000)
    epochs = error.value.hint.rpartition("--epochs ")[2]
    start_clock(load_preset(preset, [*overrides, f"training.epochs={epochs}"]), 5000)


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_presets_fit_their_own_length_and_all_schedules_are_finite(name: str) -> None:
    preset = load_preset(name)
    check_schedules(preset)
    clock = start_clock(preset, preset.training.batch_size * 3)
    for schedule in preset.schedules.values():
        for step in (0, 1, clock.total // 2, clock.total - 1, clock.total):
            assert math.isfinite(schedule.at(replace(clock, step=step)))


def test_packed_pixels_of_other_channels_are_refused(tmp_path: Path, images: Path) -> None:
    pack(image_folder(images), tmp_path / "gray", pixels=True, images=ImagesConfig(channels=1))
    plan(tmp_path / "gray", *of_channels(1))
    with pytest.raises(DinoError, match=r"images.channels=1; expected 3\n"):
        plan(tmp_path / "gray")


def test_a_run_of_one_step_has_a_rate(images: Path) -> None:
    one = ["training.epochs=1", "training.steps_per_epoch=1", "training.batch_size=4", "optimizer.lr.warmup_epochs=0",
           "heads.dino.freeze_last_layer_epochs=0"]  # fmt: skip
    made = plan(images, *one, stop=1)
    assert made.clock.total == 1
    assert made.lr.at(made.clock) == pytest.approx(0.004 * 4 / 256)


def test_the_learning_rate_includes_the_batch_rule(images: Path) -> None:
    made = plan(images, "training.batch_size=512", preset="vits16")
    assert made.lr.start == 5e-4 * 2


@pytest.mark.parametrize(
    ("overrides", "stop", "words"),
    [
        ([], None, []),
        (["heads.dino.prototypes=65536"], None, ["400 steps show 19200 images to 65536 prototypes"]),
        (
            ["optimizer.lr.warmup_epochs=5"],
            None,
            ["more than half of the 400 steps go to the learning rate's warm-up (250)"],
        ),
        (
            ["optimizer.lr.warmup_epochs=5", "heads.dino.freeze_last_layer_epochs=6"],
            None,
            ["steps go to the learning rate's warm-up (250) and the freeze of the prototypes (300)"],
        ),
        (["training.epochs=9", "heads.dino.prototypes=1024"], None, ["450 steps show 21600 images to 1024 prototypes"]),
        (
            ["backbone.learning.frozen_epochs=6"],
            None,
            ["more than half of the 400 steps go to the freeze of the backbone (300)"],
        ),
        (["optimizer.lr.start=1.0", "backbone.learning.trained={kind='lora'}"], None, []),
        (["optimizer.lr.start=1.0"], None, ["a learning rate of 0.19 for 48 images is far from the paper's"]),
        (
            ["losses.dino.targets.temperature={kind='linear_by_epoch', start=0.04, end=0.07, epochs=8}"],
            None,
            ["more than half of the 400 steps go to the teacher temperature's warm-up (400)"],
        ),
    ],
)
def test_unlikely_settings_are_cautioned_with_a_better_value(
    tmp_path: Path, overrides: list[str], stop: int | None, words: list[str]
) -> None:
    preset = load_preset("tiny-dino", overrides)
    source = image_folder(write_images(tmp_path, 48, size=8))
    total = start_clock(preset, 48).total
    plan = Plan("tiny", preset, source, stop or total, Path("x"), torch.device("cpu"), 0, None)
    said = list(cautions(plan))
    assert len(said) == len(words)
    for line, expected in zip(said, words, strict=True):
        assert expected in line
        changed = [value.strip(", ") for value in re.findall(r"--set (\S+)", line)]
        assert changed, "a value is suggested"
        mended = load_preset("tiny-dino", [*overrides, *changed])
        assert not [w for w in cautions(replace(plan, preset=mended)) if expected in w], "the suggested value is valid"


def test_an_early_stop_is_one_note_that_lists_unfinished_schedules(tmp_path: Path) -> None:
    write_images(tmp_path, 48, size=8)
    assert short_stop(plan(tmp_path, stop=400)) == ""
    line = "stops at step 200 of 400; schedules still span the whole run"
    assert short_stop(plan(tmp_path, stop=200)) == line
    low = "views.low_resolution={epochs=3, global_size=32}"
    assert short_stop(plan(tmp_path, low, stop=151)) == line.replace("200", "151")
    assert short_stop(plan(tmp_path, low, stop=40)) == (
        "stops at step 40 of 400; schedules still span the whole run, and it ends within the learning rate's "
        "warm-up (50 steps), the freeze of the prototypes (50 steps) and the epochs of low resolution (150 steps): remove "
        "with --set optimizer.lr.warmup_epochs=0 --set heads.dino.freeze_last_layer_epochs=0 "
        "--set views.low_resolution=none"
    )
    assert not list(cautions(plan(tmp_path, low, stop=40))), "no second note"
    assert "the freeze of the backbone (50 steps)" in short_stop(
        plan(tmp_path, "backbone.learning.frozen_epochs=1", stop=40)
    )


@pytest.mark.parametrize(("accumulate", "said"), [(4, True), (2, False)])
def test_koleo_without_neighbours_is_cautioned(accumulate: int, said: bool, tmp_path: Path) -> None:
    write_images(tmp_path, 48, size=8)
    heads = [f"heads.{head}.batch_norm=false" for head in ("dino", "ibot")]
    made = plan(tmp_path, *heads, "training.batch_size=4", preset="tiny-dinov2", stop=400)
    lines = [
        line for line in cautions(replace(made, accumulate=accumulate)) if line.startswith("losses.koleo has no effect")
    ]
    assert len(lines) == said
    assert not said or lines[0].endswith("a smaller --accumulate, --batch-size 8, or --set losses.koleo=none")


def test_low_resolution_is_an_unfinished_schedule_but_not_a_long_warm_up(tmp_path: Path) -> None:
    write_images(tmp_path, 48, size=8)
    low = "views.low_resolution={epochs=7, global_size=32}"
    assert "the epochs of low resolution (350 steps)" in short_stop(plan(tmp_path, low, stop=60))
    assert not list(cautions(plan(tmp_path, low, stop=400))), "7 of 8 epochs"


def test_a_warm_up_of_two_heads_is_named_once(tmp_path: Path) -> None:
    write_images(tmp_path, 48, size=8)
    freezes = [f"heads.{head}.freeze_last_layer_epochs=2" for head in ("dino", "ibot")]
    line = short_stop(plan(tmp_path, *freezes, preset="tiny-dinov2", stop=10))
    assert line.count("the freeze of the prototypes") == 1
    assert all(f"--set heads.{head}.freeze_last_layer_epochs=0" in line for head in ("dino", "ibot"))


def test_a_large_preset_for_few_images_on_a_cpu_suggests_a_smaller_one(tmp_path: Path) -> None:
    write_images(tmp_path, 200, size=8)
    made = plan(tmp_path, "training.batch_size=128", preset="vits16", stop=800)
    on_cpu, prototypes = cautions(made)
    assert on_cpu == (
        "800 steps of 128 images at 224 pixels may take days on a CPU: --preset tiny takes minutes, and dino doctor "
        f"{tmp_path} suggests settings"
    )
    assert prototypes.endswith(f"--set heads.dino.prototypes=2048, or settings that dino doctor {tmp_path} suggests")
    assert "--epochs" not in on_cpu + prototypes
    assert not list(cautions(plan(tmp_path, stop=400)))


def test_a_run_has_a_phase_for_each_crop_size(tmp_path: Path) -> None:
    images = write_images(tmp_path, 48, size=8)
    whole = plan(images, stop=400)
    assert whole.phases == [(400, whole)]
    low = "views.low_resolution={epochs=3, global_size=32, local_size=16}"
    assert [(n, p.preset.views.global_1.size) for n, p in plan(images, low, stop=400).phases] == [(150, 32), (250, 48)]
    assert [(n, p.preset.views.local.size) for n, p in plan(images, low, stop=151).phases] == [(150, 16), (1, 24)]
    assert [(n, p.preset.views.local.size) for n, p in plan(images, low, stop=150).phases] == [(150, 16)]
    assert [n for n, _ in plan(images, low, stop=0).phases] == [0]


def test_mixed_sizes_are_phases_from_the_smallest_to_the_largest(tmp_path: Path) -> None:
    write_images(tmp_path, 50)
    sizes = "views.mixed=[{global_size=64, share=1}, {global_size=32, local_size=16, share=3}]"
    phases = plan(tmp_path, sizes, stop=100).phases
    assert [(steps, part.preset.views.global_1.size) for steps, part in phases] == [(75, 32), (25, 64)]
    assert [part.preset.views.local.size for _, part in phases] == [16, 24]


def test_the_caution_on_prototypes_never_suggests_more(tmp_path: Path) -> None:
    made = plan(write_images(tmp_path, 4, size=8), "heads.dino.prototypes=32", "training.batch_size=2", stop=400)
    (line,) = cautions(made)
    assert "800 images to 32 prototypes" in line
    assert line.endswith("to train most: --epochs 10")
    longer = ("heads.dino.prototypes=32", "training.batch_size=2", "training.epochs=10")
    assert not list(cautions(plan(tmp_path, *longer, stop=500)))


def test_a_batch_splits_only_into_equal_parts(tmp_path: Path) -> None:
    """In unequal parts, images would have unequal weights."""
    made = plan(write_images(tmp_path, 48, size=8), "heads.dino.batch_norm=false")
    for parts, hint in ((5, "4"), (49, "48"), (32, "24")):
        with pytest.raises(DinoError, match=f"--accumulate {parts} does not split a batch of 48 images") as error:
            replace(made, accumulate=parts)
        assert error.value.hint == f"--accumulate {hint}"
    assert replace(made, accumulate=48).accumulate == 48


def test_decoding_on_the_gpu_needs_one_and_decodes_every_image_anew(tmp_path: Path) -> None:
    usual = plan(write_images(tmp_path / "x", 8), "training.batch_size=8")
    assert usual.decode == "cpu"
    with pytest.raises(DinoError, match="--decode gpu needs a CUDA device; the device of this run is cpu"):
        replace(usual, decode="gpu")
    gpu = replace(usual, decode="gpu", device=torch.device("cuda"))
    with pytest.raises(DinoError, match="--cache keeps decoded images"):
        replace(gpu, cache="ram")
    pack(gpu.source, tmp_path / "shards", per_shard=4)
    with pytest.raises(DinoError, match="shards are read as a stream"):
        replace(gpu, source=open_source(str(tmp_path / "shards")))


def test_accumulation_with_batch_norm_is_cautioned(tmp_path: Path) -> None:
    made = plan(write_images(tmp_path, 48, size=8), stop=400)
    (line,) = cautions(replace(made, accumulate=4))
    assert "normalizes over 12 images instead of the whole batch" in line
    without = plan(tmp_path, "heads.dino.batch_norm=false", stop=400)
    assert not list(cautions(replace(without, accumulate=4)))
    network = plan(tmp_path, "backbone={name='resnet18'}", "heads.dino.batch_norm=false", stop=400)
    (line,) = cautions(replace(network, accumulate=4))
    assert line.endswith("12 images instead of the whole batch: --accumulate 1 with a smaller --batch-size")


GRAPHS = [
    (torch.device("cpu"), {}, "--graph needs a CUDA device; this run trains on cpu"),
    (torch.device("cuda"), {"accumulate": 2}, "--graph captures whole batches; --accumulate is 2"),
    (torch.device("cuda"), {"recompute": True}, "--graph cannot capture activation checkpointing"),
]


@pytest.mark.parametrize(("device", "options", "words"), GRAPHS)
def test_graphs_need_cuda_and_whole_batches(tmp_path: Path, device: torch.device, options: dict, words: str) -> None:
    whole = plan(write_images(tmp_path, 8, size=8), "training.batch_size=4")
    with pytest.raises(DinoError, match=re.escape(words)) as error:
        replace(whole, device=device, graph=True, **options)
    assert error.value.hint
    assert replace(whole, device=torch.device("cuda"), graph=True).captures


def test_a_run_on_cuda_is_captured_by_default_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(write_images(tmp_path, 8, size=8), "training.batch_size=4")
    on_cuda = replace(whole, device=torch.device("cuda"))
    assert on_cuda.captures and not whole.captures
    others: list[dict[str, Any]] = [{"accumulate": 2}, {"recompute": True}, {"graph": False}]
    assert not any(replace(on_cuda, **changes).captures for changes in others)
    monkeypatch.setattr("dinocli.train.plan.size", lambda: 2)
    assert not on_cuda.captures


def test_graphs_need_a_run_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(write_images(tmp_path, 8, size=8), "training.batch_size=4")
    monkeypatch.setattr("dinocli.train.plan.size", lambda: 2)
    with pytest.raises(DinoError, match="--graph trains in one process; this run has 2"):
        replace(whole, device=torch.device("cuda"), graph=True)

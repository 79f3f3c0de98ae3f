"""Advice: the rules at their limits, and valid commands."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import replace

import pytest
import torch

from dinocli.apps.doctor.advice import WEIGHTS, Advised, advise
from dinocli.apps.doctor.inspection import Inspection, Spread
from dinocli.apps.doctor.machine import Machine
from dinocli.core.errors import DinoError
from dinocli.method.preset import Preset, load_preset
from dinocli.train import cost as costs
from dinocli.train import plan as planning
from dinocli.train import pretrain as pretraining
from dinocli.train.cost import Estimate

GB = 10**9
GPU = Machine(
    python="3.11", torch="2.11.0", torchvision="0.26", timm="1.0.26", dinocli="0", device="cuda", name="A GPU", devices=1,
    memory=80 * GB, memory_there=80 * GB, cores=16, cores_there=16, ram=64 * GB, ram_there=64 * GB,
    folder="/", disk=100 * GB, formats=[], fast_jpeg=True, faults={},
)  # fmt: skip
CPU = replace(GPU, device="cpu", memory=64 * GB)


def images(count: int | None, side: int = 400, **facts: object) -> Inspection:
    spread = Spread(*[float(side)] * 5)
    drawn = 100
    inspection = Inspection(
        where="./my images", kind="files", count=count, classes=0, drawn=drawn, read=drawn, formats={"JPEG": drawn},
        width=spread, height=spread, short=spread, aspect=Spread(1, 1, 1, 1, 1), megabytes=3e-6 * side**2, deep=0, gray=0,
        flat=0, bad={}, copies=0, near=0, pairs=[], mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), milliseconds=2.0, seconds=1.0,
    )  # fmt: skip
    return replace(inspection, **facts)  # type: ignore[arg-type]


def cost(preset: Preset, steps: int, again: bool) -> Estimate:
    """Estimate 1 GB plus 0.1 GB per image, or 0.03 GB with activation checkpointing; a step takes a second."""
    batch = preset.training.batch_size
    return Estimate(1, 1, 1.0, GB, 0.0, (0.03 if again else 0.1) * GB, batch, batch, float(steps))


def preset_of(advised: Advised) -> Preset:
    """Return the preset that the command would train."""
    overrides = [override for advice in advised.settings for override in advice.overrides]
    return load_preset(name_of(advised), overrides)


def name_of(advised: Advised) -> str:
    return value_of(advised, "--preset") or ""


def value_of(advised: Advised, key: str) -> str | None:
    values = [advice.settings[key] for advice in advised.settings if key in advice.settings]
    assert len(values) <= 1
    return values[0] if values else None


def test_a_cpu_gets_the_preset_tiny_with_the_measured_settings() -> None:
    advised = advise(CPU, images(9_469, 128), cost)
    assert name_of(advised) == "tiny"
    preset, shipped = preset_of(advised), load_preset("tiny-dino")
    assert preset.training.epochs == 40
    assert preset.heads == shipped.heads
    assert preset.views == shipped.views
    assert preset.teacher == shipped.teacher
    assert value_of(advised, "--init") is None
    assert preset_of(advise(CPU, images(47), cost)).training.batch_size == 32
    assert preset_of(advise(CPU, images(48), cost)).training.batch_size == 48


def test_minutes_choose_a_measured_run() -> None:
    short = advise(CPU, images(9_469, 128), cost, minutes=3)
    assert (name_of(short), preset_of(short).training.epochs) == ("tiny-muon", 9)
    assert value_of(short, "--epochs") == "9"
    assert any("2.2 of 3 core minutes, as measured on Imagenette" in advice.reason for advice in short.settings)
    assert short.command and "--preset tiny-muon --batch-size 48 --epochs 9" in short.command
    with pytest.raises(DinoError, match="--minutes 1 is less than any measured run"):
        advise(CPU, images(9_469, 128), cost, minutes=1)
    with pytest.raises(DinoError, match="--minutes 3 needs measured runs"):
        advise(GPU, images(9_469, 128), cost, minutes=3)


@pytest.mark.parametrize(
    ("count", "prototypes"),
    [
        (500, 1024),
        (1_999, 1024),
        (2_000, 4096),
        (19_999, 4096),
        (20_000, 8192),
        (99_999, 8192),
        (100_000, 16384),
        (999_999, 16384),
        (1_000_000, 65536),
    ],
)
def test_prototypes_grow_with_the_images(count: int, prototypes: int) -> None:
    assert preset_of(advise(GPU, images(count), cost)).heads["dino"].prototypes == prototypes


@pytest.mark.parametrize(
    ("count", "batch"),
    [(32, 32), (4_095, 32), (4_096, 64), (8_191, 64), (9_469, 128), (32_767, 256), (32_768, 512), (10_000_000, 512)],
)
def test_the_batch_size_keeps_64_steps_per_epoch(count: int, batch: int) -> None:
    preset = preset_of(advise(GPU, images(count), cost))
    assert preset.training.batch_size == batch
    assert batch == 32 or count // batch >= 64


@pytest.mark.parametrize(
    ("count", "epochs"),
    [
        (49_999, 100),
        (50_000, 800),
        (100_000, 513),
        (640_000, 100),
        (1_281_167, 100),
        (12_811_670, 10),
        (200_000_000, 1),
    ],
)
def test_the_number_of_epochs_gives_a_sensible_length(count: int, epochs: int) -> None:
    preset = preset_of(advise(GPU, images(count), cost))
    assert preset.training.epochs == epochs
    rate = preset.optimizer.lr
    assert rate.warmup_epochs == min(10, epochs // 10)  # type: ignore[union-attr]
    assert preset.heads["dino"].freeze_last_layer_epochs == (1 if epochs > 1 else 0)


def test_few_images_start_from_released_weights_if_the_patch_size_fits() -> None:
    assert value_of(advise(GPU, images(49_999), cost), "--init") == WEIGHTS
    assert value_of(advise(GPU, images(50_000), cost), "--init") is None
    assert value_of(advise(GPU, images(49_999, side=128), cost), "--init") == WEIGHTS  # still patches of 16
    assert value_of(advise(GPU, images(49_999, side=96), cost), "--init") is None  # patches of 8


@pytest.mark.parametrize(
    ("side", "size", "patch", "local"),
    [
        (500, 224, 16, 96),
        (157, 224, 16, 96),
        (156, 144, 16, 64),
        (128, 128, 16, 48),
        (127, 120, 8, 48),
        (96, 96, 8, 40),
        (65, 64, 8, 24),
        (64, 64, 8, None),
        (32, 32, 4, None),
        (28, 28, 2, None),
        (9, 16, 2, None),
    ],
)
def test_crops_and_patches_follow_the_images(side: int, size: int, patch: int, local: int | None) -> None:
    preset = preset_of(advise(GPU, images(60_000, side), cost))
    views = preset.views
    assert [view.size for view in views.globals] == [size, size]
    assert preset.backbone.options.get("patch_size", 16) == patch
    assert preset.backbone.options.get("img_size", size) == size
    if local is None:
        assert (views.locals, [view.blur for view in views.globals]) == (0, [0, 0])
        assert views.global_1.scale == (0.14, 1.0)
    else:
        assert views.local is not None
        assert (views.locals, views.local.size) == (8, local)
        assert views.global_1.blur == 1.0


def test_the_momentum_is_high_for_a_small_batch_in_a_long_run() -> None:
    def momentum(count: int, side: int) -> float:
        return preset_of(advise(GPU, images(count, side), cost)).teacher.momentum.bounds[0]

    assert momentum(30_000, 96) == 0.9995  # batch 256, 93,600 steps
    assert momentum(33_000, 96) == 0.996  # batch 512
    assert momentum(30_000, 224) == 0.996  # 100 epochs from weights: 11,700 steps
    assert momentum(1_000, 96) == 0.996  # 24,800 steps


@pytest.mark.parametrize(
    ("memory", "parts", "again"),
    [
        (80, None, False),
        (58, None, False),
        (57, "2", False),
        (30, "2", False),
        (29, "4", False),
        (3, "32", False),  # sixteen at once take 2.6
        (2.8, "16", True),  # fewer than 16 do not fill a device: 32 at once with checkpointing take 1.96
        (1.7, "32", True),
        (1.6, "64", True),
        (1.15, "512", True),
        (1.1, None, False),
    ],
)
def test_a_batch_is_split_into_as_few_parts_as_fit_in_memory(memory: float, parts: str | None, again: bool) -> None:
    # 512 images take 52.2 GB, 256 26.6, 128 13.8; nine tenths of the memory are for them.
    advised = advise(replace(GPU, memory=int(memory * GB)), images(1_000_000), cost)
    assert value_of(advised, "--accumulate") == parts
    assert ("--recompute" in shlex.split(advised.command or "")) == again
    assert any("do not fit" in note for note in advised.notes) == (memory == 1.1)


def test_the_duration_is_noted() -> None:
    assert any(
        "117,187 steps of 512" in n or "195,300 steps of 512" in n for n in advise(GPU, images(1_000_000), cost).notes
    )
    assert any(
        "195,300 steps of 512 take about 2.3 days on A GPU" in note
        for note in advise(GPU, images(1_000_000), cost).notes
    )
    assert any("33 min" in note for note in advise(CPU, images(1_000_000), cost).notes)


def test_notes_advise_on_a_flat_loss_and_a_short_run() -> None:
    notes = advise(GPU, images(9_469), cost).notes
    assert any("8.32, which is ln 4096" in note and "temperature.value=0.02" in note for note in notes)
    assert any("7,300 steps are few" in note for note in notes)
    assert not any("steps are few" in note for note in advise(GPU, images(45_000), cost).notes[:-1])
    assert not any("ln 8192" in note for note in advise(GPU, images(50_000), cost).notes)


def test_images_are_cached_if_they_fit_in_half_the_memory() -> None:
    # 60,000 images of 400 pixels take 28.8 GB uncompressed.
    assert value_of(advise(replace(GPU, ram=58 * GB), images(60_000), cost), "--cache") == "ram"
    assert value_of(advise(replace(GPU, ram=57 * GB), images(60_000), cost), "--cache") is None
    # Larger images are cached at the 430 pixels that the smallest local crop needs: 33.3 GB.
    assert value_of(advise(replace(GPU, ram=67 * GB), images(60_000, 4000), cost), "--cache") == "ram"
    assert value_of(advise(replace(GPU, ram=66 * GB), images(60_000, 4000), cost), "--cache") is None
    for kind in ("shards", "decoded"):
        assert value_of(advise(GPU, images(1_000, kind=kind), cost), "--cache") is None
    assert value_of(advise(GPU, images(None), cost), "--cache") is None


def test_truncated_images_are_accepted_if_the_run_would_stop_otherwise() -> None:
    torn = {str(i): "truncated: 9 bytes" for i in range(6)}
    broken = {str(i): "damaged: x" for i in range(6)}
    assert preset_of(advise(GPU, images(60_000, bad=torn), cost)).images.truncated
    few = dict(list(torn.items())[:5])
    assert value_of(advise(GPU, images(60_000, bad=few), cost), "images.truncated") is None
    advised = advise(GPU, images(60_000, bad=broken), cost)
    assert value_of(advised, "images.truncated") is None
    assert any("6 of 100 cannot be read" in note for note in advised.notes)


def test_dark_deep_images_and_many_near_duplicates_are_noted() -> None:
    def notes(**facts: object) -> str:
        return " ".join(advise(GPU, images(60_000, **facts), cost).notes)

    assert "images.window" in notes(deep=51, mean=(0.05, 0.05, 0.05))
    assert "images.window" not in notes(deep=51)
    assert "images.window" not in notes(deep=49, mean=(0.05, 0.05, 0.05))
    assert "thumbnails" in notes(near=21)
    assert "thumbnails" not in notes(near=20)


def test_a_measured_window_is_in_the_command() -> None:
    advised = advise(
        GPU, images(60_000, deep=100, narrow=90, window=(0.0, 100.0), mean=(0.5,) * 3, std=(0.2,) * 3), cost
    )
    assert advised.command and "'images.window=[0, 100]'" in advised.command
    assert preset_of(advised).images.window == (0, 100)
    assert any("90 of 100 images" in advice.reason for advice in advised.settings)
    assert not any("[BLACK, WHITE]" in note for note in advised.notes)


def test_channels_without_variance_get_the_presets_std() -> None:
    advised = advise(GPU, images(60_000, single=100, mean=(0.001,) * 3, std=(0.0002,) * 3), cost)
    assert advised.command and "0.001," not in (value_of(advised, "views.std") or "")
    assert min(preset_of(advised).views.std) > 0.2
    assert any("100 of 100 images are a single color" in note for note in advised.notes)
    one = advise(GPU, images(60_000, mean=(0.5,), std=(0.0,)), cost, ["images.channels=1"])
    assert preset_of(one).views.std == pytest.approx((0.226,), abs=0.001), "the preset's, on average"
    blue = preset_of(advise(GPU, images(60_000, mean=(0.1, 0.1, 0.0), std=(0.2, 0.2, 0.0)), cost)).views.std
    assert blue == pytest.approx((0.2, 0.2, 0.226), abs=0.001)


def test_pages_that_are_not_read_are_noted() -> None:
    assert "3 of 100 have several pages" in " ".join(advise(GPU, images(60_000, several=3), cost).notes)


def test_too_few_images_get_no_command() -> None:
    for facts in (images(31), images(1), images(3_000, read=1), images(50, read=50)):
        advised = advise(CPU, facts, cost)
        assert (advised.settings, advised.command) == ([], None)
        assert "dino extract" in advised.notes[-1]
    assert "none of the 100" in advise(CPU, images(40, read=0, bad={"a": "empty: x"}), cost).notes[-1]
    assert advise(CPU, images(32), cost).command


COMMANDS = [
    (machine, images(count, side))
    for machine in (CPU, replace(GPU, memory=8 * GB))
    for count, side in [
        (32, 300),
        (9_469, 128),
        (60_000, 28),
        (60_000, 96),
        (1_281_167, 400),
        (10**7, 64),
        (10**9, 500),
        (None, 224),
    ]
]


@pytest.mark.parametrize(
    ("machine", "facts"), COMMANDS, ids=lambda v: f"{getattr(v, 'count', '')}{getattr(v, 'device', '')}"
)
def test_each_recommended_command_starts_the_advised_plan(
    machine: Machine, facts: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.cli import main
    from dinocli.data.sources import several

    command = advise(machine, facts, cost).command
    assert command
    dino, verb, where, *words = shlex.split(command)
    assert (dino, verb, where) == ("dino", "pretrain", "./my images")
    plans: list[planning.Plan] = []
    source = type(
        "Source", (), {"count": facts.count, "where": where, "fingerprint": "0", "notes": (), "in_files": True}
    )()
    monkeypatch.setattr(several, "open_sources", lambda specs: source)
    monkeypatch.setattr(
        costs, "estimate", lambda plan: plans.append(plan) or Estimate(1, 1, 1.0, 1.0, 1.0, 1.0, 1, 1, 1.0)
    )
    monkeypatch.setattr(
        "dinocli.apps.doctor.inspection.warn_of", lambda source, images: []
    )  # there are none to look at
    monkeypatch.setattr(pretraining, "rehearse", lambda plan, note: None)  # it would download released weights
    monkeypatch.setattr(sys, "argv", ["dino", verb, where, *words, "--device", "cpu", "--dry-run", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    (plan,) = plans
    assert plan.preset == preset_of(advise(machine, facts, cost))
    assert plan.stop == plan.clock.total > 0
    assert math.isfinite(plan.lr.at(plan.clock))
    assert plan.accumulate == int(value_of(advise(machine, facts, cost), "--accumulate") or 1)
    # The start of the run gives no cautions, except for very few images. The plan above is for this machine's CPU.
    on_device = replace(plan, device=torch.device(machine.device.partition(":")[0]))
    assert not list(planning.cautions(on_device)) or facts.count == 32


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channel_counts_get_mean_and_std_and_no_color_jitter(machine: Machine, channels: int) -> None:
    mean, std = tuple(0.01 * i for i in range(channels)), (0.2, *[0.0] * (channels - 1))
    overrides = [f"images.channels={channels}", "images.window=[0, 9000]"]
    advised = advise(machine, images(60_000, mean=mean, std=std), cost, overrides)
    preset = preset_of(advised)
    assert preset.views.mean == pytest.approx(mean, abs=1e-4)
    assert preset.views.std == (0.2, *[0.226] * (channels - 1)), "a constant channel gets the preset's std"
    assert (preset.images.channels, preset.images.window) == (channels, (0, 9000))
    assert preset.backbone.options["in_chans"] == channels
    assert preset.views.color_keys == []
    jitter = preset.views.global_1.jitter
    assert jitter is not None
    assert jitter.brightness > 0


def test_three_channels_get_mean_and_std_only_if_far_from_the_presets() -> None:
    for facts in ({}, {"mean": (0.465, 0.461, 0.432), "std": (0.276, 0.275, 0.297)}):
        assert value_of(advise(GPU, images(60_000, **facts), cost), "views.mean") is None
    for facts in ({"mean": (0.1, 0.1, 0.1)}, {"std": (0.05, 0.2, 0.2)}, {"std": (0.2, 0.4, 0.2)}):
        assert value_of(advise(CPU, images(60_000, **facts), cost), "views.mean"), facts
    released = advise(GPU, images(3_000, mean=(0.1, 0.1, 0.1)), cost)
    assert value_of(released, "--init")
    assert value_of(released, "views.mean") is None, "released weights need the mean and std of their training"


def test_files_with_other_channels_are_noted_with_the_setting() -> None:
    bad = {f"{i}.npy": "other channels: an array of 8x8x13; expected 3 (images.channels)" for i in range(6)}
    for facts in (images(60_000, bad=bad), images(60_000, bad=bad, read=0)):
        notes = " ".join(advise(GPU, facts, cost).notes)
        assert "6 of 100 have other channels: an array of 8x8x13" in notes
        assert "--set images.channels=N" in notes
        assert "cannot be read, and above" not in notes

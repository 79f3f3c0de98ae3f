from __future__ import annotations

import json
from pathlib import Path

import pytest

from dinocli import shipped
from dinocli.errors import DinoError
from dinocli.preset import Preset, load_preset


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_preset_is_valid_and_survives_its_stored_form(name: str) -> None:
    preset = load_preset(name)
    assert Preset.parse(json.loads(preset.model_dump_json()), name) == preset
    assert preset.about.command.startswith("dino pretrain ")
    assert f"--preset {name}" in preset.about.command


def test_overrides_are_toml_values_and_none_takes_a_key_out() -> None:
    preset = load_preset(
        "vitb16",
        [
            "training.epochs=20",
            "optimizer.lr.start=1e-3",
            "views.local.scale=[0.1, 0.2]",
            "optimizer.clip=none",
            "backbone.positions=antialias",
        ],
    )
    assert preset.training.epochs == 20
    assert preset.optimizer.lr.start == 1e-3
    assert preset.views.local.scale == (0.1, 0.2)
    assert preset.optimizer.clip is None
    assert preset.backbone.positions == "antialias"
    assert load_preset("vitb16", ["views.local=none"]).views.all == preset.views.globals


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("optimizer.lr.strat=1", "no key optimizer.lr.strat", "optimizer.lr.start"),
        ("optimzer.lr.start=1", "no key optimzer", "optimizer"),
        ("losses.dino.targets.momentun=0.5", "no key losses.dino.targets.momentun", "losses.dino.targets.momentum"),
        ("heads.dino.prototype=9", "no key heads.dino.prototype", "heads.dino.prototypes"),
        (
            "training.epochs=0",
            "training.epochs should be greater than or equal to 1; it is 0",
            "--set training.epochs=",
        ),
        ("training.epochs=abc", "training.epochs should be a valid integer", "--set training.epochs="),
        ("teacher.momentum.kind=sine", "teacher.momentum", "--set"),
        ("losses.dino.head=other", "losses.dino.head is 'other'; the heads are dino", "--set"),
        ("optimizer.lr=none", "optimizer.lr is missing", "--set optimizer.lr="),
        ("training.epochs", "--set wants key.path=value", "--set training.epochs=10"),
        ("training.epochs.more=1", "epochs is a value and not a table", "--set"),
        ("losses.dino=none", "at least one loss", "--set"),
        ("training.epochs=5", "a warm-up of 10 epochs does not fit a run of 5", "--set"),
    ],
)
def test_a_mistake_names_its_key_and_the_nearest(override: str, message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        load_preset("vits16", [override])
    assert message in error.value.message
    assert hint in error.value.hint
    assert "\n" not in error.value.message + error.value.hint


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(DinoError, match="vits61") as error:
        load_preset("vits61")
    assert "vits16" in error.value.hint


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(shipped.text("tiny"))
    assert load_preset(str(path)) == load_preset("tiny")
    path.write_text("epochs = = 3")
    with pytest.raises(DinoError, match="not valid TOML"):
        load_preset(str(path))
    with pytest.raises(DinoError, match="does not exist"):
        load_preset(str(tmp_path / "none.toml"))


# facebookresearch/dino, args.txt of the released checkpoints (of ResNet-50's transcripts the one with lr 0.3).
RELEASED = {
    "vits16": {
        "backbone.name": "vit_small_patch16_224",
        "backbone.drop_path": 0.1,
        "training.epochs": 800,
        "training.batch_size": 1024,
        "optimizer.kind": "adamw",
        "optimizer.lr.start": 5e-4,
        "optimizer.lr.end": 1e-5,
        "optimizer.lr.warmup_epochs": 10,
        "optimizer.weight_decay.start": 0.04,
        "optimizer.weight_decay.end": 0.4,
        "optimizer.clip": None,
        "heads.dino.prototypes": 65536,
        "heads.dino.norm_last_layer": False,
        "heads.dino.freeze_last_layer_epochs": 1,
        "heads.dino.batch_norm": False,
        "losses.dino.targets.temperature.start": 0.04,
        "losses.dino.targets.temperature.end": 0.07,
        "losses.dino.targets.temperature.epochs": 30,
        "teacher.momentum.start": 0.996,
        "teacher.momentum.end": 1.0,
        "views.global_1.scale": [0.25, 1.0],
        "views.global_2.scale": [0.25, 1.0],
        "views.locals": 10,
        "views.local.scale": [0.05, 0.25],
    },
    "vits8": {
        "backbone.name": "vit_small_patch8_224",
        "backbone.drop_path": 0.1,
        "training.epochs": 800,
        "training.batch_size": 1024,
        "optimizer.lr.start": 5e-4,
        "optimizer.lr.end": 1e-6,
        "optimizer.clip.norm": 3.0,
        "heads.dino.norm_last_layer": False,
        "heads.dino.freeze_last_layer_epochs": 1,
        "losses.dino.targets.temperature.start": 0.04,
        "losses.dino.targets.temperature.end": 0.07,
        "losses.dino.targets.temperature.epochs": 30,
        "views.global_1.scale": [0.4, 1.0],
        "views.global_2.scale": [0.4, 1.0],
        "views.locals": 10,
        "views.local.scale": [0.05, 0.4],
    },
    "vitb16": {
        "backbone.name": "vit_base_patch16_224",
        "training.epochs": 400,
        "training.batch_size": 1024,
        "optimizer.lr.start": 7.5e-4,
        "optimizer.lr.end": 2e-6,
        "optimizer.clip.norm": 0.3,
        "heads.dino.norm_last_layer": True,
        "heads.dino.freeze_last_layer_epochs": 3,
        "losses.dino.targets.temperature.start": 0.04,
        "losses.dino.targets.temperature.epochs": 50,
        "views.global_1.scale": [0.25, 1.0],
        "views.locals": 10,
        "views.local.scale": [0.05, 0.25],
    },
    "vitb8": {
        "backbone.name": "vit_base_patch8_224",
        "training.epochs": 300,
        "training.batch_size": 1056,
        "optimizer.lr.start": 5e-4,
        "optimizer.lr.end": 2e-6,
        "optimizer.clip.norm": 3.0,
        "heads.dino.norm_last_layer": True,
        "heads.dino.freeze_last_layer_epochs": 3,
        "losses.dino.targets.temperature.start": 0.03,
        "losses.dino.targets.temperature.epochs": 50,
        "views.global_1.scale": [0.25, 1.0],
        "views.locals": 10,
        "views.local.scale": [0.05, 0.25],
    },
    "resnet50": {
        "backbone.name": "resnet50",
        "backbone.drop_path": 0.0,
        "training.epochs": 800,
        "training.batch_size": 4080,
        "optimizer.kind": "lars",
        "optimizer.lr.start": 0.3,
        "optimizer.lr.end": 0.0048,
        "optimizer.lr.warmup_epochs": 10,
        "optimizer.weight_decay.value": 1e-6,
        "optimizer.clip": None,
        "heads.dino.prototypes": 60000,
        "heads.dino.norm_last_layer": True,
        "heads.dino.batch_norm": True,
        "heads.dino.freeze_last_layer_epochs": 1,
        "losses.dino.targets.temperature.start": 0.04,
        "losses.dino.targets.temperature.epochs": 50,
        "views.global_1.scale": [0.14, 1.0],
        "views.locals": 6,
        "views.local.scale": [0.05, 0.14],
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_recipe_has_the_originals_settings(name: str) -> None:
    resolved = load_preset(name).model_dump(mode="json")
    common = {
        "optimizer.lr_rule": {"kind": "linear", "batch": 256},
        "losses.dino.student_temperature": 0.1,
        "losses.dino.targets.momentum": 0.9,
        "teacher.momentum.start": 0.996,
        "teacher.momentum.end": 1.0,
        "heads.dino.hidden": 2048,
        "heads.dino.bottleneck": 256,
        "heads.dino.layers": 3,
        "views.global_1.size": 224,
        "views.local.size": 96,
        "views.global_1.blur": 1.0,
        "views.global_2.blur": 0.1,
        "views.local.blur": 0.5,
        "views.global_1.solarize": 0.0,
        "views.global_2.solarize": 0.2,
        "views.local.solarize": 0.0,
        "views.global_1.gray": 0.2,
        "views.local.flip": 0.5,
        "views.global_2.jitter": {
            "probability": 0.8,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
        },
    }
    for path, expected in (common | RELEASED[name]).items():
        value = resolved
        for key in path.split("."):
            value = value[key]
        assert value == expected, path

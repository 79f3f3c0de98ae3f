from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import of_channels

from dinocli.core.errors import DinoError
from dinocli.method import shipped
from dinocli.method.preset import Preset, load_preset


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_preset_is_valid_and_equals_its_stored_form(name: str) -> None:
    preset = load_preset(name)
    assert Preset.parse(json.loads(preset.model_dump_json()), name) == preset
    assert preset.about.command.startswith(("dino pretrain ", "dino adapt ", "dino finetune "))
    assert name == "finetune" or f"--preset {name}" in preset.about.command


def test_overrides_are_toml_values_and_none_removes_a_key() -> None:
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
        ("training.epochs", "is not an assignment; expected key.path=value", "--set training.epochs=10"),
        ("training.epochs.more=1", "epochs is a single value, not a table", "--set"),
        ("losses.dino=none", "at least one loss", "--set"),
        ("views.global_1.size=160", "sizes 160 and 224; expected one size", "--set views.global_2.size=160"),
        ("teacher.momentum.end=1.5", "teacher.momentum.end is 1.5; expected from 0 to 1", "--set teacher.momentum.end=0.996"),
        ("teacher.momentum.start=1.0", "teacher.momentum is always 1, and the teacher would never change", "momentum.start=0.996"),
        ("optimizer.lr.start=-1", "optimizer.lr.start is -1; expected 0 or more", "--set optimizer.lr.start=0.0005"),
        ("optimizer.weight_decay.end=-1", "optimizer.weight_decay.end is -1; expected 0 or more", "--set optimizer"),
        ("losses.dino.targets.temperature.start=0", "temperature.start is 0; expected 1e-06 or more", "start=0.04"),
        ("losses.dino.targets.temperature={kind='cosine', start=0.04, end=0.07, warmup_epochs=2}",
         "temperature.warmup_epochs is 2, and a temperature cannot start from 0", "warmup_epochs=0"),
        ("optimizer.lr={kind='constant', value=0}", "optimizer.lr is always 0, and nothing would be trained", "value=0.0005"),
        ("optimizer.lr={kind='constant', value=1e38}", "makes optimizer.lr infinite", "--set optimizer.lr.value=0.0005"),
        ("training.epcohs=none", "no key training.epcohs", "training.epochs"),
        ("lr=0.1", "no key lr", "did you mean optimizer.lr.start?"),
        ("training.lr=0.1", "no key training.lr", "did you mean optimizer.lr.start?"),
        ("momentum=0.9", "no key momentum", "did you mean teacher.momentum.start or losses.dino.targets.momentum?"),
        ("out_dim=9", "no key out_dim", "heads.dino.prototypes"),
        ("patch_size=8", "no key patch_size", "backbone.options.patch_size"),
        ("prototype=9", "no key prototype", "heads.dino.prototypes"),
        ("warmup=1", "no key warmup", "optimizer.lr.warmup_epochs"),
        ("xyzzy=1", "no key xyzzy", "remove xyzzy"),
        ("optimizer.lr=0.1", "0.1 is a single value; optimizer.lr is a table",
         "--set optimizer.lr.start=0.1 keeps the schedule; --set 'optimizer.lr={kind=\"constant\", value=0.1}' replaces it"),
        ("losses.dino.targets.temperature=0.1", "temperature is a table", '{kind="constant", value=0.1}'),
        ("optimizer.lr=nan", "optimizer.lr is a table", "optimizer.lr.start=NUMBER"),
        ("optimizer.weight_decay=abc", "optimizer.weight_decay is a table", "optimizer.weight_decay.start=NUMBER"),
        ("optimizer=sgd", "optimizer is a table", "--set optimizer.kind=sgd"),
        ("views=3", "views is a table", "--set views.locals=3"),
        ("optimizer.kind=adam", "optimizer.kind is 'adam'; expected 'adamw', 'sgd', 'lars', 'muon'", "--set optimizer.kind=adamw"),
        ("optimizer.lr={start=0.1}", "optimizer.lr.kind is missing", "--set optimizer.lr.kind=cosine"),
        ("optimizer.lr.kind=constant", "optimizer.lr.value is missing, and this kind has no key start, end, warmup_epochs",
         "--set 'optimizer.lr={kind=\"constant\", value=VALUE}'"),
        ("optimizer.clip=3.0", "optimizer.clip is 3.0; expected a table", 'optimizer.clip={kind="each_parameter", norm=3.0}'),
        ("training.precision=fp16", "it is 'fp16'", "--set training.precision=float16"),
        ("views.mean=[0.5,", "is not valid TOML", "quote all of it"),
    ],
)  # fmt: skip
def test_errors_name_the_wrong_key_and_suggest_a_valid_one(override: str, message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        load_preset("vits16", [override])
    assert message in error.value.message
    assert hint in error.value.hint
    assert "\n" not in error.value.message + error.value.hint


@pytest.mark.parametrize(
    ("mixed", "changed", "message", "hint"),
    [
        ("[{global_size=48, share=0}]", [], "share should be greater than 0", "--set"),
        ("[{share=1}]", [], "global_size is missing", "--set"),
        ("[{global_size=48, local_size=24, share=1}]", ["views.local=none"], "there are no local views", "global_size=48"),
        (
            "[{global_size=48, share=1}]",
            ["views.low_resolution={epochs=2, global_size=24}"],
            "views.mixed and views.low_resolution both set the size",
            "--set views.low_resolution=none",
        ),
        ("[{global_size=48, share=1}, {global_size=60, share=1}]", [], "a global_size of 60; expected", "global_size=64 in table 2"),
        ("[{global_size=48, local_size=20, share=1}]", [], "a local_size of 20; expected", "local_size=16 in table 1"),
    ],
)  # fmt: skip
def test_mixed_sizes_that_do_not_fit_suggest_some_that_do(
    mixed: str, changed: list[str], message: str, hint: str
) -> None:
    with pytest.raises(DinoError) as error:
        load_preset("tiny-dino", [f"views.mixed={mixed}", *changed]).method()
    assert message in error.value.message
    assert hint in error.value.hint


SIMDINO = "losses.simdino={weight=1, head='dino', eps=0.05, with_teacher=true}"


@pytest.mark.parametrize(
    ("preset", "changed", "message", "hint"),
    [
        ("tiny", [SIMDINO], "losses.simdino compares features, and heads.dino has 256 prototypes", "--set heads.dino={hidden"),
        ("tiny", ["heads.dino={hidden=8, bottleneck=4, layers=2}"], "losses.dino needs prototypes, and heads.dino has none",
         "prototypes=65536, norm_last_layer=true"),
        ("tiny", ["heads.dino={prototypes=8, hidden=8, bottleneck=4, layers=2}"],
         "heads.dino has prototypes, and norm_last_layer is not set", "--set heads.dino.norm_last_layer=true"),
        ("tiny-simdino", ["heads.features.norm_last_layer=true"],
         "heads.features.norm_last_layer is set, and the head has no prototypes", "--set heads.features.norm_last_layer=none"),
        ("tiny-simdino", ["heads.features.freeze_last_layer_epochs=1"], "the head has no prototypes", "freeze_last_layer_epochs=none"),
        ("tiny-simdino", ["losses.simdino_patches={weight=1, head='features'}"],
         "losses.simdino_patches needs masked patches", "views.mask={share=0.5"),
        ("tiny-simdino", ["losses.simdino.head=x"], "losses.simdino.head is 'x'; the heads are features", "--set"),
    ],
)  # fmt: skip
def test_heads_fit_their_losses(preset: str, changed: list[str], message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        load_preset(preset, changed)
    assert message in error.value.message
    assert hint in error.value.hint


def test_a_stored_preset_without_prototypes_loads_again() -> None:
    preset = load_preset("tiny-simdino")
    assert Preset.parse(preset.model_dump(mode="json"), "stored") == preset


def test_visible_patches_need_masks() -> None:
    """With a frozen teacher, iBOT runs without masks, and then there are no visible patches apart."""
    frozen = ["teacher.frozen=true", "views.mask=none"]
    assert load_preset("tiny-dinov2", frozen).losses.ibot.visible == 0
    with pytest.raises(DinoError, match=r"losses\.ibot\.visible is 0\.5, and views.mask is not set") as error:
        load_preset("tiny-dinov2", [*frozen, "losses.ibot.visible=0.5"])
    assert "--set losses.ibot.visible=0" in error.value.hint


@pytest.mark.parametrize(
    ("table", "changed", "message", "hint"),
    [
        ("epochs=8, global_size=32", [], "low_resolution.epochs is 8 in a run of 8; expected fewer", ".epochs=4"),
        ("epochs=1, global_size=32", ["training.epochs=1"], "in a run of 1; expected fewer", "=none"),
        ("epochs=0, global_size=32", [], "should be greater than or equal to 1", "--set"),
        ("global_size=32", [], "the key views.low_resolution.epochs is missing", "--set"),
        ("epochs=4, global_size=32, local=8", [], "there is no key views.low_resolution.local", "local_size"),
        ("epochs=4, global_size=32, local_size=16", ["views.local=none"], "no local views", ".local_size=none"),
        ("epochs=4, global_size=32, local_size=16", ["views.locals=0"], "no local views", ".local_size=none"),
        (
            "epochs=4, global_size=48",
            [],
            "global_size is 48; expected less than the full 48 and a whole",
            ".global_size=24",
        ),
        (
            "epochs=4, global_size=36",
            [],
            "low_resolution.global_size is 36; expected less than the full 48 and a whole number of patches of 8 pixels",
            ".global_size=32",
        ),
        (
            "epochs=4, global_size=8",
            ["backbone.options.patch_size=16"],
            "global_size is 8; expected less than the full 48 and a whole number of patches of 16 pixels",
            "=none",
        ),
        (
            "epochs=4, global_size=32, local_size=24",
            [],
            "local_size is 24; expected less than the full 24",
            ".local_size=8",
        ),
        (
            "epochs=4, global_size=32, local_size=12",
            [],
            "local_size is 12; expected less than the full 24 and a whole number of patches of 8 pixels",
            ".local_size=8",
        ),
        (
            "epochs=4, global_size=32, local_size=8",
            ["backbone.options.patch_size=16"],
            "local_size is 8; expected less than the full 24 and a whole number of patches of 16 pixels",
            ".local_size=none",
        ),
    ],
)
def test_a_low_resolution_that_does_not_fit_suggests_one_that_does(
    table: str, changed: list[str], message: str, hint: str
) -> None:
    overrides = ["optimizer.lr.warmup_epochs=0", "heads.dino.freeze_last_layer_epochs=0", *changed]
    with pytest.raises(DinoError) as error:
        load_preset("tiny-dino", [*overrides, f"views.low_resolution={{{table}}}"]).method()
    assert message in error.value.message
    typed = re.fullmatch(r"--set (\S+)", error.value.hint)
    if typed and not typed[1].endswith("VALUE"):
        assert typed[1].endswith(hint)
        load_preset("tiny-dino", [*overrides, f"views.low_resolution={{{table}}}", typed[1]]).method()
    else:
        assert hint in error.value.hint


def test_low_resolution_can_be_set_in_a_preset_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(shipped.text("tiny-dino") + "\n[views.low_resolution]\nepochs = 4\nglobal_size = 32\n")
    mine = load_preset(str(path))
    assert (mine.views.low_resolution.global_size, mine.views.low_resolution.local_size) == (32, None)
    assert Preset.parse(json.loads(mine.model_dump_json()), "stored") == mine
    assert load_preset(str(path), ["views.low_resolution=none"]) == load_preset("tiny-dino")
    convolutional = ["backbone={name='resnet18'}", "views.low_resolution.global_size=33"]
    assert load_preset(str(path), convolutional).method().student.backbone.patch_size == 32, "takes any size"


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(DinoError, match="vits61") as error:
        load_preset("vits61")
    assert "vits16" in error.value.hint


def test_a_preset_is_loaded_from_the_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(shipped.text("tiny-dino"))
    assert load_preset(str(path)) == load_preset("tiny-dino")
    path.write_text("epochs = = 3")
    with pytest.raises(DinoError, match="not valid TOML"):
        load_preset(str(path))
    with pytest.raises(DinoError, match="does not exist"):
        load_preset(str(tmp_path / "none.toml"))


COLUMNS = "vits16 vits8 vitb16 vitb8 resnet50 vits16-vanilla vits16-boosted resnet50-sgd".split()
# facebookresearch/dino: args.txt of the released checkpoints (for ResNet-50 the one with lr 0.3), and for the last three
# the commands of its README with the defaults of main_dino.py. One row per setting, one column per preset.
# fmt: off
RELEASED = {
    "backbone": ["vit_small_patch16_224", "vit_small_patch8_224", "vit_base_patch16_224", "vit_base_patch8_224",
                 "resnet50", "vit_small_patch16_224", "vit_small_patch16_224", "resnet50"],
    "epochs": [800, 800, 400, 300, 800, 100, 300, 100],
    "batch": [1024, 1024, 1024, 1056, 4080, 512, 1024, 512],
    "optimizer": ["adamw", "adamw", "adamw", "adamw", "lars", "adamw", "adamw", "sgd"],
    "lr": [5e-4, 5e-4, 7.5e-4, 5e-4, 0.3, 5e-4, 5e-4, 0.03],
    "min_lr": [1e-5, 1e-6, 2e-6, 2e-6, 0.0048, 1e-6, 1e-6, 1e-6],
    "warmup_epochs": [10] * 8,
    "weight_decay": [0.04, 0.04, 0.04, 0.04, 1e-6, 0.04, 0.04, 1e-4],
    "weight_decay_end": [0.4, 0.4, 0.4, 0.4, 1e-6, 0.4, 0.4, 1e-4],
    "clip_grad": [None, 3.0, 0.3, 3.0, None, 3.0, 3.0, 3.0],
    "freeze_last_layer": [1, 1, 3, 3, 1, 1, 1, 1],
    "norm_last_layer": [False, False, True, True, True, True, False, True],
    "warmup_teacher_temp": [0.04, 0.04, 0.04, 0.03, 0.04, 0.04, 0.04, 0.04],
    "teacher_temp": [0.07, 0.07, 0.07, 0.07, 0.07, 0.04, 0.07, 0.04],
    "warmup_teacher_temp_epochs": [30, 30, 50, 50, 50, 0, 30, 0],
    "momentum_teacher": [0.996] * 8,
    "global_crops_scale": [(0.25, 1), (0.4, 1), (0.25, 1), (0.25, 1), (0.14, 1), (0.4, 1), (0.4, 1), (0.14, 1)],
    "local_crops_number": [10, 10, 10, 10, 6, 8, 8, 8],
    "local_crops_scale": [(0.05, 0.25), (0.05, 0.4), (0.05, 0.25), (0.05, 0.25), (0.05, 0.14), (0.05, 0.4), (0.05, 0.4),
                          (0.05, 0.14)],
    "out_dim": [65536, 65536, 65536, 65536, 60000, 65536, 65536, 65536],
    "use_bn_in_head": [False, False, False, False, True, False, False, False],
    "drop_path_rate": [0.1, 0.1, 0.1, 0.1, 0, 0.1, 0.1, 0],
}
# fmt: on


def to_original_names(preset: Preset) -> dict[str, object]:
    """Return the settings of a preset under the names of main_dino.py's arguments."""
    head, loss, views, optimizer = preset.heads["dino"], preset.losses.dino, preset.views, preset.optimizer
    temperature = loss.targets.temperature
    return {
        "backbone": preset.backbone.name,
        "epochs": preset.training.epochs,
        "batch": preset.training.batch_size,
        "optimizer": optimizer.kind,
        "lr": optimizer.lr.start,
        "min_lr": optimizer.lr.end,
        "warmup_epochs": optimizer.lr.warmup_epochs,
        "weight_decay": optimizer.weight_decay.bounds[0],
        "weight_decay_end": optimizer.weight_decay.bounds[-1],
        "clip_grad": optimizer.clip and optimizer.clip.norm,
        "freeze_last_layer": head.freeze_last_layer_epochs,
        "norm_last_layer": head.norm_last_layer,
        "warmup_teacher_temp": temperature.bounds[0],
        "teacher_temp": temperature.bounds[-1],
        "warmup_teacher_temp_epochs": getattr(temperature, "epochs", 0),
        "momentum_teacher": preset.teacher.momentum.start,
        "global_crops_scale": views.global_1.scale,
        "local_crops_number": views.locals,
        "local_crops_scale": views.local.scale,
        "out_dim": head.prototypes,
        "use_bn_in_head": head.batch_norm,
        "drop_path_rate": preset.backbone.drop_path,
    }


@pytest.mark.parametrize("name", COLUMNS)
def test_a_released_recipe_has_the_originals_settings(name: str) -> None:
    expected = {setting: row[COLUMNS.index(name)] for setting, row in RELEASED.items()}
    assert to_original_names(load_preset(name)) == expected


@pytest.mark.parametrize("name", COLUMNS)
def test_only_the_precision_differs_from_the_original_and_is_documented(name: str) -> None:
    # use_fp16 is false in the released runs, and true by default.
    assert load_preset(name).training.precision == "bfloat16"
    assert load_preset(name, ["training.precision=float32"]).training.precision == "float32"
    assert "`training.precision`" in (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COLUMNS)
def test_settings_that_are_fixed_in_the_original_are_the_same(name: str) -> None:
    preset = load_preset(name)
    head, loss, views = preset.heads["dino"], preset.losses.dino, preset.views
    assert (head.hidden, head.bottleneck, head.layers) == (2048, 256, 3)
    assert (loss.weight, loss.student_temperature, loss.targets.momentum) == (1, 0.1, 0.9)
    assert (preset.teacher.momentum.kind, preset.teacher.momentum.end) == ("cosine", 1)
    assert (preset.optimizer.lr_rule.batch, preset.optimizer.lr.kind) == (256, "cosine")
    assert preset.training.seed == 0
    assert (views.mean, views.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert preset.backbone.positions == ("dino" if preset.backbone.name.startswith("vit") else None)
    assert views.global_2.scale == views.global_1.scale
    sizes_and_chances = [(view.size, view.blur, view.solarize) for view in (*views.globals, views.local)]
    assert sizes_and_chances == [(224, 1.0, 0.0), (224, 0.1, 0.2), (96, 0.5, 0.0)]
    for view in views.all:
        assert (view.flip, view.gray, view.resample) == (0.5, 0.2, "bicubic")
        jitter = view.jitter
        strengths = (jitter.probability, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        assert strengths == (0.8, 0.4, 0.4, 0.2, 0.1)
    kind = {"adamw": {"betas": (0.9, 0.999), "eps": 1e-8}, "sgd": {"momentum": 0.9}}
    kind["lars"] = {"momentum": 0.9, "trust": 0.001}
    assert kind[preset.optimizer.kind].items() <= preset.optimizer.model_dump().items()


def test_only_the_student_has_drop_path() -> None:
    method = load_preset("vits16", ["heads.dino.prototypes=16"]).method()
    for network, rate in ((method.student, 0.1), (method.teacher, 0.0)):
        block = network.backbone.model.blocks[-1]
        for branch in (block.drop_path1, block.drop_path2):
            assert getattr(branch, "drop_prob", 0.0) == pytest.approx(rate)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_the_backbone_has_the_images_number_of_channels(channels: int) -> None:
    preset = load_preset("tiny-dino", of_channels(channels))
    assert preset.backbone.build(drop_path=False).model.patch_embed.proj.in_channels == channels
    assert Preset.parse(preset.model_dump(mode="json"), "x") == preset
    assert load_preset("tiny-dino", of_channels(channels, f"backbone.options.in_chans={channels}")) == preset
    assert "in_chans" not in load_preset("tiny-dino").backbone.options


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["backbone.options.in_chans=4"], "in_chans is 4 and images.channels 3", "--set images.channels=4"),
        (of_channels(4, "backbone.options.in_chans=5"), "in_chans is 5 and images.channels 4", "--set images.channels=5"),
        (of_channels(4, "views.std=[1, 1, 1]"), "4 channels, views.mean has 4 values and views.std 3", "dino doctor IMAGES"),
        (["images.channels=1"], "1 channel, views.mean has 3 values and views.std 3", "--set images.channels=1"),
        (["views.mean=[0.5]"], "3 channels, views.mean has 1 values and views.std 3", "dino doctor"),
        (of_channels(4, "views.local.gray=0.1"), "views.local.gray changes colors", "--set views.local.gray=0"),
        (of_channels(1, "views.global_2.jitter.hue=0.1", "views.local.jitter.saturation=0.1"), "1 channel",
         "--set views.global_2.jitter.hue=0 --set views.local.jitter.saturation=0"),
        (["images.channels=0"], "images.channels", ""),
        (["images.channels=33"], "images.channels", ""),
        (["images.channels=x"], "images.channels", ""),
    ],
)  # fmt: skip
def test_channels_that_do_not_fit_are_refused(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(DinoError) as error:
        load_preset("tiny-dino", overrides)
    assert message in error.value.message
    assert hint in error.value.hint
    assert "it needs" not in error.value.message, "the override is only in the hint"


DEEP = "a." * 5000


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000 + "]" * 5000,
        f"backbone.options.{DEEP}b = 1",
        "a = " + "{b=" * 5000 + "1" + "}" * 5000,
        f"[{DEEP}b]\nc = 1",
        "a = " + "9" * 10_000,
        "a = [",
    ],
)
def test_malformed_preset_files_give_a_one_line_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(DinoError) as error:
        load_preset(str(tmp_path / "mine.toml"))
    assert len(error.value.message) < 300
    assert "\n" not in error.value.message


@pytest.mark.parametrize("override", [f"{DEEP}b=1", f"backbone.options.{DEEP}b=1", "about=" + "[" * 5000 + "]" * 5000])
def test_overrides_that_are_nested_too_deeply_are_refused(override: str) -> None:
    with pytest.raises(DinoError, match="nested"):
        load_preset("tiny-dino", [override])


def test_a_number_for_a_schedule_is_a_constant_schedule() -> None:
    constant = {"kind": "constant", "value": 0.05}
    ours = load_preset("tiny-dino", ["losses.dino.targets.temperature=0.05"])
    assert ours.losses.dino.targets.temperature.model_dump() == constant, "the preset's is constant"
    data = ours.model_dump()
    for table, key in (("optimizer", "lr"), ("optimizer", "weight_decay"), ("teacher", "momentum")):
        read = type(ours).parse(data | {table: data[table] | {key: 0.05}}, "mine.toml")
        assert getattr(getattr(read, table), key).model_dump() == constant, "a number replaces the table of a file"


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr.start=nan",
        "optimizer.weight_decay.end=inf",
        "optimizer.clip={kind='each_parameter',norm=inf}",
        "teacher.momentum.start=nan",
        "losses.dino.targets.temperature.end=nan",
        "images.window=[0, inf]",
        "images.window=[[0, 1], [nan, 2], [0, 1]]",
        "images.max_megapixels=inf",
        "views.mean=[nan, 0, 0]",
        "views.std=[1, inf, 1]",
        "backbone.options.drop_rate=nan",
    ],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0] + (".norm" if "norm" in override else "")
    with pytest.raises(DinoError, match=f"{key} should be a finite number") as error:
        load_preset("vits16", [override])
    assert f"--set {key}=" in error.value.hint
    stored = json.loads(load_preset("vits16").model_dump_json())
    stored["optimizer"]["lr"]["start"] = "NaN"
    with pytest.raises(DinoError, match=r"optimizer.lr.start should be a finite number"):
        Preset.parse(stored, "a checkpoint")


def test_a_std_or_window_of_zero_is_refused() -> None:
    for value in (0, -1, 1e-30):
        with pytest.raises(DinoError, match=r"views.std should be greater than or equal to"):
            load_preset("vits16", [f"views.std=[1, {value}, 1]"])
    with pytest.raises(DinoError, match=r"images.window is not valid"):
        load_preset("vits16", ["images.window=[5, 5]"])


def test_a_learning_rate_that_the_batch_size_makes_infinite_is_refused() -> None:
    with pytest.raises(DinoError, match=r"makes optimizer\.lr infinite"):
        load_preset("vits16", ["optimizer.lr.start=1e38", "training.batch_size=1048576"])


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("losses.koleo.weight=0.1", "excludes losses.koleo", "--set losses.koleo=none"),
        ("views.local={size=96, scale=[0.1, 0.3]}", "excludes views.local", "--set views.local=none"),
        (
            "views.low_resolution={epochs=1, global_size=112}",
            "excludes views.low_res",
            "--set views.low_resolution=none",
        ),
        ("teacher.frozen=false", "losses.features needs frozen teachers", "--set teacher.frozen=true"),
        ("losses.features.teacher_size=big", "losses.features.teacher_size", "--set losses.features.teacher_size="),
        ("views.fixed=0", "views.fixed should be greater than or equal to 1", "--set views.fixed="),
    ],
)
def test_feature_distillation_uses_whole_views_alone(override: str, message: str, hint: str) -> None:
    with pytest.raises(DinoError, match=re.escape(message)) as error:
        load_preset("distill-features", [override])
    assert hint in error.value.hint


def test_feature_distillation_has_no_weights_or_no_teachers_to_build() -> None:
    off = [f"losses.features.{name}=0" for name in ("class_cosine", "patch_cosine", "patch_smooth_l1")]
    with pytest.raises(DinoError, match=r"all weights of losses\.features are 0"):
        load_preset("distill-features", off)
    with pytest.raises(DinoError, match="needs teachers") as error:
        load_preset("distill-features").method()
    assert error.value.hint == "--teacher timm:NAME"

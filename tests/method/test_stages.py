from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from dinocli.core.errors import DinoError
from dinocli.method import shipped
from dinocli.method.preset import Preset, load_preset
from dinocli.method.stages import check_same_network

RUN = load_preset("dinov3-vits16")
STAGE = """
[stage]
lr = 0.5
warmup_epochs = 2

[about]
recipe = "mine"
source = "me"
command = "dino pretrain ./images --from RUN --preset mine.toml"
cost = "little"
expected = "much"

[teacher]
momentum = { kind = "constant", value = 0.9 }

[training]
epochs = 5
"""


def write_stage(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


@pytest.mark.parametrize("name", shipped.stages())
@pytest.mark.parametrize("base", ["tiny", "tiny-dinov2", "vits16", "resnet50", "dinov3-vits16", "dinov2-vits14"])
def test_a_shipped_stage_continues_any_preset_of_its_kind(name: str, base: str) -> None:
    about = tomllib.loads(shipped.text(name))["about"]
    assert all(about.values()) and f"--from RUN --preset {name}" in about["command"]
    run = load_preset(base)
    preset = load_preset(name, run=run)
    assert Preset.parse(json.loads(preset.model_dump_json()), name) == preset
    check_same_network(preset, run, "RUN")
    assert (preset.heads.keys(), preset.losses.dino.head) == (run.heads.keys(), run.losses.dino.head)
    assert preset.about.recipe == about["recipe"]
    if base not in ("resnet50", "dinov2-vits14"):
        assert preset.method().gram is not None


def test_a_stage_changes_what_it_names_and_holds_every_other_schedule_at_its_end(tmp_path: Path) -> None:
    stage = load_preset(write_stage(tmp_path, STAGE), run=RUN)
    assert (stage.training.epochs, stage.training.seed) == (5, RUN.training.seed + 1)
    assert stage.optimizer.lr.model_dump() == {"kind": "warmup", "value": 0.001, "warmup_epochs": 2}
    assert stage.optimizer.lr_rule == RUN.optimizer.lr_rule
    assert stage.teacher.momentum.value == 0.9
    assert stage.optimizer.weight_decay.model_dump() == {"kind": "constant", "value": 0.4}
    temperatures = [loss.targets.temperature.model_dump() for loss in stage.losses.with_targets().values()]
    assert temperatures == [{"kind": "constant", "value": 0.07}] * 2
    assert [head.freeze_last_layer_epochs for head in stage.heads.values()] == [0, 0]
    changed = {"about", "teacher", "training", "optimizer", "losses", "heads"}
    for name in set(Preset.model_fields) - changed:
        assert getattr(stage, name) == getattr(RUN, name), name
    assert load_preset(write_stage(tmp_path, STAGE), run=RUN, peak_lr=0.1).optimizer.lr.value == 0.05


def test_a_gram_loss_and_mixed_sizes_belong_to_their_stage(tmp_path: Path) -> None:
    first = load_preset("gram-refine", run=load_preset("tiny-dinov2"))
    assert (first.losses.gram.update_every, first.losses.gram.max_updates) == (3, 3)
    second = load_preset("high-resolution", run=first)
    assert (second.losses.gram.update_every, second.losses.gram.max_updates) == (None, None)
    third = load_preset(write_stage(tmp_path, STAGE), run=second)
    assert (third.losses.gram, third.views.mixed) == (None, ())


def test_sizes_are_relative_to_the_run_and_whole_patches(tmp_path: Path) -> None:
    sizes = "[stage]\nsizes = [{global_scale=1.5, local_scale=2, share=1}, {global_scale=2.1, share=3}]\n"
    path = write_stage(tmp_path, STAGE.replace("[stage]\n", sizes + "rescale_positions = 2.0\n"))
    rotary = load_preset(path, run=RUN)
    assert [m.model_dump() for m in rotary.views.mixed] == [
        {"global_size": 336, "local_size": 192, "share": 1.0},
        {"global_size": 464, "local_size": 96, "share": 3.0},
    ]
    assert rotary.backbone.rescale_positions == 2
    other = load_preset(path, run=load_preset("dinov2-vits14"))
    assert [m.global_size % 14 for m in other.views.mixed] == [0, 0]
    assert other.backbone.rescale_positions == 1, "learned positions have no coordinates to rescale"
    no_local = load_preset(path, run=load_preset("tiny-dino", ["views.local=none"]))
    assert [m.local_size for m in no_local.views.mixed] == [None, None]
    again = load_preset(path, run=rotary)
    assert again.views.mixed == rotary.views.mixed, "sizes refer to the views, which a stage does not change"


@pytest.mark.parametrize(
    ("name", "run", "overrides", "message", "hint"),
    [
        ("gram-refine", None, [], "gram-refine is a stage, which continues a finished run", "--from RUN --preset gram-refine"),
        ("gram-refine", RUN, ["images.channels=1"], "takes images of 3 channels; images.channels is 1", "images.channels=3"),
        ("tiny", RUN, ["images.channels=4"], "takes images of 3 channels; images.channels is 4", "--init"),
        ("gram-refine", RUN, ["stage.lr=0.3"], "there is no key stage", "remove stage"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused(
    name: str, run: Preset | None, overrides: list[str], message: str, hint: str
) -> None:
    with pytest.raises(DinoError) as error:
        load_preset(name, overrides, run)
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr = 0", r"\[stage\] of preset .* lr should be greater than 0"),
        ("lr = 1\nrate = 1", "there is no key rate"),
        ("lr = 1\nsizes = [{global_scale=2}]", "share is missing"),
    ],
)
def test_an_invalid_stage_table_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DinoError, match=message):
        load_preset(write_stage(tmp_path, STAGE.replace("lr = 0.5", line)), run=RUN)


def test_another_network_is_refused_by_the_first_key_that_differs() -> None:
    run = load_preset("tiny-dinov2")
    for override, message in (
        ("backbone.options.embed_dim=192", r"backbone\.options\.embed_dim = 96; this preset sets 192"),
        ("backbone.options.num_heads=3", r"backbone\.options\.num_heads = 6; this preset sets 3"),
        ("heads.ibot.prototypes=64", r"heads\.ibot\.prototypes = 256; this preset sets 64"),
    ):
        with pytest.raises(DinoError, match=message):
            check_same_network(load_preset("gram-refine", [override], run), run, "runs/tiny-dinov2-1")
    check_same_network(load_preset("gram-refine", ["backbone.drop_path=0.3"], run), run, "runs/tiny-dinov2-1")

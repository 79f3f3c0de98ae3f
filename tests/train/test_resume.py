from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL
from test_state import content, stopped, twelve_steps  # noqa: F401

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.core.runs import next_folder, runs_of
from dinocli.data.sources.open import image_folder, open_source
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.train.resume import first_difference, unfinished


def test_a_resume_with_another_preset_names_the_first_different_key(plan: Plan) -> None:
    stopped(plan, 4)
    before = content(plan.out)
    for override, words, hint in (
        ("optimizer.lr.start=0.5", "optimizer.lr.start = 0.004; 0.5 is now set", "--set optimizer.lr.start=0.004"),
        ("heads.dino.prototypes=17", "heads.dino.prototypes = 16; 17 is now set", "--set heads.dino.prototypes=16"),
        ("training.epochs=9", "training.epochs = 8; 9 is now set", "--set training.epochs=8"),
        ("views.global_2.blur=0.5", "views.global_2.blur = 0.0; 0.5 is now set", "--set views.global_2.blur=0.0"),
    ):
        other = replace(plan, preset=load_preset("tiny-dino", [*SMALL, "backbone.drop_path=0.3", override]))
        with pytest.raises(DinoError, match=words) as error:
            pretrain(other, lambda p: None)
        assert hint in error.value.hint
    assert content(plan.out) == before


@pytest.mark.parametrize(
    "override",
    [
        "views.local.scale=[0.1, 0.3]",
        "optimizer.clip=none",
        "views.local=none",
        "backbone.learning.trained={kind='lora', rank=4}",
        "teacher.momentum={kind='constant', value=0.9}",
    ],
)
def test_the_hint_to_resume_parses(plan: Plan, override: str) -> None:
    stopped(plan, 4)
    words = [*SMALL, "backbone.drop_path=0.3", override]
    with pytest.raises(DinoError) as error:
        pretrain(replace(plan, preset=load_preset("tiny-dino", words)), lambda p: None)
    typed = shlex.split(error.value.hint.removesuffix(" to resume, or another --out"))
    assert typed[0] == "--set"
    assert len(typed) == 2
    assert load_preset("tiny-dino", [*words, typed[1]]) == plan.preset


def test_descriptions_of_a_preset_may_differ(plan: Plan) -> None:
    stopped(plan, 4)
    preset = load_preset("tiny-dino", [*SMALL, "backbone.drop_path=0.3", "about.cost=none at all"])
    assert pretrain(replace(plan, preset=preset), lambda p: None).step == 12


def test_extending_a_finished_run_notes_the_jump_of_its_schedules(plan: Plan) -> None:
    whole = replace(plan, stop=plan.clock.total)
    pretrain(whole, lambda p: None)
    longer = replace(
        plan, preset=load_preset("tiny-dino", [*SMALL, "backbone.drop_path=0.3", "training.epochs=16"]), stop=64
    )
    said: list[str] = []
    run = pretrain(longer, lambda p: None, said.append)
    assert run.step == 64
    assert said[0].startswith("note: 16 epochs instead of 8 stretch the schedules from 32 to 64 steps; at step 32")
    rate = plan.preset.optimizer.lr_for(4)
    now, was = (rate.at(replace(p.clock, step=32)) for p in (longer, plan))
    assert f"learning rate from {was:.3g} to {now:.3g}" in said[0]
    assert json.loads((run.folder / "preset.json").read_text())["training"]["epochs"] == 16


def test_a_resume_with_other_images_is_refused(plan: Plan, images: Path, tmp_path: Path) -> None:
    stopped(plan, 4)
    shutil.copytree(images, tmp_path / "moved")
    moved = replace(plan, source=image_folder(tmp_path / "moved"))
    assert pretrain(replace(moved, stop=5), lambda p: None).step == 5, "the same images in another place"
    shutil.copy(tmp_path / "moved" / "a" / "0000.png", tmp_path / "moved" / "a" / "new.png")
    more = replace(moved, source=image_folder(tmp_path / "moved"))
    with pytest.raises(
        DinoError, match=rf"the images have changed .* {plan.source.count} in .* {plan.source.count + 1}"
    ):
        pretrain(more, lambda p: None)
    (tmp_path / "moved" / "a" / "new.png").unlink()
    (tmp_path / "moved" / "a" / "0000.png").rename(tmp_path / "moved" / "a" / "other.png")
    renamed = replace(moved, source=image_folder(tmp_path / "moved"))
    with pytest.raises(DinoError, match=rf"{plan.source.count} with other names or in another order in"):
        pretrain(renamed, lambda p: None)


def test_a_resume_of_packed_pixels_with_their_files_names_both_kinds(plan: Plan, images: Path, tmp_path: Path) -> None:
    packed = tmp_path / "pixels"
    pack(image_folder(images), packed, pixels=True)
    stopped(replace(plan, source=open_source(str(packed))), 4)
    with pytest.raises(DinoError, match=rf"began with packed pixels in {packed}, and .* holds image files") as error:
        pretrain(plan, lambda p: None)
    assert f"name {packed} to resume" in error.value.hint


def test_changed_files_under_the_same_names_are_noted(plan: Plan, images: Path) -> None:
    stopped(plan, 4)
    other = images / "a" / "0000.png"
    content = other.read_bytes()
    other.write_bytes((images / "b" / "0003.png").read_bytes())
    for stop in (5, 6):
        said: list[str] = []
        pretrain(replace(plan, stop=stop), lambda p: None, said.append)
        assert said[0] == "note: 1 of 12 sampled images have changed since this run began"
    other.write_bytes(content)
    said = []
    pretrain(replace(plan, stop=7), lambda p: None, said.append)
    assert said == ["resuming from step 6 of 7 in runs/tiny-1"]


def test_only_a_matching_unfinished_run_is_found(plan: Plan) -> None:
    wanted = (plan.preset, plan.source.fingerprint, None, None)
    assert unfinished(runs_of("tiny"), wanted) is None
    stopped(plan, 12)
    assert unfinished(runs_of("tiny"), wanted) is None, "it was told to end there"
    assert unfinished(runs_of("tiny"), wanted, 12) is None
    assert unfinished(runs_of("tiny"), wanted, 13) == Path("runs/tiny-1")
    broken = replace(plan, out=next_folder("tiny"))
    pretrain(broken, lambda p: os.kill(os.getpid(), signal.SIGINT))
    pretrain(replace(plan, out=next_folder("tiny")), lambda p: None)
    assert unfinished(runs_of("tiny"), wanted) == Path("runs/tiny-2")
    assert unfinished(runs_of("tiny"), (load_preset("tiny-dino"), *wanted[1:])) is None
    assert unfinished(runs_of("tiny"), (plan.preset, "other", None, None)) is None
    assert unfinished(runs_of("tiny"), (*wanted[:2], "some.pth", None)) is None


def test_the_first_difference_is_named_by_its_path() -> None:
    assert first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) is None
    assert first_difference({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}}) == ("b.d", 3, 4)
    assert first_difference({"a": {"b": 1}}, {"a": None}) == ("a", {"b": 1}, None)
    assert first_difference({}, {"x": 1}) == ("x", None, 1)


def test_a_resume_from_shards_keeps_the_number_of_workers(plan: Plan, images: Path) -> None:
    from dinocli.apps.pack import pack

    pack(image_folder(images), Path("packed"), side=None, per_shard=3, name="x", report=lambda done, note="": None)
    shards = replace(plan, source=open_source("packed"), workers=2)
    whole = pretrain(replace(shards, out=Path("whole")), lambda p: None)
    pretrain(replace(shards, stop=5), lambda p: None)
    said: list[str] = []
    pretrain(replace(shards, workers=1), lambda p: None, said.append)
    assert "using --workers 2 as before" in said[0]
    assert content(shards.out) == content(whole.folder)

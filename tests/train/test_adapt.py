from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.models.architecture import BackboneConfig
from dinocli.train import adapt as adapting
from dinocli.train.adapt import RECIPES, conclude, recipe
from dinocli.train.best import BEST
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain, rehearse
from dinocli.train.snapshots import random_crops
from dinocli.weights.checkpoint import Weights
from dinocli.weights.load import load_encoder
from dinocli.weights.starting_point import StartingPoint, read_starting_point

CPU = torch.device("cpu")
OPTIONS = "{img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}"
HEADS = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
TRAIN = ("lora", "lora-2", "last-1", "all")


def make_plan(source: Path, images: Path, out: Path, train: str, *more: str, **how: object) -> Plan:
    begin = read_starting_point(str(source))
    preset = load_preset("adapt-lora")
    settings = [f"{k}={v}" for k, v in recipe(begin, preset, 12, 4, train, 0.0).items()]
    settings += [f"heads.dino.{key}={value}" for key, value in HEADS.items()]
    settings += ["training.epochs=2", "training.steps_per_epoch=3", "views.locals=2", "training.precision=float32"]
    made = load_preset("adapt-lora", [*settings, *more])
    return replace(Plan("adapt", made, image_folder(images), 6, out, CPU, 0, str(source), keep_best=True), **how)


@pytest.mark.parametrize("train", TRAIN)
def test_only_the_chosen_weights_change(train: str, start: Path, images: Path, tmp_path: Path) -> None:
    run = pretrain(make_plan(start, images, tmp_path / "run", train, "optimizer.lr.start=1.0"), lambda p: None)
    before, after = load_file(start), load_file(run.checkpoint)
    backbone = {key for key in before if key.startswith("backbone.")}
    assert backbone <= after.keys(), "merged, under the keys of a plain network"
    changed = {key for key in backbone if not torch.equal(before[key], after[key])}
    if train == "all":
        assert changed == backbone
    elif train == "last-1":
        assert changed == {key for key in backbone if key.startswith(("backbone.blocks.1.", "backbone.norm."))}
    else:
        layers = ("attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight")
        assert changed == {f"backbone.blocks.{i}.{layer}" for i in (0, 1) for layer in layers}
        for key in changed:  # the average of products of rank 2 or 16 at several steps
            assert torch.linalg.matrix_rank(after[key] - before[key], rtol=1e-3) >= 1


def test_the_average_is_that_of_the_merged_weights(start: Path, images: Path, tmp_path: Path) -> None:
    plan = make_plan(start, images, tmp_path / "run", "lora-2", "teacher.momentum={kind='constant', value=0.5}")
    plan = replace(plan, stop=4, preset=plan.preset)
    run = pretrain(plan, lambda p: None)
    student = {
        key.removeprefix("method/student."): value
        for key, value in load_file(tmp_path / "run/state/4/trainer.safetensors").items()
        if key.startswith("method/student.backbone.model.blocks.0.attn.qkv.")
    }
    stem = "backbone.model.blocks.0.attn.qkv.parametrizations.weight"
    merged = student[f"{stem}.original"] + student[f"{stem}.0.b"] @ student[f"{stem}.0.a"]
    before, after = (load_file(path)["backbone.blocks.0.attn.qkv.weight"] for path in (start, run.checkpoint))
    assert not torch.equal(before, after)
    # One more step with half of the weight on the student: the average lies between its start and the student.
    assert (after - before).norm() < (merged - before).norm()
    assert torch.nn.functional.cosine_similarity((after - before).flatten(), (merged - before).flatten(), dim=0) > 0.5


@pytest.mark.parametrize("train", ["lora-2", "last-1"])
def test_a_stopped_adaptation_resumes_to_the_same_bits(train: str, start: Path, images: Path, tmp_path: Path) -> None:
    whole = pretrain(make_plan(start, images, tmp_path / "whole", train), lambda p: None)
    plan = make_plan(start, images, tmp_path / "parts", train)
    pretrain(replace(plan, stop=4), lambda p: None)
    parts = pretrain(plan, lambda p: None)
    assert parts.began == 4
    assert load_file(whole.checkpoint).keys() == load_file(parts.checkpoint).keys()
    for key, value in load_file(whole.checkpoint).items():
        assert torch.equal(value, load_file(parts.checkpoint)[key]), key


def test_lora_takes_less_memory_for_gradients_and_moments(start: Path, images: Path, tmp_path: Path) -> None:
    from dinocli.train.cost import estimate

    lora, whole = (estimate(make_plan(start, images, tmp_path / train, train)).fixed for train in ("lora-1", "all"))
    assert lora < whole


@pytest.mark.parametrize(("worse", "verdict"), [(False, "better"), (True, "worse")], ids=["better", "worse"])
def test_the_better_weights_become_the_checkpoint(
    worse: bool,
    verdict: str,
    start: Path,
    images: Path,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(start, images, tmp_path / "run", "all", "optimizer.lr.start=1.0", monitor=str(labelled))
    pretrain(plan, lambda p: None)
    # The networks here are too small to differ for certain, so the answers are given.
    answers = iter([np.arange(12) < (9 if worse else 2), np.arange(12) < (2 if worse else 9)])

    class Given:
        def __init__(self, *args: object) -> None:
            self.verdict = next(answers)

    monkeypatch.setattr(adapting.KnnMonitor, "evaluate", lambda self, network: Given())
    best = load_file(tmp_path / "run" / BEST)
    result = conclude(plan)
    assert result.difference is not None
    assert result.difference.verdict == verdict
    kept = load_file(tmp_path / "run" / "ckpt.safetensors")
    expected = load_file(start) if worse else best
    backbone = [key for key in expected if key.startswith("backbone.")]
    assert all(torch.equal(kept[key], expected[key]) for key in backbone)
    assert result.step == (0 if worse else load_encoder(str(tmp_path / "run" / BEST), CPU).step)
    assert load_encoder(str(tmp_path / "run"), CPU).step == result.step
    assert set(result.figures) == {"rank", "uniformity", "lidar"}
    stored = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert (stored["step"], stored["verdict"]) == (result.step, result.verdict)
    assert ("worse (the released weights are kept" in result.verdict) == worse


def test_the_best_weights_survive_a_resume(start: Path, images: Path, labelled: Path, tmp_path: Path) -> None:
    how = {"monitor": str(labelled), "monitor_every": 2}
    plan = make_plan(start, images, tmp_path / "run", "all", "optimizer.lr.start=0.5", **how)
    whole = replace(plan, out=tmp_path / "whole")
    pretrain(whole, lambda p: None)
    pretrain(replace(plan, stop=3), lambda p: None)
    pretrain(plan, lambda p: None)
    first, second = (load_file(tmp_path / name / BEST) for name in ("whole", "run"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_without_labels_the_last_weights_are_kept_and_only_label_free_figures_compared(
    start: Path, images: Path, tmp_path: Path
) -> None:
    plan = make_plan(start, images, tmp_path / "run", "lora")
    run = pretrain(plan, lambda p: None)
    before = run.checkpoint.read_bytes()
    result = conclude(plan)
    assert result.difference is None
    assert result.step == 6
    assert run.checkpoint.read_bytes() == before


def point(name: str, size: int = 224, **options: object) -> StartingPoint:
    from dinocli.weights.released import IMAGENET, Preprocessing

    return StartingPoint(
        "x", BackboneConfig(name=name, options=options), Preprocessing(size, *IMAGENET), "other", Weights({}, {}, None)
    )


@pytest.mark.parametrize(
    ("name", "size", "globals_", "locals_"),
    [
        ("vit_small_patch14_dinov2", 518, 224, 98),
        ("vit_small_patch16_dinov3_qkvb", 256, 224, 96),
        ("vit_tiny_patch16_224", 64, 64, 32),
        ("beit_base_patch16_224", 224, 224, None),  # takes images of one size
    ],
)
def test_views_are_whole_patches_up_to_224_pixels(name: str, size: int, globals_: int, locals_: int | None) -> None:
    settings = recipe(point(name, size), load_preset("adapt-lora"), 5000, None, "lora", 0.0)
    assert settings["views.global_1.size"] == settings["views.global_2.size"] == str(globals_)
    assert settings.get("views.local.size") == (None if locals_ is None else str(locals_))
    assert ("views.locals" in settings) == (locals_ is None)
    load_preset("adapt-lora", [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "prototypes"),
    [(10, 4, 8, 32), (1000, 64, 8, 512), (10_000, 64, 62, 4096), (1_000_000, 64, 200, 4096), (None, 64, 8, 512)],
)
def test_length_batch_and_prototypes_follow_the_number_of_images(
    images: int | None, batch: int, epochs: int, prototypes: int
) -> None:
    settings = recipe(point("vit_tiny_patch16_224"), load_preset("adapt-lora"), images, None, "lora", 0.0)
    assert settings["training.batch_size"] == str(batch)
    assert settings["training.epochs"] == str(epochs)
    assert settings["heads.dino.prototypes"] == str(prototypes)


@pytest.mark.parametrize("train", ["", "lora-0", "last", "last-x", "all-3", "qlora"])
def test_an_unknown_choice_of_weights_is_refused(train: str) -> None:
    with pytest.raises(DinoError, match="is not valid; expected lora, lora-RANK, last-BLOCKS or all"):
        recipe(point("vit_tiny_patch16_224"), load_preset("adapt-lora"), 100, None, train, 0.0)


def test_an_anchor_adds_the_gram_loss_with_class_tokens() -> None:
    settings = recipe(point("vit_tiny_patch16_224"), load_preset("adapt-lora"), 100, None, "all", 2.0)
    gram = load_preset("adapt-lora", [f"{key}={value}" for key, value in settings.items()]).losses.gram
    assert gram is not None
    assert (gram.weight.bounds, gram.class_tokens, gram.first_update, gram.update_every) == ((2.0,), 1.0, 0, None)


@pytest.mark.parametrize("preset", RECIPES.values())
def test_each_recipe_trains_a_small_network(preset: str, images: Path, tmp_path: Path, start: Path) -> None:
    begin = read_starting_point(str(start))
    loaded = load_preset(preset)
    settings = [f"{key}={value}" for key, value in recipe(begin, loaded, 12, 4, "lora", 1.0).items()]
    settings += ["training.epochs=2", "training.steps_per_epoch=2", "views.locals=2"]
    settings += [f"heads.{name}.{key}={value}" for name in loaded.heads for key, value in HEADS.items()]
    plan = Plan("adapt", load_preset(preset, settings), image_folder(images), 4, tmp_path / "run", CPU, 0, str(start))
    rehearse(plan)
    assert pretrain(plan, lambda p: None).loss is not None


def test_random_crops_are_grouped_by_photo_and_always_the_same() -> None:
    photos = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (10, 200)])
    crops = random_crops(photos, 3)
    assert crops.shape == (6, 3, 8, 8)
    assert [int(crop.float().mean()) for crop in crops] == [10, 10, 10, 200, 200, 200]
    noise = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(random_crops(noise, 2), random_crops(noise, 2))
    assert not torch.equal(random_crops(noise, 2)[0], random_crops(noise, 2)[1])

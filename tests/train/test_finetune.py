from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from safetensors.torch import load_file

from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.train.best import BEST
from dinocli.train.finetune import Task, conclude, open_task, recipe
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.train.resume import unfinished
from dinocli.train.summary import list_runs
from dinocli.weights.checkpoint import write_checkpoint
from dinocli.weights.starting_point import read_starting_point

CPU = torch.device("cpu")
PLAIN = {"held_out": 0.25, "few_shot": None, "balanced": False, "several": False, "seed": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for label, count in (("cat", 12), ("dog", 8), ("eel", 3)):
        write_images(tmp_path / "data/train" / label, count, size=16, seed=count)
        write_images(tmp_path / "data/val" / label, 2, size=16, seed=count + 50)
    return tmp_path / "data"


def counts(task: Task) -> dict[str, int]:
    return dict(Counter(name.split("/")[0] for name in task.train.images.names))


def test_each_class_gives_its_share_to_the_held_out_images(data: Path) -> None:
    task = open_task(str(data), **PLAIN)
    assert task.classes == ["cat", "dog", "eel"]
    assert counts(task) == {"cat": 9, "dog": 6, "eel": 3}, "a class of three images keeps all"
    assert not set(task.train.images.names) & set(task.held_out.images.names)
    assert len(task.held_out.images) == 5
    assert len(task.test.images) == 6
    for part in (task.train, task.held_out, task.test):
        named = [task.classes[label] for label in part.labels.tolist()]
        assert named == [name.split("/")[0] for name in part.images.names]


def test_a_taken_image_is_the_named_one(data: Path) -> None:
    images = open_task(str(data), **PLAIN).held_out.images
    for i, name in enumerate(images.names):
        assert bytes(images.read(i)) == (data / "train" / name).read_bytes()


def test_few_images_per_class_are_taken_before_some_are_held_out(data: Path) -> None:
    task = open_task(str(data), **PLAIN | {"few_shot": 4})
    assert counts(task) == {"cat": 3, "dog": 3, "eel": 3}
    assert len(task.held_out.images) == 2
    other = open_task(str(data), **PLAIN | {"few_shot": 4, "seed": 1})
    assert list(task.train.images.names) != list(other.train.images.names)


def test_balanced_classes_have_as_many_images_as_the_largest(data: Path) -> None:
    task = open_task(str(data), **PLAIN | {"balanced": True})
    assert counts(task) == {"cat": 9, "dog": 9, "eel": 9}
    assert len(set(task.train.images.names)) == 18


def test_images_with_several_classes(data: Path) -> None:
    rows = [
        "path,label",
        "train/cat/0.png,cat;dog",
        "train/cat/1.png,dog",
        "train/dog/0.png,eel | cat",
        "train/cat/1.png,dog;eel",
        "train/eel/0.png,",
    ]
    names = sorted(path.name for path in (data / "train/cat").iterdir())
    rows = [row.replace("0.png", names[0]).replace("1.png", names[1]) for row in rows]
    (data / "list.csv").write_text("\n".join(rows))
    task = open_task(str(data / "list.csv"), **PLAIN | {"several": True, "held_out": 0})
    assert task.classes == ["cat", "dog", "eel"]
    assert task.held_out is None
    assert task.train.labels.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]]


def test_rare_combinations_of_classes_are_held_out_too(data: Path) -> None:
    names = sorted(path.name for path in (data / "train/cat").iterdir())
    rows = [f"train/cat/{name},c{i};c{i + 1}" for i, name in enumerate(names)]
    (data / "list.csv").write_text("\n".join(["path,label", *rows]))
    task = open_task(str(data / "list.csv"), **PLAIN | {"several": True})
    assert len(task.held_out.images) == 3, "a quarter of 12, each with a combination of its own"


def test_a_single_image_is_learned_instead_of_held_out(data: Path) -> None:
    names = sorted(path.name for path in (data / "train/cat").iterdir())[:5]
    (data / "list.csv").write_text("\n".join(["path,label", *(f"train/cat/{n},{n}" for n in names)]))
    task = open_task(str(data / "list.csv"), **PLAIN | {"several": True, "held_out": 0.2})
    assert task.held_out is None and len(task.train.images) == 5


def test_an_unlabelled_test_split_is_skipped_with_a_note(data: Path) -> None:
    shutil.rmtree(data / "val")
    write_images(data / "test", 3, size=16)
    task = open_task(str(data), **PLAIN)
    assert task.test is None
    assert task.notes == (f"note: no test split: the images in {data / 'test'} have no labels",)


def test_corrected_labels_are_other_images_to_a_run(data: Path) -> None:
    names = sorted(path.name for path in (data / "train/cat").iterdir())
    found = []
    for first in ("a", "b"):
        rows = [f"train/cat/{name},{first if i == 0 else 'ab'[i % 2]}" for i, name in enumerate(names)]
        (data / "list.csv").write_text("\n".join(["path,label", *rows]))
        found.append(open_task(str(data / "list.csv"), **PLAIN | {"held_out": 0}).train.images.fingerprint)
    assert found[0] != found[1]


def test_unreadable_test_images_are_named_and_the_others_scored(data: Path, start: Path, tmp_path: Path) -> None:
    plan, task = make_plan(data, start, tmp_path / "run")
    pretrain(replace(plan, stop=3), lambda p: None)
    broken = next((data / "val/cat").iterdir())
    broken.write_bytes(b"\x89PNG")
    result = conclude(plan, task)
    assert list(result.unread) == [f"cat/{broken.name}"]
    assert len(result.test.names) == 5
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"\x89PNG")
    assert conclude(plan, task).test is None


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ("none", {"several": True, "balanced": True}, "--balanced needs one class per image"),
        ("one", {}, "has 1 class; expected at least 2"),
        ("val", {}, "has the class fox, which"),
    ],
)
def test_wrong_images_are_one_error(data: Path, change: str, how: dict[str, bool], message: str) -> None:
    if change == "one":
        data = data / "train/cat"
        write_images(data / "only", 3, size=16)
        for path in data.glob("*.*"):
            path.unlink()
    if change == "val":
        write_images(data / "val/fox", 1, size=16)
    with pytest.raises(DinoError, match=message):
        open_task(str(data), **PLAIN | how)


def make_plan(data: Path, start: Path, out: Path, *more: str, train: str = "all", **how: object) -> tuple[Plan, Task]:
    task = open_task(str(data), **PLAIN)
    begin = read_starting_point(str(start))
    chosen = recipe(begin, load_preset("finetune"), task, 4, train)
    settings = [f"{k}={v}" for k, v in chosen.items()]
    settings += ["training.epochs=3", "training.precision=float32", *more]
    preset = load_preset("finetune", settings)
    stop = 3 * (len(task.train.images) // 4)
    plan = Plan("finetune", preset, task.train.images, stop, out, CPU, 0, str(start), keep_best=True)
    plan = replace(plan, labels=task.train.labels, held_out=task.held_out, monitor_every=3, **how)
    return plan, task


@pytest.mark.parametrize("train", ["all", "last-1", "lora-2"])
def test_a_stopped_run_resumes_to_the_same_bits(train: str, data: Path, start: Path, tmp_path: Path) -> None:
    plan, _ = make_plan(data, start, tmp_path / "whole", train=train)
    whole = pretrain(plan, lambda p: None)
    parts, _ = make_plan(data, start, tmp_path / "parts", train=train)
    pretrain(replace(parts, stop=5), lambda p: None)
    resumed = pretrain(parts, lambda p: None)
    one, other = load_file(whole.checkpoint), load_file(resumed.checkpoint)
    assert one.keys() == other.keys()
    assert "heads.labels.linear.weight" in one
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_convolutional_stem_is_taken_over(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = "{img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}"
    preset = load_preset("tiny", [f"backbone.options={options}", "views.global_1.size=16", "views.global_2.size=16"])
    write_checkpoint(tmp_path / "start.safetensors", preset.network().weights(), preset, 7)
    plan, _ = make_plan(data, tmp_path / "start.safetensors", tmp_path / "run")
    run = pretrain(replace(plan, stop=1), lambda p: None)
    assert "backbone.patch_embed.proj.0.weight" in load_file(run.checkpoint)


def test_the_best_weights_become_the_checkpoint_and_score_the_test_images(
    data: Path, start: Path, tmp_path: Path
) -> None:
    plan, task = make_plan(data, start, tmp_path / "run")
    pretrain(plan, lambda p: None)
    logged = [json.loads(line) for line in (plan.out / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["accuracy"] for line in logged if "accuracy" in line}
    result = conclude(plan, task)
    assert result.step == max(scores, key=lambda step: (scores[step], -step)), "the first of the best"
    assert result.held_out.accuracy == pytest.approx(scores[result.step], abs=1e-3)
    assert result.test.logits.shape == (6, 3)
    assert result.weight.shape == (3, 16)
    best, kept = load_file(plan.out / BEST), load_file(plan.out / "ckpt.safetensors")
    assert all(torch.equal(best[key], kept[key]) for key in best)


def test_a_run_ends_when_the_accuracy_no_longer_rises_and_stays_ended(data: Path, start: Path, tmp_path: Path) -> None:
    settings = [
        "training.epochs=50",
        "optimizer.lr={kind='constant', value=1e-12}",
        "backbone.learning.frozen_epochs=0",
    ]
    plan, _ = make_plan(data, start, tmp_path / "run", *settings, patience=2)
    plan = replace(plan, stop=200)
    run = pretrain(plan, lambda p: None)
    assert run.step == 6, "step 0 is the best, and two evaluations at steps 3 and 6 are not better"
    assert not run.stopped
    again = pretrain(plan, lambda p: None)
    assert (again.began, again.step, again.stopped) == (6, 6, False)
    (listed,) = list_runs([plan.out])
    assert (listed.step, listed.steps, listed.condition) == (6, 200, "finished early")
    same = (plan.preset, plan.source.fingerprint, str(start), None)
    assert unfinished([plan.out], same, plan.stop) is None, "the same command starts another run"
    more = pretrain(replace(plan, patience=4), lambda p: None)
    assert more.step == 12 and not more.stopped, "unless it names the run and more patience"


def test_average_precision_is_the_score_of_several_classes(data: Path, start: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (data / "train/cat").iterdir())
    rows = [f"train/cat/{name},{'a;b' if i % 2 else 'b'}" for i, name in enumerate(names)]
    (data / "list.csv").write_text("\n".join(["path,label", *rows]))
    task = open_task(str(data / "list.csv"), **PLAIN | {"several": True})
    chosen = recipe(read_starting_point(str(start)), load_preset("finetune"), task, 4, "all")
    preset = load_preset("finetune", [*(f"{k}={v}" for k, v in chosen.items()), "training.precision=float32"])
    plan = Plan("finetune", preset, task.train.images, 3, tmp_path / "run", CPU, 0, str(start), keep_best=True)
    plan = replace(plan, labels=task.train.labels, held_out=task.held_out, monitor_every=3)
    pretrain(plan, lambda p: None)
    result = conclude(plan, task)
    assert 0 <= result.held_out.accuracy <= 100
    assert np.isfinite(result.held_out.logits).all()
    assert result.temperature == 1

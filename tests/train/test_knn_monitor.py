from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_images
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.evals.knn import knn
from dinocli.features.extract import extract
from dinocli.features.store import read_features
from dinocli.method.preset import load_preset
from dinocli.train.knn_monitor import Answers, KnnMonitor, steps_between_evaluations
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.weights.load import load_encoder

CPU = torch.device("cpu")
NONE = np.zeros(1, np.bool_)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Folder with `train` and `val`, whose two classes differ in color."""
    for part, count in (("train", 8), ("val", 4)):
        for label, color in (("dark", 30), ("light", 200)):
            folder = tmp_path / "labelled" / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng((count, color, i)).integers(0, 40, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(noise + np.uint8(color)).save(folder / f"{i}.png")
    return tmp_path / "labelled"


@pytest.fixture
def plan(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    return Plan("tiny", load_preset("tiny-dino", SMALL), image_folder(images), 12, Path("run"), CPU, 0, None)


def test_the_monitor_equals_extract_and_knn(labelled: Path, plan: Plan) -> None:
    run = pretrain(plan, lambda p: None)
    encoder = load_encoder(str(run.folder), CPU)
    parts = {}
    for part in ("train", "val"):
        done = extract(encoder, image_folder(labelled / part), Path(f"{part}.safetensors"), data="x")
        parts[part] = read_features(done.path)
    network = plan.preset.network()
    network.load_weights(dict(_weights(run.checkpoint)), "x")
    monitor = KnnMonitor(str(labelled), plan.preset, workers=0)
    assert monitor.images == 24
    assert monitor.evaluate(network).accuracy == knn(parts["train"], parts["val"], [8]).scores[0].top1


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_monitored_run_ends_in_the_same_bits(labelled: Path, plan: Plan) -> None:
    alone = pretrain(plan, lambda p: None)
    said: list[str] = []
    watched = replace(plan, out=Path("watched"), monitor=str(labelled), monitor_every=5)
    notes: list[str] = []
    run = pretrain(watched, lambda p: notes.append(p.note), said.append)
    assert run.checkpoint.read_bytes() == alone.checkpoint.read_bytes()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == [0, 5, 10, 12]
    assert all(0 <= line["knn"] <= 100 for line in lines if "knn" in line)
    assert said[0].startswith("k-NN before the first step: ")
    assert "k-NN" in notes[-1]


def test_the_network_keeps_its_training_mode(labelled: Path, plan: Plan) -> None:
    network = plan.preset.network()
    network.backbone.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    KnnMonitor(str(labelled), plan.preset, workers=0).evaluate(network)
    assert network.training
    assert network.heads.training
    assert not any(m.training for m in network.backbone.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("steps", [1, 10, 143, 144, 215, 216, 1_000, 4_321])
def test_evaluations_take_at_most_a_twentieth_of_the_time_with_both_ends(steps: int) -> None:
    """24 images cost 3.6 steps of one image: two evaluations are 5 % of 144 steps, three of 216."""
    views = load_preset("tiny-dino", []).views
    every = steps_between_evaluations(24, steps, batch_size=1, views=views)
    evaluated = [step for step in range(steps + 1) if step % every == 0 or step == steps]
    assert len(evaluated) == 2 if steps < 216 else len(evaluated) >= 3
    assert (3.6 * len(evaluated) <= 0.05 * steps) == (steps >= 144)


def test_a_long_run_is_evaluated_twenty_times() -> None:
    views = load_preset("tiny-dino", []).views
    assert steps_between_evaluations(24, steps=100_000, batch_size=1024, views=views) == 5_000


def test_evaluations_take_no_larger_share_of_a_run_of_small_crops() -> None:
    small = ["views.locals=0", "views.local=none", "views.low_resolution={epochs=1, global_size=24}"]
    views = load_preset("tiny-dino", small).views
    every = steps_between_evaluations(24, steps=1_000, batch_size=1, views=views)
    assert every == 500, "a quarter of the pixels: three evaluations cost 43.2 steps"


def test_evaluations_of_a_classifier_cost_a_third_of_its_steps() -> None:
    views = load_preset("finetune", []).views
    assert steps_between_evaluations(24, steps=1_000, batch_size=1, views=views) == 200, "six cost 48 steps"


def test_a_short_run_is_evaluated_at_both_ends(labelled: Path, plan: Plan) -> None:
    run = pretrain(replace(plan, monitor=str(labelled)), lambda p: None)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == [0, 12]


def test_a_monitor_folder_without_classes_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 3)
    with pytest.raises(DinoError, match=r"class folders; .*flat has none"):
        KnnMonitor(str(tmp_path / "flat"), load_preset("tiny-dino", SMALL), workers=0)


def test_classes_of_one_image_are_refused_before_anything_is_written(plan: Plan, tmp_path: Path) -> None:
    write_images(tmp_path / "one" / "a", 4)
    write_images(tmp_path / "single" / "a", 1)
    write_images(tmp_path / "single" / "b", 1)
    write_images(tmp_path / "torn" / "a", 3)
    (tmp_path / "torn" / "b").mkdir()
    (tmp_path / "torn" / "b" / "0.png").write_bytes(b"no image")
    write_images(tmp_path / "parts" / "train" / "a", 3)
    write_images(tmp_path / "parts" / "train" / "b", 3)
    write_images(tmp_path / "parts" / "val" / "c", 3)
    for name, words in (
        ("one", "has 1 with 4"),
        ("single", "has 2 with 1"),
        ("torn", "has 1 with 3"),
        ("parts", "the class c of the test split is not in the training split"),
    ):
        with pytest.raises(DinoError, match=words):
            pretrain(replace(plan, monitor=str(tmp_path / name)), lambda p: None)
        assert not plan.out.exists()


def test_k_is_small_with_few_images_per_class(tmp_path: Path) -> None:
    """With two classes of five images, an image has four others of its class and five of the other one: k = 9 fails."""
    for label, color in (("dark", 30), ("light", 200)):
        (tmp_path / "few" / label).mkdir(parents=True)
        for i in range(5):
            noise = np.random.default_rng((i, color)).integers(0, 4, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(color)).save(tmp_path / "few" / label / f"{i}.png")
    preset = load_preset("tiny-dino", SMALL)
    torch.manual_seed(0)
    assert KnnMonitor(str(tmp_path / "few"), preset, workers=0).evaluate(preset.network()).accuracy == 100


@pytest.mark.parametrize(
    ("init", "hint"),
    [(None, "hint: a lower --set optimizer.lr.start"), ("run", "hint: train as --preset continue-dinov2")],
)
def test_a_significant_drop_is_reported_once(
    plan: Plan, labelled: Path, monkeypatch: pytest.MonkeyPatch, init: str | None, hint: str
) -> None:
    """For 8 images at 90 %, the standard error is 11 points. A drop of more than three times that is reported."""
    if init:
        pretrain(replace(plan, stop=0, out=Path(init)), lambda p: None)
    scores = iter([90.0, 70.0, 50.0, 45.0, 89.0, 40.0])
    monkeypatch.setattr(KnnMonitor, "evaluate", lambda monitor, network: Answers(next(scores), NONE, NONE))
    said: list[str] = []
    watched = replace(plan, out=Path("watched"), monitor=str(labelled), monitor_every=1, stop=5, init=init)
    pretrain(watched, lambda p: None, said.append)
    falls = [line for line in said if line.startswith("warning: k-NN")]
    assert falls == [
        "warning: k-NN has fallen from 90.0 to 50.0 %: the backbone is forgetting",
        "warning: k-NN has fallen from 90.0 to 40.0 %: the backbone is forgetting",
    ]
    assert sum(line.startswith(hint) for line in said) == 2


def test_selection_and_verdict_are_of_different_images(labelled: Path, plan: Plan, tmp_path: Path) -> None:
    network = plan.preset.network()
    both = KnnMonitor(str(labelled), plan.preset, workers=0).evaluate(network)
    assert (len(both.selection), len(both.verdict)) == (16, 8)
    assert both.accuracy == 100 * both.verdict.mean()
    one = KnnMonitor(str(labelled / "train"), plan.preset, workers=0).evaluate(network)
    assert (len(one.selection), len(one.verdict)) == (8, 8)
    assert one.accuracy == 100 * np.concatenate([one.selection, one.verdict]).mean()

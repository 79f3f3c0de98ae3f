"""What the benchmarks compare does the same: else their ratios say nothing."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_images, write_run
from PIL import Image

from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.evals.knn import knn
from dinocli.features.encoder import Encoder
from dinocli.method.preset import Preset, load_preset

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import against_original
from distill_features import measure, presets
from kernels import Kernel, gaps
from knn import TEMPERATURE, drawn
from knn import original as neighbours_of_original
from original import OriginalStep
from probe import Original as OriginalProbe
from probe import labelled
from stopwatch import PARTS, Stopwatch
from ways import WAYS, Job, build, first_losses, made_up

SMALL = (
    "backbone.options={img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2}",
    "backbone.drop_path=0",
    "heads.dino.prototypes=64",
    "heads.dino.hidden=48",
    "heads.dino.bottleneck=16",
    "views.global_1.size=32",
    "views.global_2.size=32",
    "views.local.size=16",
    "training.batch_size=4",
    "training.epochs=4",
    "optimizer.lr.warmup_epochs=1",
)


def small(*changes: str, preset: str = "vits16-vanilla") -> Preset:
    return load_preset(preset, [*SMALL, *changes])


@pytest.mark.parametrize(
    "changes",
    [(), ("heads.dino.norm_last_layer=false",), ("optimizer.clip.norm=0.01",), ("heads.dino.batch_norm=true",)],
)
def test_the_original_written_out_learns_what_this_tool_learns(changes: tuple[str, ...]) -> None:
    # This tool's step is held against the original's own numbers in method/test_distillation.py; so this holds the other to them.
    torch.manual_seed(0)
    preset = small(*changes)
    method, clock = preset.method(), Clock(2, 4)
    began = {k: v.double() for k, v in method.student.weights().items()}
    theirs = OriginalStep(preset, method.student.weights(), clock, torch.device("cpu"), contextlib.nullcontext())
    for module in (method, theirs.student, theirs.teacher, theirs.loss):
        module.double()
    ours = Trainer(method, preset.optimizer, clock, batch_size=4)
    for i in range(5):  # over warm-up and the frozen epoch, and on
        batch = made_up(preset, torch.device("cpu"), seed=i, dtype=torch.float64)
        assert theirs.step(batch) == pytest.approx(ours.step(batch)["loss"].item(), rel=1e-12), f"step {i}"
    learned = method.teacher.weights()
    for name, value in theirs.teacher.state_dict().items():
        key = name if name.startswith("backbone.") else f"heads.dino.{name}"
        torch.testing.assert_close(value, learned[key], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert name == "last_layer.weight_g" or not torch.equal(value, began[key]), f"{name} moved"


def test_all_ways_begin_with_the_same_losses() -> None:
    changes = tuple(c for c in SMALL if not c.startswith("training.batch"))
    job = Job("vits16-vanilla", changes, batch_size=4, device="cpu", threads=1, images=None, steps=1)
    losses = {key: first_losses(way, job) for key, way in WAYS.items()}
    for key, way in WAYS.items():
        tolerance = 1e-5 if way.precision == "float32" else 5e-2
        assert losses[key] == pytest.approx(losses["original"], rel=tolerance), key
    assert losses["original"][0] != pytest.approx(losses["original"][1], rel=1e-3), "two batches, two losses"


def test_the_parts_of_a_step_add_up_to_it() -> None:
    preset = small()
    for key in ("original", "float32", "recomputed"):
        device, ticks = torch.device("cpu"), iter(range(10**6))
        stepper = build(WAYS[key], preset, device)
        backward = torch.autograd.backward
        try:
            watch = Stopwatch(device, lambda ticks=ticks: float(next(ticks)))  # each look at the clock is a second
            watch.attach(stepper)
            watch.begin()
            with watch.part("waiting"):
                batch = made_up(preset, device)
            stepper.step(batch)
            spent = watch.end()
        finally:
            torch.autograd.backward = backward
        assert sum(spent.values()) == next(ticks) - 2, "from the first look to the last"
        assert all(spent[part] > 0 for part in PARTS), (key, spent)


def test_gaps_are_where_no_kernel_runs() -> None:
    # a has b within it, on another stream; c follows at once, d after a while
    a, b, c, d = Kernel("a", 0, 10), Kernel("b", 2, 4), Kernel("c", 10, 11), Kernel("d", 14, 15)
    assert gaps([d, b, a, c]) == [(3, "c", "d")]
    assert gaps([a, Kernel("e", 12, 13), d]) == [(2, "a", "e"), (1, "e", "d")]


def test_the_originals_neighbours_written_out_vote_as_this_tools() -> None:
    # This tool's votes are held against the original's own numbers in evals/test_knn.py; so this holds the other to them.
    train, test = drawn(4000, 384, 0), drawn(200, 384, 1)
    tensors = [torch.from_numpy(x) for f in (train, test) for x in (f.values, f.labels)]
    ours = knn(train, test, [1, 10, 50], TEMPERATURE).scores
    for score in ours:
        top1, top5 = neighbours_of_original(*tensors, score.k)
        assert top1 == pytest.approx(score.top1), score.k
        assert top5 >= score.top5 - 1e-9, "it may count classes without a vote"
    assert 1 < ours[0].top1 < 99


def test_the_originals_probe_written_out_learns(tmp_path: Path, encoder: Encoder) -> None:
    for name, color in (("dark", 40), ("light", 210)):
        for path in write_images(tmp_path / name, 8, 24).iterdir():
            Image.blend(Image.open(path), Image.new("RGB", (24, 24), (color,) * 3), 0.8).save(path)
    train, test = labelled(str(tmp_path), real=False)
    assert (len(train), len(test)) == (16, 3)
    probe = OriginalProbe(encoder, 2, blocks=3)
    for group in probe.optimizer.param_groups:
        group["lr"] = 0.5
    for _ in range(30):
        probe.learn(train)
    scores = probe.scores(train, range(16), probe.centered)
    assert scores.argmax(1).tolist() == train.labels.tolist()


def table_of(*words: str) -> tuple[int, dict, str]:
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "benchmarks" / "step.py"),
        "--device",
        "cpu",
        "--json",
        "--rounds",
        "2",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_table_of_two_ways_and_of_one_that_cannot_be() -> None:
    changes = [word for change in SMALL for word in ("--set", change)]
    code, found, words = table_of(*changes, "--ways", "original", "bfloat16")
    assert code == 0, words
    first, second = found["rows"]
    assert first["ratios"] == [1.0, 1.0]
    assert second["ratios"] == [a / b for a, b in zip(first["seconds"], second["seconds"], strict=True)]
    assert all(row["memory"] > 1e8 and 0 < row["share"] < 1 for row in found["rows"])
    assert "this, bfloat16" in words

    code, found, words = table_of("--preset", "resnet50", "--batch-size", "2", "--ways", "original")
    assert code == 1
    assert "vision transformers" in found["rows"][0]["failed"], words


def test_a_taught_student_and_one_alone_have_equal_networks_images_and_steps(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i, name in enumerate(("a", "b")):
            write_images(tmp_path / "images" / split / name, 8, seed=i)
    student = "{img_size=48, patch_size=8, embed_dim=12, depth=1, num_heads=2}"
    options = argparse.Namespace(
        images=str(tmp_path / "images"), teacher=str(write_run(tmp_path)), preset="tiny", student=student, changes=[],
        taught=[], steps=10, seeds=1, batch_size=4, workers=0, device="cpu",
    )  # fmt: skip
    alone, taught = presets(options)
    assert alone.training.batch_size == taught.training.batch_size
    assert alone.training.steps_per_epoch * alone.training.epochs == 10
    assert taught.training.steps_per_epoch * taught.training.epochs == 10
    assert alone.backbone.options == taught.backbone.options and alone.backbone.name == taught.backbone.name
    found = measure(options, tmp_path / "runs")
    assert [way.partition(" (")[0] for way in found] == ["alone", "taught", "taught, same time", "taught, stored"]
    assert all(0 <= outcome.knn <= 100 and outcome.seconds > 0 for (outcome,) in found.values())


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")), ids=lambda path: path.stem
)
def test_every_script_finds_what_it_imports(path: Path) -> None:
    specification = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)


def test_the_original_and_dinocli_get_the_same_recipe(tmp_path: Path) -> None:
    theirs = against_original.original_words(tmp_path, tmp_path, epochs=8, seed=0)
    given = {word.removeprefix("--"): theirs[i + 1] for i, word in enumerate(theirs) if word.startswith("--")}
    words = against_original.our_words(tmp_path, tmp_path, epochs=8, seed=0)
    ours = load_preset("vits16-vanilla", [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    lr, momentum = ours.optimizer.lr, ours.teacher.momentum
    assert (lr.start, lr.end, lr.warmup_epochs) == (
        float(given["lr"]),
        float(given["min_lr"]),
        float(given["warmup_epochs"]),
    )
    assert momentum.start == float(given["momentum_teacher"])
    assert ours.heads["dino"].prototypes == int(given["out_dim"])
    assert ours.views.locals == int(given["local_crops_number"])
    assert (ours.views.global_1.scale, ours.views.local.scale) == ((0.4, 1.0), (0.15, 0.5))
    assert theirs[-6:] == ["--global_crops_scale", "0.4", "1.0", "--local_crops_scale", "0.15", "0.5"]
    assert ours.backbone.drop_path == float(given["drop_path_rate"])
    assert words[words.index("--batch-size") + 1] == given["batch_size_per_gpu"]


def test_without_the_original_the_comparison_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, problem in (([], "no checkout given"), ([str(tmp_path)], f"{tmp_path} holds no main_dino.py")):
        with pytest.raises(SystemExit):
            against_original.main([str(tmp_path), *words])
        assert f"{problem}; hint: git clone https://github.com/facebookresearch/dino" in capsys.readouterr().err


def test_the_script_for_a_gpu_names_scripts_and_parts_that_exist() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    script = (folder / "gpu.sh").read_text(encoding="utf-8")
    named = set(re.findall(r"benchmarks/(\w+\.py)", script))
    assert {"device_parts.py", "step.py", "kernels.py"} <= named
    assert all((folder / name).is_file() for name in named)
    subprocess.run(["bash", "-n", folder / "gpu.sh"], check=True)


@pytest.mark.slow
def test_the_parts_of_a_device_are_measured_on_a_cpu_too() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "device_parts.py"
    parts = ("ceiling", "update", "attention", "views", "crops", "embedding", "copies")
    words = [sys.executable, script, *parts, "--tiny", "--batch-size", "2", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(dict.fromkeys(line["part"] for line in found)) == list(parts)
    assert all(value > 0 for line in found for value in line.values() if isinstance(value, float))

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.preset import load_preset
from dinocli.train.origin import Origin
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain, rehearse
from dinocli.train.resume import unfinished
from dinocli.train.state import saved_states
from dinocli.weights.checkpoint import write_checkpoint

TINY = [*SMALL, *(line.replace("heads.dino", "heads.ibot") for line in SMALL if line.startswith("heads.dino"))]
TINY[0] = TINY[0].replace("patch_size=8", "patch_size=4")
TINY += ["training.epochs=2", "optimizer.lr.warmup_epochs=0", "optimizer.lr.start=0.1"]


@pytest.fixture(name="plan")
def eight_steps(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    preset = load_preset("tiny-dinov2", TINY)
    return Plan("tiny-dinov2", preset, image_folder(images), 8, Path("runs/base"), torch.device("cpu"), 0, None)


def continuing(plan: Plan, source: str, name: str = "gram-refine", *overrides: str, stop: int = 6) -> Plan:
    origin = Origin.read(source)
    epochs = ["training.epochs=3", *(["losses.gram.weight.warmup_epochs=0"] if name == "gram-refine" else [])]
    preset = load_preset(name, [*epochs, *overrides], origin.preset, origin.peak_lr)
    return replace(plan, name=name, preset=preset, stop=stop, out=Path("runs/stage"), origin=origin)


def trainer_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "state" / str(step) / "trainer.safetensors")


def quiet(plan: Plan) -> Path:
    return pretrain(plan, lambda p: None).folder


def test_a_stage_starts_with_networks_losses_and_optimizer_of_the_run(plan: Plan) -> None:
    base = trainer_of(quiet(plan), 8)
    said: list[str] = []
    stage = continuing(plan, "runs/base")
    run = pretrain(replace(stage, stop=1), lambda p: None, said.append)
    assert said[0] == "continuing runs/base after 8 steps, with the state of its optimizer"
    start = trainer_of(run.folder, 0)
    kept = {
        key for key in start if key.startswith(("method/student.", "method/teacher.", "method/losses.", "optimizer/"))
    }
    assert kept == {key for key in base if key != "skipped"} and any(key.endswith("exp_avg_sq") for key in kept)
    assert all(torch.equal(start[key], base[key]) for key in kept)
    after = trainer_of(run.folder, 1)
    moment = next(key for key in kept if key.endswith("mlp.fc1.weight/step"))
    assert (start[moment], after[moment]) == (8, 9), "Adam counts on"
    anchor = {key: value for key, value in after.items() if key.startswith("method/gram.")}
    assert anchor
    for key, value in anchor.items():
        assert torch.equal(value, base[key.replace("method/gram.", "method/teacher.")]), "the run's average at its end"


@pytest.mark.parametrize("name", ["gram-refine", "high-resolution"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stage_stops_anywhere_and_ends_in_the_same_bits(plan: Plan, name: str, workers: int) -> None:
    quiet(plan)
    stage = continuing(plan, "runs/base", name, stop=9)
    whole = quiet(replace(stage, workers=workers))
    parts = replace(stage, out=Path("runs/parts"))
    for stop in (3, 4, 9):
        again = quiet(replace(parts, stop=stop))
    one, other = trainer_of(whole, 9), trainer_of(again, 9)
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert (whole / "ckpt.safetensors").read_bytes() == (again / "ckpt.safetensors").read_bytes()
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["gram/weight"] > 0 and last["lr"] == pytest.approx(stage.lr.value)


def test_a_checkpoint_alone_starts_the_optimizer_anew_and_says_so(plan: Plan) -> None:
    base = trainer_of(quiet(plan), 8)
    shutil.copy("runs/base/ckpt.safetensors", "alone.safetensors")
    said: list[str] = []
    run = pretrain(continuing(plan, "alone.safetensors", stop=0), lambda p: None, said.append)
    assert said[0].startswith(
        "continuing alone.safetensors after 8 steps, a checkpoint alone: the optimizer starts anew"
    )
    start = trainer_of(run.folder, 0)
    assert not any(key.startswith("optimizer/") for key in start)
    for key in (key for key in base if key.startswith("method/teacher.")):
        assert torch.equal(start[key], base[key])
        assert torch.equal(start[key.replace("teacher.", "student.")], base[key])
    stages = json.loads((run.folder / "stages.json").read_text())["stages"]
    assert [(s["source"], s["steps"], s["optimizer"]) for s in stages] == [("alone.safetensors", 8, False)]


def test_stages_add_up_in_state_and_report_and_refer_to_the_first_rate(plan: Plan) -> None:
    quiet(plan)
    first = continuing(plan, "runs/base", stop=2)
    quiet(first)
    second = replace(continuing(plan, "runs/stage", "high-resolution", stop=2), out=Path("runs/third"), report=True)
    quiet(second)
    (_, state), *_ = saved_states(Path("runs/third"))
    assert [(s.source, s.steps, s.optimizer) for s in state.stages] == [("runs/base", 8, True), ("runs/stage", 2, True)]
    assert first.preset.optimizer.lr.value == pytest.approx(0.1 * 0.1)
    assert second.preset.optimizer.lr.value == pytest.approx(0.05 * 0.1), "not a share of the stage's share"
    page = Path("runs/third/report.html").read_text()
    for words in ("runs/base", "runs/stage", "this run", "Gram anchoring of a finished run"):
        assert words in page.partition('id="stages"')[2].partition("</section>")[0]


def test_an_unfinished_run_is_refused_but_its_state_is_not(plan: Plan) -> None:
    pretrain(plan, lambda p: os.kill(os.getpid(), signal.SIGINT))
    (folder, state), *_ = saved_states(plan.out)
    assert 0 < state.step < 8
    with pytest.raises(DinoError, match=f"--from runs/base is unfinished: {state.step} of 8 steps done") as error:
        Origin.read("runs/base")
    assert f"--from {folder}" in error.value.hint
    assert Origin.read(str(folder)).stages[-1].steps == state.step


def test_a_run_of_fewer_steps_by_request_is_finished(plan: Plan) -> None:
    quiet(replace(plan, stop=3))
    assert Origin.read("runs/base").stages[-1].steps == 3


def test_a_corrupt_state_is_refused_and_stays_where_it_is(plan: Plan) -> None:
    quiet(replace(plan, stop=3))
    quiet(plan)
    (Path("runs/base/state/8/trainer.safetensors")).write_bytes(b"nothing")
    for source in ("runs/base", "runs/base/state/8"):
        with pytest.raises(DinoError, match="the state in runs/base/state/8 is corrupt") as error:
            Origin.read(source)
        assert "runs/base/ckpt.safetensors" in error.value.hint
    assert Path("runs/base/state/8").exists()
    assert Origin.read("runs/base/state/3").stages[-1].steps == 3


def test_files_that_are_no_run_are_refused(plan: Plan) -> None:
    with pytest.raises(DinoError, match="nowhere does not exist"):
        Origin.read("nowhere")
    with pytest.raises(DinoError, match="--from timm:resnet18 is a released backbone") as error:
        Origin.read("timm:resnet18")
    assert "--init timm:resnet18" in error.value.hint
    from timm import create_model

    model = create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, "official.pth")
    with pytest.raises(DinoError, match=r"official\.pth was not written by this tool"):
        Origin.read("official.pth")


def test_another_network_is_refused_when_it_is_planned(plan: Plan) -> None:
    quiet(plan)
    with pytest.raises(DinoError, match=r"--from runs/base has backbone\.options\.embed_dim = 16; this preset sets 32"):
        continuing(plan, "runs/base", "gram-refine", "backbone.options.embed_dim=32")


def test_a_dry_run_reads_the_weights_as_the_run_would(plan: Plan) -> None:
    quiet(plan)
    stage = continuing(plan, "runs/base")
    rehearse(stage)
    assert not stage.out.exists()
    (Path("runs/base/state/8/trainer.safetensors")).write_bytes(b"nothing")
    for check in (rehearse, lambda plan: pretrain(plan, lambda p: None)):
        with pytest.raises(DinoError, match=r"the state in runs/base/state/8 is damaged") as error:
            check(stage)
        assert "--from runs/base/state/8/ckpt.safetensors" in error.value.hint
    assert not (stage.out / "ckpt.safetensors").exists()


def test_another_optimizer_starts_anew(plan: Plan) -> None:
    quiet(plan)
    sgd = ["optimizer.kind=sgd", "optimizer.betas=none", "optimizer.momentum=0.9"]
    said: list[str] = []
    stage = continuing(plan, "runs/base", "gram-refine", *sgd, "optimizer.eps=none", stop=1)
    pretrain(stage, lambda p: None, said.append)
    assert said[0].endswith("the optimizer starts anew, since sgd replaces adamw")


def test_a_stage_resumes_only_with_its_own_origin(plan: Plan) -> None:
    quiet(plan)
    stage = continuing(plan, "runs/base", stop=4)
    pretrain(stage, lambda p: os.kill(os.getpid(), signal.SIGINT))
    same = (stage.preset, stage.source.fingerprint, None, None)
    assert unfinished([stage.out], same, 4, stage.stages) == stage.out
    assert unfinished([stage.out], same, 4) is None
    with pytest.raises(DinoError, match="the run in runs/stage continued runs/base") as error:
        quiet(replace(stage, origin=None))
    assert "--from runs/base" in error.value.hint
    with pytest.raises(DinoError, match="did not continue another run"):
        quiet(replace(stage, preset=plan.preset, out=plan.out))


def test_runs_without_heads_or_with_lora_are_refused_at_once(tmp_path: Path) -> None:
    made = load_preset("tiny-dino", [*SMALL, "backbone.learning.trained={kind='lora', rank=2}"])
    write_checkpoint(tmp_path / "lora.safetensors", made.network().weights(), made, 3)
    with pytest.raises(DinoError, match="was trained with LoRA") as error:
        Origin.read(str(tmp_path / "lora.safetensors"))
    assert error.value.hint.startswith(f"--init {tmp_path / 'lora.safetensors'}")


def test_the_clock_of_a_run_is_that_of_its_last_step(tmp_path: Path) -> None:
    made = load_preset("tiny-dino", [*SMALL, "training.epochs=5"])
    write_checkpoint(tmp_path / "x.safetensors", made.network().weights(), made, 7)
    clock = Origin.read(str(tmp_path / "x.safetensors")).clock
    assert clock is not None
    assert (clock.step, clock.total) == (7, 20)
    stage = load_preset("gram-refine", [], made, 0.0, clock)
    expected = made.optimizer.weight_decay.at(clock)
    assert stage.optimizer.weight_decay.bounds == (pytest.approx(expected),)
    assert expected < max(made.optimizer.weight_decay.bounds)

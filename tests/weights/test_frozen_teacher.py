"""A pretrained network teaches a smaller one and never changes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL

from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import Batch
from dinocli.data.sources.open import image_folder
from dinocli.engine.schedules import Clock
from dinocli.method.distillation import SelfDistillation
from dinocli.method.preset import Preset, load_preset
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain
from dinocli.weights.checkpoint import read_weights, write_checkpoint
from dinocli.weights.frozen_teacher import FrozenTeacher

SHAPES = [s for s in SMALL if not s.startswith("heads.dino.")]
HEADS = ["prototypes=16", "hidden=16", "bottleneck=8", "batch_norm=false"]
BOTH = [*SHAPES, *(f"heads.{head}.{key}" for head in ("dino", "ibot") for key in HEADS)]
LARGER = "backbone.options={img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, init_values=1e-5}"


def wrote(folder: Path, preset: Preset, seed: int) -> str:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    write_checkpoint(folder / "ckpt.safetensors", preset.network().weights(), preset, 0)
    return str(folder)


@pytest.fixture
def larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenTeacher:
    monkeypatch.chdir(tmp_path)
    return FrozenTeacher.read(wrote(tmp_path / "larger", load_preset("tiny-dinov2", [*BOTH, LARGER]), 1))


def student(*more: str) -> Preset:
    return load_preset("tiny-dinov2", [*BOTH, "teacher.frozen=true", "views.mask=none", "losses.koleo=none", *more])


def method_of(preset: Preset, teacher: FrozenTeacher) -> SelfDistillation:
    torch.manual_seed(0)
    method = preset.method(teacher.network(preset))
    teacher.load(method.teacher)
    return method.double()


def plan_of(preset: Preset, teacher: FrozenTeacher, images: Path, **more: object) -> Plan:
    source, cpu = image_folder(images), torch.device("cpu")
    return Plan("tiny", preset, source, 6, Path("runs/small"), cpu, 0, None, teacher=teacher, **more)  # type: ignore[arg-type]


def test_the_frozen_teacher_sets_targets_of_class_tokens_and_patches(larger: FrozenTeacher) -> None:
    rule = '{kind="centering", momentum=0.9, temperature={kind="constant", value=0.05}}'
    preset = student(f"losses.dino.targets={rule}", f"losses.ibot.targets={rule}")
    method, clock = method_of(preset, larger), Clock(4, 8)
    shown = torch.randn(2, 3, 3, 16, 16, dtype=torch.float64), torch.randn(4, 3, 3, 8, 8, dtype=torch.float64)
    for parts in (1, 3):
        batch = Batch(*shown, torch.arange(3))
        made = [method(part) for part in method.parts(batch, parts, clock)]
        losses = {name: torch.stack([terms[name] for terms in made]).mean() for name in made[0]}
        # By hand: cross-entropy of the teacher's output at temperature 0.05 and the student's at 0.1.
        said = larger.network(preset)
        larger.load(said)
        said = said.double().eval()
        teacher = [said([view[None]]) for view in shown[0]]
        views = [method.student([view[None]]) for group in shown for view in group]
        pairs = [(g, v) for g in range(2) for v in range(6) if g != v]
        by_hand = torch.stack(
            [
                -(
                    F.softmax(teacher[g].class_logits["dino"][0] / 0.05, -1)
                    * F.log_softmax(views[v].class_logits["dino"][0] / 0.1, -1)
                )
                .sum(-1)
                .mean()
                for g, v in pairs
            ]
        ).mean()
        torch.testing.assert_close(losses["dino"], by_hand * preset.losses.dino.weight, rtol=1e-9, atol=0)
        patches = [
            -(
                F.softmax(teacher[g].masked_logits["ibot"] / 0.05, -1)
                * F.log_softmax(views[g].masked_logits["ibot"] / 0.1, -1)
            ).sum(-1)
            for g in range(2)
        ]
        assert patches[0].shape == (3 * 4,)
        torch.testing.assert_close(
            losses["ibot"], torch.stack(patches).mean() * preset.losses.ibot.weight, rtol=1e-9, atol=0
        )


def test_a_run_exports_the_students_average_and_the_teacher_is_unchanged(larger: FrozenTeacher, images: Path) -> None:
    preset = student("training.batch_size=4", 'teacher.momentum={kind="constant", value=0.5}')
    plan = plan_of(preset, larger, images)
    run = pretrain(plan, lambda progress: None)
    handed_on = read_weights(run.folder)
    assert handed_on.backbone["cls_token"].shape[-1] == 16
    assert handed_on.preset == preset
    saved = json.loads((run.folder / "state" / "6" / "state.json").read_text())
    assert saved["teacher"] == larger.fingerprint
    kept = read_state(run.folder / "state" / "6")
    assert {name.split(".")[0] for name in kept} == {"student", "spare", "losses"}
    student_now, average = kept["student.backbone.model.cls_token"], kept["spare.backbone.model.cls_token"]
    assert torch.equal(average.flatten(), handed_on.backbone["cls_token"].flatten())
    assert not torch.equal(student_now, average)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"dino/information", "ibot", "momentum"} <= lines[-1].keys()
    assert "feature_std" not in lines[-1], "a frozen teacher's features do not depend on the run"


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "trainer.safetensors")
    return {k.removeprefix("method/"): v for k, v in tensors.items() if k.startswith("method/")}


def test_the_average_follows_the_student_and_the_teacher_never_changes(larger: FrozenTeacher) -> None:
    method = method_of(student('teacher.momentum={kind="constant", value=0.75}'), larger)
    before = {
        name: [p.clone() for p in network.parameters()] for name, network in method.named_children() if name != "losses"
    }
    with torch.no_grad():
        for p in method.student.parameters():
            p += 1
    method.after_step(Clock(4, 8), torch.tensor(True))
    for p, old, own in zip(method.average.parameters(), before["spare"], before["student"], strict=True):
        torch.testing.assert_close(p.data, 0.75 * old + 0.25 * (own + 1))
    assert all(torch.equal(p, old) for p, old in zip(method.teacher.parameters(), before["teacher"], strict=True))
    method.train()
    assert method.student.training and not method.teacher.training


def test_a_resumed_run_needs_the_same_teacher_and_writes_the_same_checkpoint(
    larger: FrozenTeacher, images: Path, tmp_path: Path
) -> None:
    preset = student()
    whole = pretrain(plan_of(preset, larger, images), lambda progress: None)
    parted = replace(plan_of(preset, larger, images), out=Path("runs/parted"))
    stopped = pretrain(parted, lambda progress: os.kill(os.getpid(), signal.SIGINT))
    assert stopped.stopped
    other = FrozenTeacher.read(wrote(tmp_path / "other", larger.preset, 2))
    with pytest.raises(DinoError, match=r"began with another teacher than .*other"):
        pretrain(replace(parted, teacher=other), lambda progress: None)
    run = pretrain(parted, lambda progress: None)
    assert (run.began, run.step) == (stopped.step, 6)
    assert run.checkpoint.read_bytes() == whole.checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (["heads.dino.prototypes=32"], "has 16 prototypes; the student's has 32", "--set heads.dino.prototypes=16"),
        (
            [
                "heads.dino={hidden=16, bottleneck=8, layers=2}",
                "losses.dino=none",
                "losses.simdino={weight=1, head='dino', eps=0.05, with_teacher=true}",
            ],
            "has 16 prototypes; the student's has features of width 8",
            "--set heads.dino.prototypes=16",
        ),
        (["views.mean=[0.1, 0.2, 0.3]"], r"differs from the teacher's \[0.485", r"--set views.mean='\[0.485"),
        (
            ["backbone.options={img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2}"],
            "the teacher has 2x2 patches and the student 4x4",
            "a student with patches of 8 pixels",
        ),
    ],
)
def test_an_unfit_teacher_is_an_error(larger: FrozenTeacher, changes: list[str], message: str, hint: str) -> None:
    with pytest.raises(DinoError, match=message) as error:
        larger.network(student(*changes))
    assert hint.replace("\\", "") in (error.value.hint or "")


def test_a_head_teaches_only_the_tokens_that_it_was_trained_on(tmp_path: Path) -> None:
    of_class = FrozenTeacher.read(
        wrote(tmp_path / "dino", load_preset("tiny-dinov2", [*BOTH, "losses.ibot=none", "views.mask=none"]), 0)
    )
    with pytest.raises(DinoError, match=r"losses.ibot applies the teacher's head ibot to patches"):
        of_class.network(student())
    of_class.network(student("losses.ibot=none"))
    named = student("losses.ibot=none").model_dump(mode="json")
    named["heads"] = {"mine": named["heads"]["dino"]}
    named["losses"]["dino"]["head"] = "mine"
    with pytest.raises(DinoError, match=r"has no head mine; its heads are dino, ibot"):
        of_class.network(Preset.parse(named, "mine"))


def test_a_teacher_without_heads_is_refused(tmp_path: Path) -> None:
    backbone = load_preset("tiny-dinov2", BOTH).network().backbone.model.state_dict()
    torch.save(backbone, tmp_path / "backbone.pth")
    with pytest.raises(DinoError, match="its heads are unknown; expected a teacher with heads"):
        FrozenTeacher.read(str(tmp_path / "backbone.pth"))


def test_preset_and_plan_agree_on_a_frozen_teacher(larger: FrozenTeacher, images: Path) -> None:
    with pytest.raises(DinoError, match="--teacher is not set"):
        replace(plan_of(student(), larger, images), teacher=None)
    follows = load_preset("tiny-dinov2", BOTH)
    with pytest.raises(DinoError, match=r"--teacher is set, and teacher\.frozen is false"):
        plan_of(follows, larger, images)

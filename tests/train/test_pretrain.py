from __future__ import annotations

import ast
import gc
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, of_channels
from safetensors.torch import load_file, save_file

from dinocli.core.errors import DinoError
from dinocli.core.runs import newest_run
from dinocli.data.loader.batch import Batch
from dinocli.data.sources.open import image_folder
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer
from dinocli.method.distillation import Part, SelfDistillation
from dinocli.method.preset import Preset, load_preset
from dinocli.train import pretrain as pretraining
from dinocli.train.plan import Plan
from dinocli.train.pretrain import Progress, pretrain
from dinocli.train.state import newest, saved_states
from dinocli.weights.checkpoint import read_weights, write_checkpoint
from dinocli.weights.load import load_encoder, start_from


@pytest.fixture(name="plan")
def six_steps(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    return Plan(
        "tiny",
        load_preset("tiny-dino", SMALL),
        image_folder(images),
        6,
        Path("runs/tiny-1"),
        torch.device("cpu"),
        0,
        None,
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(folder).backbone


def test_a_run_folder_holds_checkpoint_metrics_preset_and_states(plan: Plan) -> None:
    seen: list[Progress] = []
    run = pretrain(plan, seen.append)
    assert run.folder == Path("runs/tiny-1")
    assert sorted(p.name for p in run.folder.iterdir()) == ["ckpt.safetensors", "metrics.jsonl", "preset.json", "state"]
    assert Preset.parse(json.loads((run.folder / "preset.json").read_text()), "stored") == plan.preset
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 6] == [p.step for p in seen]
    assert {"loss", "dino", "grad_norm", "lr", "weight_decay", "images_per_second", "epoch", "peak_memory"} <= set(
        lines[0]
    )
    assert (run.step, run.stopped, run.loss) == (6, False, lines[-1]["loss"])
    assert newest_run() == run.folder


def test_the_same_seed_gives_the_same_bits_with_any_number_of_workers(plan: Plan) -> None:
    runs = [
        weights_of(pretrain(replace(plan, workers=w, out=Path(f"runs/{i}")), lambda p: None).folder)
        for i, w in enumerate((0, 0, 2))
    ]
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())
    files = [Path(f"runs/{i}/ckpt.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] == files[2]
    other = plan.preset.model_copy(update={"training": plan.preset.training.model_copy(update={"seed": 1})})
    assert not torch.equal(
        weights_of(pretrain(replace(plan, preset=other, out=Path("runs/other")), lambda p: None).folder)["cls_token"],
        runs[0]["cls_token"],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [(), ("views.locals=0", "views.local=none")], ids=["multi-crop", "no-local-crops"])
def test_a_gpu_learns_like_the_cpu(plan: Plan, changes: tuple[str, ...]) -> None:
    plan = replace(plan, preset=load_preset("tiny-dino", [*SMALL, *changes]))
    losses = [
        pretrain(replace(plan, device=torch.device(d), out=Path(f"runs/{d}")), lambda p: None).loss
        for d in ("cpu", "cuda")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05), "bfloat16 products, and nothing else, tell them apart"


def test_a_run_of_no_steps_writes_the_untrained_network(plan: Plan) -> None:
    run = pretrain(replace(plan, stop=0), lambda p: None)
    torch.manual_seed(plan.preset.training.seed)
    fresh = plan.preset.method().teacher.backbone.model.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in weights_of(run.folder).items())
    assert run.loss is None


def test_the_rate_follows_the_batch(plan: Plan) -> None:
    run = pretrain(plan, lambda p: None)
    lr, lines = plan.preset.optimizer.lr, (run.folder / "metrics.jsonl").read_text().splitlines()
    assert plan.preset.optimizer.lr_rule.batch == 256
    for line in map(json.loads, lines):
        at = replace(plan.clock, step=line["step"] - 1)
        expected = lr.model_copy(update={"start": lr.start * 4 / 256}).at(at)
        assert line["lr"] == pytest.approx(expected, rel=1e-12)
    assert line["lr"] > 0


def test_the_teacher_keeps_its_own_batch_norm_statistics(plan: Plan) -> None:
    preset = load_preset("tiny-dino", [*SMALL, "heads.dino.batch_norm=true"])
    run = pretrain(replace(plan, preset=preset), lambda p: None)
    assert read_weights(run.folder).heads["dino"]["mlp.1.num_batches_tracked"] == run.step == 6


def test_training_moves_the_teacher(plan: Plan) -> None:
    before, after = (
        weights_of(pretrain(replace(plan, stop=s, out=Path(f"runs/{s}")), lambda p: None).folder) for s in (0, 12)
    )
    assert not torch.equal(before["blocks.0.attn.proj.weight"], after["blocks.0.attn.proj.weight"])


DROPPING = (*SMALL, "backbone.drop_path=0.5", "backbone.options.depth=3")


def test_activation_checkpointing_gives_the_same_bits(plan: Plan) -> None:
    """Dropped paths are drawn once, and are the same in the recomputation."""
    plan = replace(plan, preset=load_preset("tiny-dino", DROPPING))
    once = pretrain(plan, lambda p: None)
    again = pretrain(replace(plan, out=Path("runs/again"), recompute=True), lambda p: None)
    for key, value in weights_of(once.folder).items():
        assert torch.equal(value, weights_of(again.folder)[key]), key


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(plan: Plan) -> None:
    plan = replace(plan, preset=load_preset("tiny-dino", DROPPING))
    plain = pretrain(plan, lambda p: None)
    compiled = pretrain(replace(plan, out=Path("runs/compiled"), compiled=True), lambda p: None)
    torch.testing.assert_close(weights_of(compiled.folder), weights_of(plain.folder), rtol=1e-3, atol=1e-4)


def test_garbage_is_collected_only_at_logged_steps(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    def report(progress: Progress) -> None:
        enabled.append(gc.isenabled())

    gc.unfreeze()
    assert gc.isenabled()
    pretrain(plan, report)
    assert enabled == [False, False], "one per logged step"
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_a_caller_hid_from_garbage_collection_stays_hidden(plan: Plan) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    pretrain(plan, lambda p: None)
    assert frozen / 2 < gc.get_freeze_count() <= frozen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_with_the_weights_saved(plan: Plan, number: int) -> None:
    handler = signal.getsignal(number)
    run = pretrain(plan, lambda p: os.kill(os.getpid(), number) if p.step == 1 else None)
    assert (run.step, run.stopped) == (1, True)
    assert weights_of(run.folder)
    assert signal.getsignal(number) is handler


def test_a_finished_run_is_unchanged(plan: Plan) -> None:
    pretrain(plan, lambda p: None)
    before, said = {p: p.read_bytes() for p in plan.out.rglob("*") if p.is_file()}, []
    run = pretrain(plan, lambda p: None, said.append)
    assert said == ["runs/tiny-1 is finished: 6 steps done, 6 requested"]
    assert (run.step, run.stopped, run.loss) == (6, False, None)
    assert {p: p.read_bytes() for p in plan.out.rglob("*") if p.is_file()} == before


def test_a_folder_with_only_weights_is_not_overwritten(plan: Plan) -> None:
    pretrain(plan, lambda p: None)
    shutil.rmtree(plan.out / "state")
    before = (plan.out / "ckpt.safetensors").read_bytes()
    with pytest.raises(DinoError, match=r"holds a ckpt\.safetensors but no valid state") as error:
        pretrain(plan, lambda p: None)
    assert "--init runs/tiny-1 to start from its weights" in error.value.hint
    assert (plan.out / "ckpt.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "preset.json", "report.html"])
def test_the_users_files_are_not_overwritten(plan: Plan, name: str) -> None:
    plan.out.mkdir(parents=True)
    (plan.out / name).write_text('{"step": 7}\nmine\n')
    (plan.out / "notes.txt").touch()
    with pytest.raises(DinoError, match=f"holds a {name} but no valid state"):
        pretrain(replace(plan, report=True), lambda p: None)
    assert sorted(path.name for path in plan.out.iterdir()) == sorted([name, "notes.txt"])
    assert (plan.out / name).read_text() == '{"step": 7}\nmine\n'
    (plan.out / name).unlink()
    assert pretrain(plan, lambda p: None).step == 6, "other files are no obstacle"


def test_a_dry_run_refuses_a_folder_with_only_corrupt_states_as_the_run_does(plan: Plan) -> None:
    pretrain(plan, lambda p: None)
    for folder, _ in saved_states(plan.out):
        (folder / "state.json").write_text("{")
    with pytest.raises(DinoError, match=r"holds a ckpt\.safetensors but no valid state"):
        pretraining.rehearse(plan)
    assert [path.name for path in (plan.out / "state").glob("damaged-*")] == []
    with pytest.raises(DinoError, match=r"holds a ckpt\.safetensors but no valid state"):
        pretrain(plan, lambda p: None)


def test_views_have_the_precision_of_a_run_whose_networks_cast_them(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The meta device takes the way of a GPU.
    monkeypatch.setattr("dinocli.core.device.has_bfloat16", lambda device: True)
    on_device = replace(plan, device=torch.device("meta"))
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        training = plan.preset.training.model_copy(update={"precision": precision})
        those = replace(on_device, preset=plan.preset.model_copy(update={"training": training}))
        method = plan.preset.method()
        trainer = Trainer(method, plan.preset.optimizer, Clock(4, 3), batch_size=4)
        batches = pretraining._batches(those, trainer, method, lambda line: None)
        assert next(iter(batches)).global_crops.dtype == dtype
        batches.close()


def test_a_failed_start_leaves_no_folder(plan: Plan) -> None:
    with pytest.raises(DinoError, match="does not exist"):
        pretrain(replace(plan, init="missing.pth"), lambda p: None)
    assert not Path("runs").exists()


def test_non_finite_steps_are_skipped_and_twenty_in_a_row_end_the_run(plan: Plan, images: Path) -> None:
    hot = plan.preset.optimizer.model_copy(update={"lr": plan.preset.optimizer.lr.scaled(1e12), "clip": None})
    broken = replace(plan, preset=plan.preset.model_copy(update={"optimizer": hot}), stop=60)
    seen: list[Progress] = []
    with pytest.raises(DinoError, match=r"not finite in \d+ steps in a row, up to 30") as error:
        pretrain(broken, seen.append)
    assert "--init runs/tiny-1/state/STEP" in error.value.hint
    assert all(v.isfinite().all() for v in weights_of(Path("runs/tiny-1")).values())
    assert [folder.name for folder, _ in saved_states(plan.out)] == ["30", "0"]
    assert seen[-1].skipped > 20
    assert f"{seen[-1].skipped} steps skipped" in seen[-1].note
    named = [line.split("\t") for line in (plan.out / "not_finite.txt").read_text().splitlines()]
    assert len(named) == 30 * 4, "four images of each of the last thirty steps"
    assert all((images / ast.literal_eval(name)).is_file() for _, name in named)


class Spoiled(Trainer):
    """Trainer whose average is not finite from the fourth step on, with a finite loss and gradient."""

    def step(self, batch: object, *, log: bool = False) -> dict:
        values = super().step(batch, log=log)
        if self.clock.step >= 4:
            self.method.average.backbone.model.cls_token.data[..., 0] = torch.nan
        return values


def test_a_run_that_skipped_every_step_is_an_error(plan: Plan) -> None:
    spoiled = plan.preset.model_copy(update={"views": plan.preset.views.model_copy(update={"std": (1e-45,) * 3})})
    with pytest.raises(DinoError, match="not finite in 2 steps in a row, up to 2"):
        pretrain(replace(plan, preset=spoiled, stop=2), lambda p: None)


def test_a_non_finite_state_is_not_resumed(plan: Plan) -> None:
    """An earlier version saved such states."""
    pretrain(replace(plan, stop=2), lambda p: None)
    saved = newest(plan.out, pytest.fail)
    trainer, _, _ = pretraining._trainer(plan, saved, pytest.fail, lambda: False)
    tensors = load_file(saved.folder / "trainer.safetensors")
    tensors["method/student.backbone.model.cls_token"][..., :2] = torch.inf
    save_file(tensors, saved.folder / "trainer.safetensors")
    with pytest.raises(DinoError, match=r"state/2 cannot be used: method/student.backbone.model.cls_token holds 2 of"):
        saved.restore(trainer)
    assert trainer.is_finite()


def test_initial_weights_of_a_run_include_its_heads(plan: Plan) -> None:
    run = pretrain(plan, lambda p: None)
    stored = read_weights(run.folder)
    method = plan.preset.method()
    start_from(method, str(run.folder))
    for network in (method.student, method.teacher):
        assert torch.equal(network.backbone.model.cls_token, stored.backbone["cls_token"])
        assert torch.equal(network.heads["dino"].last_layer.weight_v, stored.heads["dino"]["last_layer.weight_v"])


def test_a_run_with_masked_patches_saves_and_resumes(plan: Plan) -> None:
    """A resumed run ends in the same bits, `read_weights` reads its weights, and `--init` loads its mask token."""
    small = [*SMALL, *(line.replace("heads.dino", "heads.ibot") for line in SMALL if line.startswith("heads.dino"))]
    small[0] = small[0].replace("patch_size=8", "patch_size=4")
    preset = load_preset("tiny-dinov2", small)
    whole = pretrain(replace(plan, preset=preset), lambda p: None)
    parts = replace(plan, preset=preset, out=Path("runs/parts"))
    for stop in (2, 6):
        again = pretrain(replace(parts, stop=stop, workers=stop // 4), lambda p: None)
    assert again.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    stored = read_weights(whole.folder)
    assert stored.mask_token is not None
    assert stored.mask_token.abs().sum() > 0, "the token was trained"
    assert load_encoder(str(whole.folder), torch.device("cpu")).features(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    method = preset.method()
    assert start_from(method, str(whole.folder)) == []
    assert torch.equal(method.student.mask_token, stored.mask_token)
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"ibot", "koleo", "ibot/kl", "koleo/distance"} <= set(lines[-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_gram_anchoring_stops_anywhere_and_ends_in_the_same_bits(plan: Plan, workers: int) -> None:
    small = [*SMALL, *(line.replace("heads.dino", "heads.ibot") for line in SMALL if line.startswith("heads.dino"))]
    small[0] = small[0].replace("patch_size=8", "patch_size=4")
    gram = "losses.gram={weight={kind='cosine', start=0, end=50}, first_update=1, update_every=1, scale=2}"
    plan = replace(plan, preset=load_preset("tiny-dinov2", [*small, gram, "losses.ibot.visible=1"]), stop=10)
    whole = pretrain(replace(plan, workers=workers), lambda p: None)
    parts = replace(plan, out=Path("runs/parts"))
    for stop in (4, 5, 8, 10):  # at a copy of the average and between two
        again = pretrain(replace(parts, stop=stop), lambda p: None)
    assert again.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    names = [load_file(run.folder / "state" / "10" / "trainer.safetensors") for run in (whole, again)]
    assert all(torch.equal(value, names[1][key]) for key, value in names[0].items())
    last = json.loads((whole.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["gram"] > 0 and last["gram/weight"] > 0
    assert not any("gram" in key for key in load_file(whole.checkpoint)), "the Gram teacher is not exported"


LOW = [
    *(line.replace("patch_size=8", "patch_size=4") for line in SMALL),
    "views.mask={share=0.5, ratio=[0.1, 0.5], smallest=2, aspect=[0.3, 3.33]}",
    "training.steps_per_epoch=2",
    "views.low_resolution={epochs=2, global_size=8}",
]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_low_resolution_stops_anywhere_and_ends_in_the_same_bits(
    plan: Plan, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, int]] = []
    parts_of = SelfDistillation.parts

    def seen(self: SelfDistillation, batch: Batch, count: int, clock: Clock) -> list[Part]:
        grids.append((clock.step, batch.masks.where.shape[-1]))
        return parts_of(self, batch, count, clock)

    monkeypatch.setattr(SelfDistillation, "parts", seen)
    plan = replace(plan, preset=load_preset("tiny-dino", LOW), stop=8, workers=workers)
    whole = pretrain(plan, lambda p: None)
    assert grids == [(step, 4 if step < 4 else 16) for step in range(8)]
    parts = replace(plan, out=Path("runs/parts"))
    for stop in (3, 4, 5, 8):  # before the switch, at it and after it
        again = pretrain(replace(parts, stop=stop), lambda p: None)
    assert again.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    assert grids[8:] == grids[:8]
    assert load_encoder(str(whole.folder), torch.device("cpu")).size == 16, "it looks at images of full size"
    other = replace(parts, stop=12, preset=load_preset("tiny-dino", [*LOW, "views.low_resolution.epochs=3"]))
    with pytest.raises(DinoError, match=r"began with views\.low_resolution\.epochs = 2; 3 is now set"):
        pretrain(other, lambda p: None)


@pytest.mark.parametrize(
    "backbone",
    [
        "{name='vit_small_patch16_dinov3', options={img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2}}",
        "{name='vit_tiny_patch16_224', positions='antialias', "
        "options={img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2}}",
        "{name='resnet18'}",
    ],
    ids=["rotary", "antialias", "convolutions"],
)
def test_any_backbone_accepts_low_resolution(plan: Plan, backbone: str) -> None:
    mask = ["views.mask=none"] if "resnet" in backbone else []
    preset = load_preset("tiny-dino", [*LOW, f"backbone={backbone}", *mask])
    run = pretrain(replace(plan, preset=preset, stop=6), lambda p: None)
    assert (run.step, run.skipped) == (6, 0)


def test_new_heads_learn_while_the_backbone_is_frozen(plan: Plan) -> None:
    first = pretrain(plan, lambda p: None)
    waiting = [*SMALL, "heads.dino.prototypes=32", "backbone.learning.frozen_epochs=1"]
    later = replace(plan, preset=load_preset("tiny-dino", waiting), init=str(first.folder))
    for stop, moved in ((4, False), (5, True)):  # an epoch has four steps
        run = pretrain(replace(later, stop=stop, out=Path(f"runs/{stop}")), lambda p: None)
        assert run.fresh_heads == ["dino"]
        before, after = weights_of(first.folder), weights_of(run.folder)
        assert any(not torch.equal(value, before[key]) for key, value in after.items()) == moved
        heads = read_weights(run.folder / "state" / "0").heads["dino"], read_weights(run.folder).heads["dino"]
        assert any(not torch.equal(value, heads[0][key]) for key, value in heads[1].items())


def test_initial_weights_of_another_shape_are_an_error(plan: Plan, tmp_path: Path) -> None:
    preset = load_preset("tiny-dino")
    write_checkpoint(tmp_path / "other.safetensors", preset.network().weights(), preset, 0)
    with pytest.raises(DinoError, match=r"cls_token is .*; expected 1x1x16"):
        start_from(plan.preset.method(), str(tmp_path / "other.safetensors"))


def test_heads_of_another_shape_stay_random_and_are_named(plan: Plan, tmp_path: Path) -> None:
    other = load_preset("tiny-dino", [*SMALL, "heads.dino.prototypes=9"])
    write_checkpoint(tmp_path / "other.safetensors", other.network().weights(), other, 0)
    assert start_from(plan.preset.method(), str(tmp_path / "other.safetensors")) == ["dino"]
    same = plan.preset
    write_checkpoint(tmp_path / "same.safetensors", same.network().weights(), same, 0)
    assert start_from(plan.preset.method(), str(tmp_path / "same.safetensors")) == []


def test_three_channel_weights_are_adapted_with_a_note(plan: Plan, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "three.safetensors", plan.preset.network().weights(), plan.preset, 0)
    other, notes = load_preset("tiny-dino", [*SMALL, *of_channels(4)]), list[str]()
    method = other.method()
    start_from(method, str(tmp_path / "three.safetensors"), notes.append)
    assert [note for note in notes if "three channels" in note] == notes != []
    three = read_weights(tmp_path / "three.safetensors").backbone["patch_embed.proj.weight"]
    for network in (method.student, method.teacher):
        assert torch.equal(network.backbone.model.patch_embed.proj.weight[:, 3], three[:, 0] * 3 / 4)
    write_checkpoint(tmp_path / "four.safetensors", other.network().weights(), other, 0)
    with pytest.raises(DinoError, match=r"patch_embed\.proj\.weight is .*; expected"):
        start_from(plan.preset.method(), str(tmp_path / "four.safetensors"), notes.append)
    assert len(notes) == 1


def test_a_resumed_run_in_float16_continues_with_its_loss_scale(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinocli.train import plan as plans

    # float16 on a CPU is slow, so that no CPU falls back to it by itself.
    monkeypatch.setattr(plans, "training_precision", lambda device, wanted: "float16")
    runs = []
    for out, stops in (("straight", [6]), ("resumed", [3, 6])):
        for stop in stops:
            run = pretrain(replace(plan, out=Path(f"runs/{out}"), stop=stop), lambda p: None)
        state = next(saved_states(run.folder))[0]
        runs.append(load_file(state / "trainer.safetensors"))
    assert {"loss_scale/factor", "loss_scale/streak"} < runs[0].keys()
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    line = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["skipped"] == 6 or line["loss_scale"] == runs[0]["loss_scale/factor"]


def test_processes_that_train_in_different_precisions_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "gathered", lambda value: [value, "bfloat16"])
    with pytest.raises(DinoError, match="train in different precisions: bfloat16, float32") as error:
        pretrain(plan, lambda p: None)
    assert "training.precision=float16" in error.value.hint

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_images

from dinocli.apps.pack import pack
from dinocli.core.checksums import seal
from dinocli.core.drafts import drafting, sweep
from dinocli.core.errors import DinoError
from dinocli.core.runs import held
from dinocli.data.images import ImagesConfig
from dinocli.data.sources.open import image_folder, open_images, within
from dinocli.method.preset import load_preset
from dinocli.train.plan import Plan, Saving
from dinocli.train.pretrain import pretrain
from dinocli.train.state import newest, other_contents, sample_of, saved_states
from dinocli.weights.checkpoint import read_weights


@pytest.fixture(name="plan")
def twelve_steps(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    preset = load_preset("tiny-dino", [*SMALL, "backbone.drop_path=0.3"])
    return Plan(
        "tiny", preset, image_folder(images), 12, Path("runs/tiny-1"), torch.device("cpu"), 0, None,
        saving=Saving(seconds=None, steps=4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the contents of the plan's run without interruption. They do not depend on the folder of the images."""
    torch.set_num_threads(1)  # module fixtures run before the per-test fixture that sets this
    folder = tmp_path_factory.mktemp("undisturbed")
    for seed, label in enumerate("ab"):
        write_images(folder / "images" / label, 6, seed=seed)
    preset, source = load_preset("tiny-dino", [*SMALL, "backbone.drop_path=0.3"]), image_folder(folder / "images")
    saving = Saving(seconds=None, steps=4)
    run = Plan("tiny", preset, source, 12, folder / "run", torch.device("cpu"), 0, None, saving=saving)
    return content(pretrain(run, lambda p: None).folder)


def stopped(plan: Plan, step: int) -> Plan:
    """Return the plan, after a run that stopped at `step`."""
    pretrain(replace(plan, stop=step), lambda p: None)
    return plan


def content(run: Path) -> dict[str, bytes]:
    """Return the bytes of the checkpoint and the trainer file in a run's newest state."""
    last = next(folder for folder, _ in saved_states(run))
    return {name: (last / name).read_bytes() for name in ("ckpt.safetensors", "trainer.safetensors")}


def steps_of(run: Path) -> list[int]:
    return [int(folder.name) for folder, _ in saved_states(run)]


def test_a_resumed_run_ends_in_the_same_bits(plan: Plan) -> None:
    whole = pretrain(plan, lambda p: None)
    parts = replace(plan, out=Path("runs/parts"))
    said: list[str] = []
    for step in (1, 5, 6):
        pretrain(replace(parts, stop=step), lambda p: None, said.append)
    pretrain(replace(parts, workers=2), lambda p: None, said.append)
    assert said == [f"resuming from step {a} of {b} in runs/parts" for a, b in ((1, 5), (5, 6), (6, 12))]
    assert content(whole.folder) == content(parts.out)
    assert (parts.out / "ckpt.safetensors").read_bytes() == content(parts.out)["ckpt.safetensors"]
    lines = [json.loads(line) for line in (parts.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 6, 10, 12]
    last = json.loads((whole.folder / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "grad_norm", "dino/kl", "dino/prototypes", "feature_std", "lr", "epoch"):
        assert lines[-1][name] == last[name]


def test_the_newest_states_and_milestones_are_kept(plan: Plan) -> None:
    pretrain(plan, lambda p: None)
    assert steps_of(plan.out) == [12, 8]
    other = replace(plan, out=Path("other"), saving=Saving(seconds=None, steps=2, keep=3, milestones=5))
    pretrain(other, lambda p: None)
    assert steps_of(other.out) == [12, 10, 8, 5]
    assert read_weights(other.out / "state" / "5").backbone["cls_token"].shape == (1, 1, 16)
    timed = replace(plan, out=Path("timed"), saving=Saving(seconds=1e-9, keep=99))
    pretrain(timed, lambda p: None)
    assert steps_of(timed.out) == list(range(12, -1, -1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda folder: os.truncate(folder / "trainer.safetensors", 1000),
    "flipped": lambda folder: _flip(folder / "trainer.safetensors"),
    "weights flipped": lambda folder: _flip(folder / "ckpt.safetensors"),
    "no list": lambda folder: (folder / "state.json").unlink(),
    "a number changed": lambda folder: _edit(folder / "state.json", '"stop": 8', '"stop": 9'),
    "a torn list": lambda folder: os.truncate(folder / "state.json", 30),
    "a file gone": lambda folder: (folder / "ckpt.safetensors").unlink(),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_state_is_named_and_the_one_before_it_used(
    plan: Plan, undisturbed: dict[str, bytes], damage: Callable[[Path], object]
) -> None:
    stopped(plan, 8)
    # The checkpoint is a hard link to the state's file, so a change in place would change both.
    folder = plan.out / "state" / "8"
    shutil.copytree(folder, plan.out / "copy")
    shutil.rmtree(folder)
    (plan.out / "copy").rename(folder)
    damage(folder)
    said: list[str] = []
    pretrain(plan, lambda p: None, said.append)
    assert "state of step 8 is corrupt" in said[0]
    assert "runs/tiny-1/state/damaged-8" in said[0]
    assert said[1] == "resuming from step 4 of 12 in runs/tiny-1"
    assert (plan.out / "state" / "damaged-8").is_dir()
    assert content(plan.out) == undisturbed


def test_without_a_valid_state_it_is_an_error_and_nothing_else_changes(plan: Plan) -> None:
    stopped(plan, 4)
    before = (plan.out / "ckpt.safetensors").read_bytes()
    for folder, _ in saved_states(plan.out):
        (folder / "state.json").write_text("torn")
    said: list[str] = []
    with pytest.raises(DinoError, match="no valid state"):
        pretrain(plan, lambda p: None, said.append)
    assert [line.rpartition("; ")[2] for line in said] == ["using the one before it", "there is none before it"]
    assert (plan.out / "ckpt.safetensors").read_bytes() == before


def test_a_state_of_another_version_is_not_taken_for_corrupt(plan: Plan) -> None:
    stopped(plan, 4)
    for folder, _ in saved_states(plan.out):
        facts = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(facts | {"dinocli": "9.7", "novel": 1}))
    with pytest.raises(DinoError, match=r"state/4 was written by dinocli 9\.7") as error:
        pretrain(plan, lambda p: None)
    assert "pip install dinocli==9.7" in error.value.hint
    assert steps_of(plan.out) == [4, 0], "they lie where they lay"


def test_other_files_among_the_states_are_unchanged(plan: Plan) -> None:
    stopped(plan, 4)
    for name in ("\u00b2", "notes", "7.bak"):
        (plan.out / "state" / name).mkdir()
    assert pretrain(plan, lambda p: None).step == 12
    assert {path.name for path in (plan.out / "state").iterdir()} == {"\u00b2", "notes", "7.bak", "8", "12"}


def test_a_disk_that_fills_up_loses_no_saved_state(
    plan: Plan, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.core import atomic

    sync = os.fsync

    def full(file: int) -> None:
        if len(list((plan.out / "state").glob("[0-9]*"))) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            pretrain(plan, lambda p: None)
    assert steps_of(plan.out) == [4, 0]
    assert not list(plan.out.rglob(".*"))
    said: list[str] = []
    pretrain(plan, lambda p: None, said.append)
    assert said == ["resuming from step 4 of 12 in runs/tiny-1"]
    assert content(plan.out) == undisturbed


def test_a_second_ctrl_c_in_the_middle_of_a_step_saves_nothing_half_done(
    plan: Plan, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.engine import trainer

    step_unless_skipped, moved = trainer.step_unless_skipped, []

    def interrupted(*arguments: object) -> None:
        step_unless_skipped(*arguments)
        moved.append(1)
        if len(moved) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step_unless_skipped", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(plan, lambda p: None)
    assert steps_of(plan.out) == [4, 0], "the student had moved, and the teacher had not"
    pretrain(plan, lambda p: None)
    assert content(plan.out) == undisturbed


def test_drafts_of_a_killed_save_are_removed(plan: Plan) -> None:
    stopped(plan, 4)
    for place in (plan.out / "ckpt.safetensors", plan.out / "state" / "8"):
        child = os.fork()
        if not child:
            with drafting(place) as draft:
                draft.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    (plan.out / ".notes.123.part").write_text("the user's own")
    assert len(list(plan.out.rglob(".dinocli-*"))) == 4
    pretrain(plan, lambda p: None)
    assert [path.name for path in plan.out.rglob(".*")] == [".notes.123.part"]


def test_a_save_killed_before_the_checkpoint_was_linked_is_repaired(plan: Plan) -> None:
    """Also after the last save of a run, which no other save follows."""
    stopped(plan, 8)
    older = (plan.out / "ckpt.safetensors").read_bytes()
    run = pretrain(plan, lambda p: None)
    wanted = run.checkpoint.read_bytes()
    for left in (lambda: run.checkpoint.write_bytes(older), lambda: None):  # an older checkpoint, or none
        run.checkpoint.unlink()
        left()
        pretrain(plan, lambda p: None)
        assert run.checkpoint.read_bytes() == wanted == content(plan.out)["ckpt.safetensors"] != older


def test_states_without_contents_and_checksums_still_load(plan: Plan) -> None:
    stopped(plan, 4)
    for folder, _ in saved_states(plan.out):
        facts = json.loads((folder / "state.json").read_text())
        del facts["crc32"], facts["images"]["contents"]
        (folder / "state.json").write_text(json.dumps(facts))
    said: list[str] = []
    assert pretrain(plan, lambda p: None, said.append).step == 12
    assert said == ["resuming from step 4 of 12 in runs/tiny-1"]


def test_a_state_of_another_commit_is_not_taken_for_corrupt(plan: Plan) -> None:
    """The checksum distinguishes unknown keys from damage."""
    stopped(plan, 4)
    for folder, _ in saved_states(plan.out):
        facts = json.loads((folder / "state.json").read_text())
        del facts["crc32"]
        (folder / "state.json").write_text(json.dumps(seal(facts | {"novel": 1})))
    with pytest.raises(DinoError, match="cannot read it"):
        pretrain(plan, lambda p: None)
    assert steps_of(plan.out) == [4, 0], "they lie where they lay"


def test_a_sample_sees_any_change_of_a_file(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "0001.png").write_bytes(bytes(3_000_000))
    source = image_folder(tmp_path / "images")
    before = sample_of(source)
    assert len(before) == 3 * 8
    assert sample_of(image_folder(shutil.copytree(tmp_path / "images", tmp_path / "moved"))) == before
    for place in (0, 1_600_000, 2_999_999):
        with (tmp_path / "images" / "0001.png").open("rb+") as file:
            file.seek(place)
            file.write(b"x")
        after = sample_of(source)
        assert (after[:8], after[8:16] == before[8:16], after[16:]) == (before[:8], False, before[16:])
        before = after
    (tmp_path / "images" / "0002.png").unlink()
    assert sample_of(source)[16:] == "0" * 8
    pack(image_folder(write_images(tmp_path / "others", 2)), tmp_path / "pixels", pixels=True)
    assert sample_of(open_images(str(tmp_path / "pixels"))) == ""  # the fingerprint of pixels depends on all of them


def test_a_sample_sees_a_change_of_a_file_of_several_images(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 1)):
        np.savez(tmp_path / name, x=np.arange(first, first + 8, dtype=np.uint8).reshape(2, 2, 2))
    (tmp_path / "b.npz#row=1").write_bytes(b"a file of its own")
    source = within(open_images(str(tmp_path)), ImagesConfig(key="x"))
    assert list(source.names) == [f"{name}.npz#row={row}" for name in "ab" for row in (0, 1)]
    before = [sample_of(source)[i : i + 8] for i in range(0, 32, 8)]
    assert before[0] == before[1] and len(set(before)) == 3 and "0" * 8 not in before
    np.savez(tmp_path / "a", x=np.zeros((2, 2, 2), np.uint8))
    note = other_contents("".join(before), source)
    assert note == "note: 2 of 4 sampled images have changed since this run began"


def test_a_folder_belongs_to_one_run_at_a_time(plan: Plan) -> None:
    with held(plan.out), pytest.raises(DinoError, match="another run is using runs/tiny-1"):
        pretrain(plan, lambda p: None)
    assert not Path("runs").exists()


def train_in(folder: str, out: str, killed_before: int | None) -> None:
    """Train and save after every step, in a process that kills itself before that many changes of its files."""
    os.chdir(folder)
    torch.set_num_threads(1)
    preset = load_preset("tiny-dino", [*SMALL, "backbone.drop_path=0.3"])
    saving = Saving(seconds=None, steps=1, keep=2)
    plan = Plan("tiny", preset, image_folder(Path("images")), 6, Path(out), torch.device("cpu"), 0, None, saving=saving)
    changes = 0

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal changes
        if event in CHANGES or (event == "open" and isinstance(args[0], str | Path) and out in Path(args[0]).parts):
            changes += 1
            if changes == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    pretrain(plan, lambda p: None)


# What Python reports before it happens; with the files that are opened, a step and its save have about 80.
CHANGES = {"os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir"}


@pytest.mark.slow
@pytest.mark.job
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(images: Path, tmp_path: Path) -> None:
    """A process that saves after each step is killed repeatedly, each time before another change of its files."""
    images.rename(tmp_path / "images")
    context = multiprocessing.get_context("fork")  # torch is already imported in this process

    def ended(out: str, killed_before: int | None = None) -> int | None:
        process = context.Process(target=train_in, args=(str(tmp_path), out, killed_before))
        process.start()
        process.join(60)
        return process.exitcode

    moments, kills = random.Random(0), 0
    # A start adds two saves at most, so that it is killed three times before it can end.
    while ended("mine", moments.randint(1, 150)) == -signal.SIGKILL:
        kills += 1
        assert kills < 60, "it makes no progress"
    assert kills >= 3
    for out in ("mine", "whole"):
        assert ended(out) == 0
    assert content(tmp_path / "mine") == content(tmp_path / "whole")
    assert (tmp_path / "mine" / "ckpt.safetensors").read_bytes() == content(tmp_path / "whole")["ckpt.safetensors"]
    # A kill just after a draft's folder is made leaves it empty, without a mark; `sweep` removes it after an hour.
    drafts = [path for path in (tmp_path / "mine").rglob(".*") if not path.parent.name.startswith(".")]
    for draft in drafts:
        assert draft.is_dir()
        assert {path.name for path in draft.iterdir()} <= {".dinocli-mark.new"}
        for path in (*draft.iterdir(), draft):
            os.utime(path, (0, 0))
    sweep(tmp_path / "mine")
    sweep(tmp_path / "mine" / "state")
    assert not list((tmp_path / "mine").rglob(".*"))


def test_no_state_at_all_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path, pytest.fail) is None

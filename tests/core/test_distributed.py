from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, TOLERANCE, Original, assert_original, together, write_images

from dinocli.core.distributed import (
    any_of,
    check_launch,
    from_first,
    gathered,
    logsumexp_over_processes,
    mean_over_processes,
    rank,
    size,
    started,
    unused_tasks,
)
from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder, open_source
from dinocli.engine.schedules import Clock, LinearByEpoch
from dinocli.method.losses.dino import DinoLossConfig
from dinocli.method.losses.targets import CenteringConfig
from dinocli.method.preset import load_preset
from dinocli.models.network import Encoding
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain

TEMPERATURE = LinearByEpoch(kind="linear_by_epoch", start=0.04, end=0.07, epochs=5)


def two_calls() -> str:
    """A process of two: both calls of the stored run, compared with what the original held in this rank."""
    original = Original("dino_fixtures_ci")
    made = original.made["loss2rank"]
    targets = CenteringConfig(kind="centering", momentum=0.9, temperature=TEMPERATURE)
    loss_of = DinoLossConfig(weight=1.0, head="dino", student_temperature=0.1, targets=targets)
    for dtype in TOLERANCE:
        loss = loss_of.build(made["out_dim"]).to(dtype)
        for call, epoch in enumerate(made["epochs"]):
            name = f"loss2rank/rank{rank()}"
            student = original[f"{name}/student{call}"].to(dtype).unflatten(0, (made["ncrops"], -1))
            teacher = original[f"{name}/teacher{call}"].to(dtype).unflatten(0, (2, -1))
            seen, made_of = (Encoding(torch.empty(0), 2, {"dino": logits}) for logits in (teacher, student))
            told = loss(made_of, loss.targets_for(seen, Clock(1, 10, epoch)), None)
            assert_original(told, original[f"{name}/loss{call}"])
            loss.after_step()
            assert_original(loss.targets.center, original[f"{name}/center_after{call}"][0])
    return "compared"


def test_two_processes_share_one_center_which_is_the_originals() -> None:
    assert together(2, two_calls) == ["compared"] * 2


def test_alone_the_mean_is_what_one_has() -> None:
    values = torch.randn(3)
    assert mean_over_processes(values) is values


FAR = torch.tensor([[200.0, -3.0, 0.5, -torch.inf, 7.0], [-1e4, 300.0, 0.5, -torch.inf, -torch.inf]])


def added_up() -> torch.Tensor:
    return logsumexp_over_processes(FAR[rank()])


def test_a_logsumexp_over_processes_is_that_of_all_they_hold() -> None:
    for found in together(2, added_up):
        torch.testing.assert_close(found, FAR.logsumexp(0))
    assert added_up().equal(FAR[0]), "alone it is what one has"


def asked() -> tuple[Any, ...]:
    return rank(), size(), any_of(rank() == 1, False), gathered(f"of {rank()}"), from_first(Path(f"runs/{rank()}"))


def test_what_one_process_tells_the_others() -> None:
    assert together(3, asked) == [
        (r, 3, [True, False], ["of 0", "of 1", "of 2"], Path("runs/0")) for r in range(3)
    ]  # fmt: skip
    assert asked() == (0, 1, [False, False], ["of 0"], Path("runs/0"))


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher's variables, whatever starts these tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC", "LOCAL_")) or name in (
            "RANK",
            "WORLD_SIZE",
        ):
            monkeypatch.delenv(name)
    return monkeypatch


ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "message", "hint"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8"}, "RANK=3 WORLD_SIZE=8 without MASTER_ADDR and MASTER_PORT",
         "torchrun --nproc-per-node 8 -m dinocli pretrain ...; or alone: env -u RANK -u WORLD_SIZE dino pretrain ..."),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "RANK=0 WORLD_SIZE=2 without MASTER_PORT", "torchrun"),
        ({"WORLD_SIZE": "2"} | ADDRESS, "WORLD_SIZE=2 is incomplete", "torchrun --nproc-per-node 2"),
        ({"RANK": "1"}, "RANK=1 without MASTER_ADDR and MASTER_PORT", "torchrun --nproc-per-node N"),
        ({"RANK": "2", "WORLD_SIZE": "2"} | ADDRESS, "RANK=2 WORLD_SIZE=2 is out of range", "torchrun"),
        (STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes without MASTER_ADDR and MASTER_PORT",
         "export MASTER_ADDR=$(scontrol"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "srun started 4 processes", "srun --ntasks=1 dino pretrain ... --gpus 4"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a"}, "srun started 4 processes", "export"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes", "mpirun -x"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpirun started 2 processes", "torchrun --nproc-per-node 2"),
        ({"PMI_RANK": "1"}, "mpirun started several processes", "torchrun"),
    ],
)  # fmt: skip
def test_processes_that_cannot_meet_do_not_train_alone(
    plain_environment: pytest.MonkeyPatch, variables: dict[str, str], message: str, hint: str
) -> None:
    for name, value in variables.items():
        plain_environment.setenv(name, value)
    assert (rank(), size()) == (0, 1)
    with pytest.raises(DinoError) as error:
        check_launch("pretrain")
    assert error.value.message.startswith(message)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"} | ADDRESS,
        {"RANK": "colonel"},
        ADDRESS,
        STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # an interactive step of a larger job
        {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_NTASKS": "4"},  # the shell of salloc
        {"SLURM_NTASKS": "4"},
        {"SLURM_JOB_NODELIST": "a", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_of_a_cluster_is_alone(
    plain_environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        plain_environment.setenv(name, value)
    check_launch("pretrain")
    assert (started(), rank(), size()) == (None, 0, 1)
    assert unused_tasks() == (4 if variables.get("SLURM_NTASKS") == "4" and "SLURM_JOB_NODELIST" in variables
                              and "SLURM_STEP_ID" not in variables else 1)  # fmt: skip


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "4"},
        STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
        STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
    ],
)
def test_processes_with_an_address_join(plain_environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in (variables | ADDRESS).items():
        plain_environment.setenv(name, value)
    check_launch("pretrain")
    assert (rank(), size()) == (1, 4)


def test_processes_of_another_launcher_meet(plain_environment: pytest.MonkeyPatch) -> None:
    """Two tasks of srun, each bound to a GPU of its own, so that each sees it as device 0."""
    code = (
        "from dinocli.core import distributed as d; d.begin(); "
        "print(d.gathered((d.rank(), d.size(), d.local_rank(), d.local_size()))); d.end()"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def task(number: int) -> subprocess.Popen[str]:
        step = STEP | {"SLURM_PROCID": str(number), "SLURM_STEP_NUM_TASKS": "2", "CUDA_VISIBLE_DEVICES": str(number)}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | step | address, stdout=subprocess.PIPE, text=True
        )

    tasks = [task(number) for number in range(2)]
    told = [task.communicate(timeout=120)[0].strip() for task in tasks]
    assert told == ["[(0, 2, 0, 2), (1, 2, 0, 2)]"] * 2


def run_of(
    folder: Path, out: str, stop: int, overrides: list[str], changes: dict[str, Any], name: str = "tiny"
) -> list[str]:
    """A run in this process or its share of one in several; what it said."""
    os.chdir(folder)
    preset = load_preset(name, [*SMALL, "training.batch_size=12", *overrides])
    plan = Plan(name, preset, open_source("images"), stop, Path(out), torch.device("cpu"), 0, None)
    said: list[str] = []
    pretrain(replace(plan, **changes), lambda p: None, said.append)
    return said


PLAIN = ["heads.dino.batch_norm=false", "optimizer.lr.start=0.05"]


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = max((run / "state").iterdir(), key=lambda path: int(path.name))
    return load_file(newest / "trainer.safetensors")


# A bias before a BatchNorm, or of attention's keys, has no gradient but for rounding, which AdamW makes as large as
# any other: such a bias changes nothing of what a network says.
KEYS = ("qkv.bias",)
IDLE = (*KEYS, "mlp.0.bias", "mlp.3.bias", "running_mean", "norm.bias")


def assert_same_run(one: Path, other: Path, idle: tuple[str, ...] = KEYS) -> None:
    for a, b in zip(logged(one), logged(other), strict=True):
        for name in set(a) - {"images_per_second", "data_wait", "peak_memory", "grad_norm"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (a["step"], name)
        assert b.get("grad_norm", 0) == pytest.approx(a.get("grad_norm", 0), rel=1e-3)
    assert_same_weights(one, other, idle)


def assert_same_weights(one: Path, other: Path, idle: tuple[str, ...] = KEYS) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.startswith("method/") and not any(word in name for word in idle):
            torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("count", "overrides", "idle", "changes"),
    [
        pytest.param(2, PLAIN, KEYS, {"accumulate": 2}, marks=pytest.mark.slow),
        (2, [], IDLE, {"workers": 1}),
        (2, PLAIN, KEYS, {"parallel": "fsdp", "report": True}),
        pytest.param(
            2, [*PLAIN, "views.low_resolution={epochs=2, global_size=8}"], KEYS, {"workers": 1}, marks=pytest.mark.slow
        ),
        pytest.param(4, [], IDLE, {}, marks=pytest.mark.slow),
    ],
    ids=["parts", "batch norm", "shards", "low resolution", "four"],
)
def test_several_processes_do_the_run_of_one(
    tmp_path: Path,
    count: int,
    overrides: list[str],
    idle: tuple[str, ...],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_images(tmp_path / "images", 19)
    monkeypatch.chdir(tmp_path)  # and back when the test is over
    run_of(tmp_path, "alone", 20, overrides, changes | {"parallel": "ddp"})
    together(count, run_of, tmp_path, "several", 20, overrides, changes)
    assert len(logged(tmp_path / "alone")) == (6 if "report" in changes else 3)
    assert_same_run(tmp_path / "alone", tmp_path / "several", idle)
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == sorted(
        p.name for p in (tmp_path / "several").iterdir()
    )


def test_two_processes_do_the_run_of_one_with_hidden_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 32 images each they hide what one with 64 does; KoLeo's neighbours are those of a process, or of a part."""
    write_images(tmp_path / "images", 70, size=16)
    monkeypatch.chdir(tmp_path)
    ibot = "heads.ibot={prototypes=16, hidden=16, bottleneck=8, layers=2, norm_last_layer=true}"
    overrides = [*PLAIN, "training.batch_size=64", ibot]
    run_of(tmp_path, "alone", 4, overrides, {"accumulate": 2}, "tiny-dinov2")
    together(2, run_of, tmp_path, "several", 4, overrides, {}, "tiny-dinov2")
    assert {"dino", "ibot", "koleo", "ibot/information"} <= set(logged(tmp_path / "alone")[-1])
    assert_same_run(tmp_path / "alone", tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_state_of_two_processes_goes_on_in_one_and_of_one_in_two(
    tmp_path: Path, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", 19)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    overrides = PLAIN
    how = {"parallel": parallel}
    run_of(tmp_path, "whole", 12, overrides, {})
    together(2, run_of, tmp_path, "mixed", 5, overrides, how)
    assert run_of(tmp_path, "mixed", 9, overrides, {}) == ["resuming from step 5 of 9 in mixed"]
    told = together(2, run_of, tmp_path, "mixed", 12, overrides, how)
    assert told[0] == ["resuming from step 9 of 12 in mixed"]
    assert_same_weights(tmp_path / "whole", tmp_path / "mixed")
    assert (tmp_path / "mixed" / "bad_images.txt").read_text() == (tmp_path / "whole" / "bad_images.txt").read_text()


@pytest.mark.slow
def test_shards_go_on_with_as_many_readers_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinocli.apps.pack import pack

    source = image_folder(write_images(tmp_path / "plain", 24))
    pack(source, tmp_path / "images", side=None, per_shard=4, name="x", report=lambda done, note="": None)
    monkeypatch.chdir(tmp_path)
    overrides = PLAIN
    run_of(tmp_path, "whole", 8, overrides, {"workers": 2})
    together(2, run_of, tmp_path, "mixed", 4, overrides, {"workers": 1})
    said = run_of(tmp_path, "mixed", 8, overrides, {"workers": 0})
    assert "using --workers 2 as before" in said[0]
    assert_same_weights(tmp_path / "whole", tmp_path / "mixed")
    told = together(3, run_of, tmp_path, "mixed", 9, overrides, {})
    assert told[0][0].startswith("note: 3 processes read the shards instead of 2: the image order changes")
    assert logged(tmp_path / "mixed")[-1]["step"] == 9


def stopped(folder: Path) -> int:
    """A run in whose second process alone a signal comes."""
    os.chdir(folder)
    preset = load_preset("tiny", [*SMALL, "training.batch_size=12"])
    plan = Plan("tiny", preset, open_source("images"), 30, Path("run"), torch.device("cpu"), 0, None)
    return pretrain(plan, lambda p: os.kill(os.getpid(), signal.SIGTERM) if rank() == 1 and p.step == 10 else None).step


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 19)
    assert together(2, stopped, tmp_path) == [10, 10]
    assert int(tensors_of(tmp_path / "run")["skipped"][0]) == 0


def broken(folder: Path) -> str:
    """A run whose steps are not finite."""
    os.chdir(folder)
    preset = load_preset("tiny", [*SMALL, "training.batch_size=12"])
    hot = preset.optimizer.model_copy(update={"lr": preset.optimizer.lr.scaled(1e12), "clip": None})
    preset = preset.model_copy(update={"optimizer": hot})
    plan = Plan("tiny", preset, open_source("images"), 60, Path("run"), torch.device("cpu"), 0, None)
    with pytest.raises(DinoError, match="not finite in") as error:
        pretrain(plan, lambda p: None)
    return error.value.message


def test_images_of_all_processes_are_named_where_no_step_is_finite(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 19)
    first, second = together(2, broken, tmp_path)
    assert first == second
    named = [line.split("\t") for line in (tmp_path / "run" / "not_finite.txt").read_text().splitlines()]
    assert len(named) == 30 * 12
    assert all(named.count([step, name]) <= 1 for step, name in named), "an image is in a step once"


def test_a_batch_that_cannot_be_shared_is_said(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 19)
    with pytest.raises(AssertionError, match="a batch of 12 images cannot be split evenly over 5 processes"):
        together(5, run_of, tmp_path, "run", 1, [], {})
    assert not (tmp_path / "run").exists()


# A run of real processes, of which the second one comes to grief before its sixth step, once.
GRIEF = """
import os, signal, sys
from dinocli.cli import main
from dinocli.engine.trainer import Trainer
from dinocli.core.errors import DinoError

step = Trainer.step

def grief(self, *args, **how):
    if self.clock.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        CAUSE
    return step(self, *args, **how)

Trainer.step = grief
main()
"""
CAUSES = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "error: another process of this run has ended"),
    "mistake": ("raise DinoError('the second process failed', 'mend it')", "error: the second process failed"),
    "defect": ("raise ValueError('a defect')", "ValueError: a defect"),
}


def torchrun(folder: Path, cause: str, *options: str) -> subprocess.CompletedProcess[str]:
    write_images(folder / "images", 19)
    (folder / "grief.py").write_text(GRIEF.replace("CAUSE", cause))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    settings = [word for override in SMALL for word in ("--set", override)]
    command = ["grief.py", "pretrain", "images", "--preset", "tiny", *settings, "--device=cpu", "--workers=1"]
    command += ["--steps=8", "--save-every=2", "--no-report", "--out=run"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, *command], cwd=folder, capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cause", list(CAUSES))
def test_one_process_that_dies_ends_the_others_with_one_error(tmp_path: Path, cause: str) -> None:
    done = torchrun(tmp_path, CAUSES[cause][0])
    assert done.returncode == 1
    assert done.stderr.count("error: ") + done.stderr.count("ValueError: a defect") == 1, done.stderr
    assert CAUSES[cause][1] in done.stderr
    ours = done.stderr.split("torch/distributed/run.py")[0]  # torchrun's own words come last
    assert ours.count("Traceback") <= (2 if cause == "defect" else 1), done.stderr
    failed = [line for line in done.stderr.splitlines() if line.strip().startswith("time ")]
    assert len(failed) == 2, "both came to their end by themselves"
    assert sorted(int(path.name) for path in (tmp_path / "run" / "state").iterdir())[-1] in (4, 5)


@pytest.mark.slow
def test_torchrun_that_starts_again_goes_on_from_the_last_state(tmp_path: Path) -> None:
    done = torchrun(tmp_path, CAUSES["killed"][0], "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert done.stdout.strip() == "run/ckpt.safetensors", "one process speaks"
    (tmp_path / "other").mkdir()
    undisturbed = torchrun(tmp_path / "other", "pass")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_same_weights(tmp_path / "run", tmp_path / "other" / "run", ())


@pytest.mark.slow
def test_a_command_starts_itself_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--gpus 2` does, on a CPU."""
    write_images(tmp_path / "images", 19)
    settings = [word for override in SMALL for word in ("--set", override)]
    words = [
        "pretrain",
        "images",
        "--preset",
        "tiny",
        *settings,
        "--device=cpu",
        "--steps=3",
        "--no-report",
        "--out=run",
    ]
    code = (
        f"import sys; from dinocli.core import distributed; sys.argv[1:] = {words!r}; sys.exit(distributed.launch(2))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, **how)
    assert (done.returncode, done.stdout) == (0, "run/ckpt.safetensors\n"), done.stderr
    assert logged(tmp_path / "run")[-1]["step"] == 3
    (tmp_path / "images").rename(tmp_path / "gone")
    failed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, **how)
    assert failed.returncode == 1
    assert failed.stderr.count("error: ") == 1, failed.stderr
    assert len(failed.stderr.splitlines()) == 2, failed.stderr

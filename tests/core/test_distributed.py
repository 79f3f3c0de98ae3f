from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, TOLERANCE, Original, assert_original, together, write_images

from dinocli.cli import main
from dinocli.core import distributed
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


def compare_two_calls() -> str:
    """Run both calls of the stored two-process run, and compare loss and center with the original's on this rank."""
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
            of_teacher, of_student = (Encoding(torch.empty(0), 2, {"dino": logits}) for logits in (teacher, student))
            value = loss(of_student, loss.targets_for(of_teacher, Clock(1, 10, epoch)), None)
            assert_original(value, original[f"{name}/loss{call}"])
            loss.after_step()
            assert_original(loss.targets.center, original[f"{name}/center_after{call}"][0])
    return "compared"


def test_loss_and_center_of_two_processes_equal_the_originals() -> None:
    assert together(2, compare_two_calls) == ["compared"] * 2


def test_the_mean_over_one_process_is_the_value_itself() -> None:
    values = torch.randn(3)
    assert mean_over_processes(values) is values


# One row per process, with values whose exponentials overflow or are 0.
EXTREME = torch.tensor([[200.0, -3.0, 0.5, -torch.inf, 7.0], [-1e4, 300.0, 0.5, -torch.inf, -torch.inf]])


def compute_logsumexp() -> torch.Tensor:
    return logsumexp_over_processes(EXTREME[rank()])


def test_logsumexp_over_processes_equals_that_over_all_rows() -> None:
    for result in together(2, compute_logsumexp):
        torch.testing.assert_close(result, EXTREME.logsumexp(0))
    assert compute_logsumexp().equal(EXTREME[0]), "a single process gets its own values"


def call_collectives() -> tuple[Any, ...]:
    return rank(), size(), any_of(rank() == 1, False), gathered(f"of {rank()}"), from_first(Path(f"runs/{rank()}"))


def test_collectives_return_the_same_values_in_every_process() -> None:
    assert together(3, call_collectives) == [
        (r, 3, [True, False], ["of 0", "of 1", "of 2"], Path("runs/0")) for r in range(3)
    ]  # fmt: skip
    assert call_collectives() == (0, 1, [False, False], ["of 0"], Path("runs/0"))


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables of all launchers, in case one of them has started these tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "MASTER_", "TORCHELASTIC", "LOCAL_", "SUBMITIT_")) or name in (
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
         "dino slurm pretrain ... prints a job script with torchrun; or export MASTER_ADDR=$(scontrol"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "srun started 4 processes", "srun --ntasks=1 dino pretrain ... --gpus 4"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a"}, "srun started 4 processes", "export"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes", "mpirun -x"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpirun started 2 processes", "torchrun --nproc-per-node 2"),
        ({"PMI_RANK": "1"}, "mpirun started several processes", "torchrun"),
        ({"SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NTASKS": "2"}, "submitit started 2 processes", "torchrun"),
    ],
)  # fmt: skip
def test_processes_that_cannot_connect_are_refused(
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
def test_a_single_process_on_a_cluster_runs_alone(
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
def test_processes_with_an_address_get_rank_and_size(
    plain_environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in (variables | ADDRESS).items():
        plain_environment.setenv(name, value)
    check_launch("pretrain")
    assert (rank(), size()) == (1, 4)


SPECIFIED: dict[str, Callable[[int], dict[str, object]]] = {
    "RANK": lambda rank: {"RANK": rank, "WORLD_SIZE": 2},
    # Each task is bound to another GPU, which it sees as device 0.
    "srun": lambda rank: STEP | {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "CUDA_VISIBLE_DEVICES": rank},
    "mpirun": lambda rank: {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2},
    "submitit": lambda rank: {"SUBMITIT_LOCAL_GLOBALID": rank, "SUBMITIT_LOCAL_NTASKS": 2},
}


def in_two_processes(launcher: str, function: Callable[..., object], *args: object) -> list[Any]:
    """Run a function in two real processes that a launcher has started; return its results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    context = multiprocessing.get_context("fork")  # this process has paid for importing torch
    seen = context.SimpleQueue()

    def task(number: int) -> None:
        os.environ |= {name: str(value) for name, value in (SPECIFIED[launcher](number) | address).items()}
        torch.set_num_threads(1)
        seen.put((number, function(*args)))

    tasks = [context.Process(target=task, args=(number,)) for number in range(2)]
    for process in tasks:
        process.start()
    for process in tasks:
        process.join(300)
        assert process.exitcode == 0
    return [value for _, value in sorted(seen.get() for _ in tasks)]


def place_in_run() -> list[tuple[int, ...]]:
    distributed.begin()
    places = gathered((rank(), size(), distributed.local_rank(), distributed.local_size()))
    distributed.end()
    return places


@pytest.mark.parametrize("launcher", list(SPECIFIED))
def test_processes_of_another_launcher_connect(plain_environment: pytest.MonkeyPatch, launcher: str) -> None:
    local = [0, 0] if launcher == "srun" else [0, 1]
    assert in_two_processes(launcher, place_in_run) == [[(0, 2, local[0], 2), (1, 2, local[1], 2)]] * 2


def command(*words: str) -> int | str | None:
    sys.argv[1:] = words
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_processes_of_another_launcher_train_one_run(tmp_path: Path, plain_environment: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 19)
    plain_environment.chdir(tmp_path)
    settings = [word for override in [*SMALL, "training.batch_size=12"] for word in ("--set", override)]
    options = ["--device=cpu", "--workers=0", "--steps=2", "--no-report"]
    codes = in_two_processes("RANK", command, "pretrain", "images", "--preset=tiny", *settings, *options)
    assert codes == [None, None]
    assert [path.name for path in Path("runs").iterdir()] == ["tiny-1"]
    assert (Path("runs/tiny-1/state/2")).is_dir()


def run_of(
    folder: Path, out: str, stop: int, overrides: list[str], changes: dict[str, Any], name: str = "tiny-dino"
) -> list[str]:
    """Train a run in this process, or this process's share of it, and return the printed lines."""
    os.chdir(folder)
    preset = load_preset(name, [*SMALL, "training.batch_size=12", *overrides])
    plan = Plan(name, preset, open_source("images"), stop, Path(out), torch.device("cpu"), 0, None)
    lines: list[str] = []
    pretrain(replace(plan, **changes), lambda p: None, lines.append)
    return lines


PLAIN = ["heads.dino.batch_norm=false", "optimizer.lr.start=0.05"]


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = max((run / "state").iterdir(), key=lambda path: int(path.name))
    return load_file(newest / "trainer.safetensors")


# The gradient of a bias before a BatchNorm, or of attention's keys, is 0 except for rounding. AdamW scales it up like
# any other gradient, but the bias has no effect on the network's output.
KEYS = ("qkv.bias",)
IDLE = (*KEYS, "mlp.0.bias", "mlp.3.bias", "running_mean", "norm.bias")


def assert_same_run(one: Path, other: Path, idle: tuple[str, ...] = KEYS) -> None:
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
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
        (2, ["backbone.stem=conv"], IDLE, {}),
        (2, PLAIN, KEYS, {"parallel": "fsdp", "report": True}),
        pytest.param(
            2, [*PLAIN, "views.low_resolution={epochs=2, global_size=8}"], KEYS, {"workers": 1}, marks=pytest.mark.slow
        ),
        pytest.param(4, [], IDLE, {}, marks=pytest.mark.slow),
    ],
    ids=["parts", "batch norm", "convolutional stem", "shards", "low resolution", "four"],
)
def test_several_processes_train_the_same_as_one(
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
    assert len(read_metrics(tmp_path / "alone")) == (6 if "report" in changes else 3)
    assert_same_run(tmp_path / "alone", tmp_path / "several", idle)
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == sorted(
        p.name for p in (tmp_path / "several").iterdir()
    )


def test_two_processes_train_the_same_as_one_with_masked_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are the same for 2 x 32 as for 64 images; KoLeo's neighbours are those of a process, or of a part."""
    write_images(tmp_path / "images", 70, size=16)
    monkeypatch.chdir(tmp_path)
    ibot = "heads.ibot={prototypes=16, hidden=16, bottleneck=8, layers=2, norm_last_layer=true}"
    overrides = [*PLAIN, "training.batch_size=64", ibot]
    run_of(tmp_path, "alone", 4, overrides, {"accumulate": 2}, "tiny-dinov2")
    together(2, run_of, tmp_path, "several", 4, overrides, {}, "tiny-dinov2")
    assert {"dino", "ibot", "koleo", "ibot/information"} <= set(read_metrics(tmp_path / "alone")[-1])
    assert_same_run(tmp_path / "alone", tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_runs_of_two_processes_resume_in_one_and_the_reverse(
    tmp_path: Path, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", 19)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    overrides = PLAIN
    changes = {"parallel": parallel}
    run_of(tmp_path, "whole", 12, overrides, {})
    together(2, run_of, tmp_path, "mixed", 5, overrides, changes)
    assert run_of(tmp_path, "mixed", 9, overrides, {}) == ["resuming from step 5 of 9 in mixed"]
    lines = together(2, run_of, tmp_path, "mixed", 12, overrides, changes)
    assert lines[0] == ["resuming from step 9 of 12 in mixed"]
    assert_same_weights(tmp_path / "whole", tmp_path / "mixed")
    assert (tmp_path / "mixed" / "bad_images.txt").read_text() == (tmp_path / "whole" / "bad_images.txt").read_text()


@pytest.mark.slow
def test_runs_on_shards_resume_with_the_same_total_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.apps.pack import pack

    source = image_folder(write_images(tmp_path / "plain", 24))
    pack(source, tmp_path / "images", side=None, per_shard=4, name="x", report=lambda done, note="": None)
    monkeypatch.chdir(tmp_path)
    overrides = PLAIN
    run_of(tmp_path, "whole", 8, overrides, {"workers": 2})
    together(2, run_of, tmp_path, "mixed", 4, overrides, {"workers": 1})
    lines = run_of(tmp_path, "mixed", 8, overrides, {"workers": 0})
    assert "using --workers 2 as before" in lines[0]
    assert_same_weights(tmp_path / "whole", tmp_path / "mixed")
    by_process = together(3, run_of, tmp_path, "mixed", 9, overrides, {})
    assert by_process[0][0].startswith("note: 3 processes read the shards instead of 2: the image order changes")
    assert read_metrics(tmp_path / "mixed")[-1]["step"] == 9


def run_until_signal(folder: Path) -> int:
    """Train a run of which only the second process gets a signal, and return the last step."""
    os.chdir(folder)
    preset = load_preset("tiny-dino", [*SMALL, "training.batch_size=12"])
    plan = Plan("tiny", preset, open_source("images"), 30, Path("run"), torch.device("cpu"), 0, None)
    return pretrain(plan, lambda p: os.kill(os.getpid(), signal.SIGTERM) if rank() == 1 and p.step == 10 else None).step


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 19)
    assert together(2, run_until_signal, tmp_path) == [10, 10]
    assert int(tensors_of(tmp_path / "run")["skipped"][0]) == 0


def run_without_finite_steps(folder: Path) -> str:
    """Train a run whose steps are not finite, and return its error."""
    os.chdir(folder)
    preset = load_preset("tiny-dino", [*SMALL, "training.batch_size=12"])
    hot = preset.optimizer.model_copy(update={"lr": preset.optimizer.lr.scaled(1e12), "clip": None})
    preset = preset.model_copy(update={"optimizer": hot})
    plan = Plan("tiny", preset, open_source("images"), 60, Path("run"), torch.device("cpu"), 0, None)
    with pytest.raises(DinoError, match="not finite in") as error:
        pretrain(plan, lambda p: None)
    return error.value.message


def test_a_run_with_no_finite_step_lists_the_images_of_all_processes(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 19)
    first, second = together(2, run_without_finite_steps, tmp_path)
    assert first == second
    named = [line.split("\t") for line in (tmp_path / "run" / "not_finite.txt").read_text().splitlines()]
    assert len(named) == 30 * 12
    assert all(named.count([step, name]) <= 1 for step, name in named), "a step lists each image once"


def test_a_batch_that_cannot_be_split_evenly_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 19)
    with pytest.raises(AssertionError, match="a batch of 12 images cannot be split evenly over 5 processes"):
        together(5, run_of, tmp_path, "run", 1, [], {})
    assert not (tmp_path / "run").exists()


# A run of real processes whose second process fails once, before its sixth step.
FAILING_RUN = """
import os, signal, sys
from dinocli.cli import main
from dinocli.engine.trainer import Trainer
from dinocli.core.errors import DinoError

step = Trainer.step

def fail(self, *args, **options):
    if self.clock.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        CAUSE
    return step(self, *args, **options)

Trainer.step = fail
main()
"""
CAUSES = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "error: another process of this run has ended"),
    "user error": ("raise DinoError('the second process failed', 'fix it')", "error: the second process failed"),
    "bug": ("raise ValueError('a bug')", "ValueError: a bug"),
}


def torchrun(folder: Path, cause: str, *options: str) -> subprocess.CompletedProcess[str]:
    write_images(folder / "images", 19)
    (folder / "failing_run.py").write_text(FAILING_RUN.replace("CAUSE", cause))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    settings = [word for override in SMALL for word in ("--set", override)]
    command = ["failing_run.py", "pretrain", "images", "--preset", "tiny", *settings, "--device=cpu", "--workers=1"]
    command += ["--steps=8", "--save-every=2", "--no-report", "--out=run"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, *command], cwd=folder, capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cause", list(CAUSES))
def test_a_failed_process_ends_the_others_with_a_single_error(tmp_path: Path, cause: str) -> None:
    done = torchrun(tmp_path, CAUSES[cause][0])
    assert done.returncode == 1
    assert done.stderr.count("error: ") + done.stderr.count("ValueError: a bug") == 1, done.stderr
    assert CAUSES[cause][1] in done.stderr
    ours = done.stderr.split("torch/distributed/run.py")[0]  # torchrun's own report comes last
    assert ours.count("Traceback") <= (2 if cause == "bug" else 1), done.stderr
    failed = [line for line in done.stderr.splitlines() if line.strip().startswith("time ")]
    assert len(failed) == 2, "both processes ended by themselves"
    assert sorted(int(path.name) for path in (tmp_path / "run" / "state").iterdir())[-1] in (4, 5)


@pytest.mark.slow
def test_a_restart_by_torchrun_resumes_from_the_last_state(tmp_path: Path) -> None:
    done = torchrun(tmp_path, CAUSES["killed"][0], "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert done.stdout.strip() == "run/ckpt.safetensors", "only one process prints"
    (tmp_path / "other").mkdir()
    undisturbed = torchrun(tmp_path / "other", "pass")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert_same_weights(tmp_path / "run", tmp_path / "other" / "run", ())


@pytest.mark.slow
def test_launch_runs_the_command_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch on a CPU as `--gpus 2` does."""
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
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, **options)
    assert (done.returncode, done.stdout) == (0, "run/ckpt.safetensors\n"), done.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3
    (tmp_path / "images").rename(tmp_path / "gone")
    failed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, **options)
    assert failed.returncode == 1
    assert failed.stderr.count("error: ") == 1, failed.stderr
    assert len(failed.stderr.splitlines()) == 2, failed.stderr

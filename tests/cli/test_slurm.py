"""Job scripts for SLURM: their directives, their syntax, their commands, and their answer to the time limit."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from dinocli.cli import app, console, main

COMMANDS = get_command(app).commands


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that returns the script of `dino slurm`, or its error if the exit code is not 0."""
    monkeypatch.chdir(tmp_path)

    def printed(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["dino", "slurm", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert (stopped.value.code or 0) == code, err
        return err if code else out

    return printed


def directives(text: str) -> dict[str, str]:
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if line.startswith("#SBATCH"))
    return {key: value for key, _, value in pairs}


def command_in(text: str, after: list[str]) -> list[str]:
    """Return the command of a script after some words, as the shell splits it in job 7."""
    joined = text.replace("\\\n", " ").replace("$SLURM_JOB_ID", "7")
    words = next(shlex.split(line, comments=True) for line in joined.splitlines() if line.startswith("srun"))
    assert words[-1] == "&"
    start = next(i for i in range(len(words)) if words[i : i + len(after)] == after)
    return words[start + len(after) : -1]


def check_syntax(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_of_several_machines(script) -> None:
    options = "--nodes 2 --gpus 4 --cpus 32 --time 2-00:00:00 --partition gpu --account vision".split()
    text = script(*options, "pretrain", "my images", "--preset", "tiny", "--epochs", "3")
    check_syntax(text)
    assert directives(text) == {
        "job-name": "dino-pretrain", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "4", "cpus-per-task": "32",
        "time": "2-00:00:00", "partition": "gpu", "account": "vision", "signal": "B:USR1@120", "open-mode": "append",
        "output": "dino-pretrain-%j.log", "requeue": "",
    }  # fmt: skip
    assert text.startswith("#!/bin/bash\n#SBATCH"), "SLURM reads directives only before the first command"
    torchrun = command_in(text, ["torchrun"])
    assert torchrun[:5] == [
        "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-id=7", "--rdzv-endpoint=$head:$((20000 + SLURM_JOB_ID % 20000))"
    ]  # fmt: skip
    words = command_in(text, ["-m", "dinocli"])
    assert words == ["pretrain", "my images", "--preset", "tiny", "--epochs", "3", "--out", "runs/pretrain-7"]
    parsed = COMMANDS["pretrain"].make_context("pretrain", words[1:]).params
    assert (parsed["images"], parsed["epochs"], parsed["out"]) == (["my images"], 3, Path("runs/pretrain-7"))


@pytest.mark.parametrize("words", ["pretrain x --out=here", "extract timm:resnet18 x", "adapt x --from y", "knn"])
def test_a_script_of_one_machine(script, words: str) -> None:
    name, *rest = words.split()
    text = script("--gpus", "0", *words.split())
    check_syntax(text)
    assert {"gpus-per-node", "partition", "account", "cpus-per-task"}.isdisjoint(directives(text))
    shared = name in ("pretrain", "extract")
    typed = command_in(text, ["-m", "dinocli"] if shared else ["dino"])
    assert typed == [name, *rest, *(["--out", "runs/adapt-7"] if name == "adapt" else [])]
    assert ("torchrun --nnodes=1 --nproc-per-node=1 --standalone" in text) == shared
    COMMANDS[name].make_context(name, typed[1:])


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        ("pretran x", 2, "dino slurm has no command pretran", "dino slurm pretrain"),
        ("slurm knn", 2, "dino slurm has no command slurm", "dino slurm"),
        ("pretrain x --epoch 3", 2, "No such option: --epoch", "--epochs 3"),
        ("pretrain x --gpus 4", 1, "--gpus comes before pretrain", "dino slurm --gpus N pretrain"),
        ("--gpus 4 knn", 1, "dino knn runs in one process; --nodes 1 --gpus 4 is a job of 4", "--nodes 1 --gpus 1 knn"),
        ("--time soon knn", 1, "--time 'soon' is invalid; expected a time", "--time 8:00:00"),
        ("--partition a;b knn", 1, "--partition 'a;b' is invalid; expected a name", "--partition NAME"),
        ("--node 2 knn", 2, "dino slurm has no option --node", "--nodes"),
        ("--gpus 4", 2, "COMMAND", "dino slurm --help"),
    ],
)
def test_mistakes_are_reported_before_a_job_starts(script, words: str, code: int, message: str, hint: str) -> None:
    error, said = script(*words.split(), code=code).strip().splitlines()[-2:]
    assert message in error
    assert hint in said


def test_missing_inputs_are_noted(monkeypatch: pytest.MonkeyPatch, capsys, script, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    shown = []
    monkeypatch.setattr(console, "say", shown.append)
    for line, missing in (
        ("pretrain imges:0.7 here:0.3 --init w.pth", ["imges", "--init w.pth"]),
        ("extract timm:resnet18 s3://bucket/x", []),
        ("pretrain x-{000..009}.tar --teacher timm:resnet18 --monitor here --out new", []),
        ("--gpus 0 eval retrieval gnd.json --images here", ["gnd.json"]),
        ("--gpus 0 pack here new", []),
        ("--gpus 0 knn --features f", ["--features f"]),
    ):
        shown.clear()
        check_syntax(script(*line.split()))
        noted = [f"note: {place} does not exist here; the job needs it on its machines" for place in missing]
        assert shown == [*noted, "next: sbatch FILE, with the script in FILE"]
    assert "no option --imags" in script("--gpus", "0", "eval", "retrieval", "g", "--imags", "x", code=2)


# Stand-ins for SLURM's commands. This torchrun runs until it gets USR1, as a training that then saves and ends.
TOOLS = {
    "srun": 'exec "$@"',
    "torchrun": "echo $$ > training.new; trap 'echo saved >> said; exit 0' USR1; mv training.new training\n"
    "while sleep 0.05; do :; done",
    "scancel": 'echo "scancel $*" >> said; kill -USR1 "$(cat training)"',
    "scontrol": 'echo "scontrol $*" >> said',
}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("signalled", [True, False])
def test_the_job_is_queued_again_only_after_a_signal(script, tmp_path: Path, signalled: bool) -> None:
    for name, body in TOOLS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + (body if signalled or name != "torchrun" else "exit 3") + "\n")
        (tmp_path / name).chmod(0o755)
    text = script("extract", "timm:resnet18", "x").replace("export PATH", "# export PATH")
    (tmp_path / "job").write_text(text)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "job"], cwd=tmp_path, env=env)
    if not signalled:
        assert job.wait(30) == 3, "the exit code of the command"
        assert not (tmp_path / "said").exists()
        return
    for _ in range(300):
        if (tmp_path / "training").exists():
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    job.wait(30)
    assert (tmp_path / "said").read_text() == "scancel --signal=USR1 7\nsaved\nscontrol requeue 7\n"

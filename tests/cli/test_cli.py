"""The command line end to end: streams, exit codes, errors."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image
from typer.main import get_command

from dinocli.apps.demo.drawings import draw
from dinocli.cli import app, main
from dinocli.method import shipped

SMALL = [
    "--set", "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}",
    "--set", "views.global_1.size=16", "--set", "views.global_2.size=16", "--set", "views.local.size=8",
    "--set", "heads.dino.prototypes=16", "--set", "heads.dino.hidden=16", "--batch-size", "4", "--workers", "0", "--device", "cpu",
    "--set", "backbone.stem=patch",
]  # fmt: skip


@dataclass
class Done:
    stdout: str
    stderr: str


Dino = Callable[..., Done]


def check_next(said: str) -> None:
    """Check that the command in a `next:` line exists, and has its options."""
    for line in said.splitlines():
        words = shlex.split(line.removeprefix("next: dino ")) if line.startswith("next: dino ") else []
        command = get_command(app)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if words:
            assert not hasattr(command, "commands"), line
            command.make_parser(command.context_class(command)).parse_args(words)


@pytest.fixture
def dino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dino:
    """Return a function that runs a command in this process, which imports torch only once, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str, code: int | None = 0) -> Done:
        monkeypatch.setattr(sys, "argv", ["dino", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        done = Done(*capsys.readouterr())
        wanted = stopped.value.code in (1, 2) if code is None else (stopped.value.code or 0) == code
        assert wanted, f"{words}: exit {stopped.value.code}\n{done.stdout}\n{done.stderr}"
        check_next(done.stderr)
        return done

    return run


def in_a_process(*words: str, cwd: Path, options: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "dinocli", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | env)


COMMANDS = [
    "",
    "eval",
    "eval retrieval",
    "eval copies",
    "eval segment",
    "eval match",
    "eval track",
    "doctor",
    "pretrain",
    "slurm",
    "extract",
    "knn",
    "linear",
    "classify",
    "compare",
    "runs",
    "report",
    "search",
    "dedup",
    "curate",
    "anomaly",
    "plot",
    "attn-map",
    "match",
    "track",
    "segment",
    "export",
    "push",
    "pack",
    "presets",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_imports_no_torch(tmp_path: Path, command: str) -> None:
    words = [*command.split(), "--help"]

    def seconds() -> float:
        # CPU time, not wall time, because the machine may be busy.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = in_a_process(*words, cwd=tmp_path, options=("-X", "importtime"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Usage" in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "dinocli.cli" in imported
        assert "torch" not in imported
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 0.8 for _ in range(3)), "a busy machine makes it slower, never faster"


@pytest.mark.parametrize(
    "line",
    [
        "pretrain nowhere",
        "pretrain cut",
        "pretrain images --preset nowhere",
        "pretrain images --epoch 3",
        "extract timm:resnet18 nowhere",
        "extract nowhere.pth images",
        "extract images --checkpoint nowhere.pth",
        "pack images",
        "knn --features nowhere",
        "linear --features nowhere",
        "linear --paper images",
        "search images --features nowhere",
        "dedup --features nowhere",
        "curate nowhere --like nowhere",
    ],
)
def test_errors_in_words_and_places_are_reported_before_torch_is_imported(tmp_path: Path, line: str) -> None:
    write_images(tmp_path / "images", 2)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "pixels.json").write_text("{")  # packed pixels
    done = in_a_process(*line.split(), cwd=tmp_path, options=("-X", "importtime"))
    lines = done.stderr.splitlines()
    assert any(line.startswith("error: ") for line in lines) and any(line.startswith("hint: ") for line in lines)
    assert "torch" not in {line.rpartition("|")[2].strip() for line in lines}


def test_version(dino: Dino) -> None:
    import dinocli

    assert dino("--version").stdout == f"dino {dinocli.__version__}\n"


def test_presets_are_listed_and_shown(dino: Dino) -> None:
    table = dino("presets").stdout
    both = [*shipped.names(), *shipped.stages()]
    assert all(name in table for name in both)
    rows = json.loads(dino("presets", "--json").stdout)
    assert [row["preset"] for row in rows] == both
    assert dino("presets", "show", "vits16").stdout.strip() == shipped.text("vits16").strip()


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["pretrain", "nowhere"], "nowhere does not exist", ""),
        (["pretrain", "imagse"], "imagse does not exist", "did you mean images?"),
        (["pretrain", "Image/a"], "Image/a does not exist", "did you mean images?"),
        (["pretrain", "s3://bucket/x.zip"], "IMAGES s3://bucket/x.zip is an address", "copy it here first"),
        (["pretrain", "images", "--init", "s3://b/x.pth"], "--init s3://b/x.pth is an address", "name the copy: x.pth"),
        (["pretrain", "images", "--out", "s3://b/x"], "--out s3://b/x is an address", "use --out x"),
        (["pretrain", "images", "--out", "images/a/0000.png"], "is a file; expected a folder", "use --out images/a/0000"),
        (["pretrain", "images", "--out", "./images"], "--out images is the folder of the images", "use --out runs/images"),
        (["pretrain", "images", "--cache", "gs://b/c"], "--cache gs://b/c is an address", "use --cache c"),
        (
            ["pretrain", "images", "--preset", "tiny", *SMALL, "--device", "cpu", "--decode", "gpu"],
            "--decode gpu needs a CUDA device; the device of this run is cpu",
            "run without --decode gpu",
        ),
        (["pretrain", "images", "--epochs", "5", "--set", "training.epochs=9"], "two values for one key", "keep one: --epochs 5"),
        (["pretrain", "images", "--preset", "vit_s16"], "no preset 'vit_s16'", "use --preset vits16"),
        (["pretrain", "images", "--preset", "ViT-S/8"], "no preset 'ViT-S/8'", "use --preset vits8"),
        (["pretrain", "images", "--preset", "TINY"], "no preset 'TINY'", "use --preset tiny"),
        (["pretrain", "images", "--preset", "./missing.toml"], "./missing.toml does not exist", "shipped presets are tiny"),
        (["pretrain", "images", "--preset", "tiny.toml"], "tiny.toml does not exist", "use --preset tiny, which ships"),
        (["pretrain", "images", "--preset", "tiny", "--init", "vit_tiny_patch16_224"], "does not exist here", "timm:vit_tiny_patch16_224"),
        (["pretrain", "images", "--preset", "tiny", "--teacher", "tiny"], "--teacher tiny is a preset", "--teacher runs/tiny-1"),
        (["pretrain", "empty"], "no images in empty", ".jpg"),
        (["pretrain", "images", "--preset", "vits61"], "no preset 'vits61'", "vits16"),
        (["pretrain", "images"], "a batch of 1024 images is larger than the set of 12", "--batch-size 8"),
        (["pretrain", "images", "--set", "optimizer.lr.strat=1"], "no key optimizer.lr.strat", "optimizer.lr.start"),
        (["pretrain", "images", "--set", "training.seed=-1"], "training.seed", "--set training.seed"),
        (["pretrain", "images", "--preset", "tiny", "--batch-size", "4", "--device", "cuda:9"], "cuda:9", "--device auto"),
        (["pretrain", "images", "--preset", "tiny", "--batch-size", "4", "--device", "gpu"], "'gpu' is not a device", "--device auto"),
        (["pretrain", "images", "--preset", "tiny", "--batch-size", "4", "--init", "x.pth"], "x.pth does not exist", "timm:NAME"),
        (["doctor", "nowhere"], "nowhere does not exist", ""),
        (["doctor", "empty"], "no images in empty", ".jpg"),
        (["doctor", "--device", "cuda:9"], "cuda:9", "--device auto"),
        (["extract", "images"], "no checkpoint given", "dino pretrain"),
        (["extract", "x.safetensors", "images"], "x.safetensors does not exist", "run folder"),
        (["extract", "timm:resnet18", "nowhere"], "nowhere does not exist", ""),
        (["extract", "timm:vit_tinny_patch16_224", "images"], "no model", "vit_tiny_patch16_224"),
        (["knn"], "no --features given", "dino extract"),
        (["knn", "--features", "nowhere"], "nowhere does not exist", "dino extract"),
        (["linear"], "no --features given", "dino extract"),
        (["linear", "--paper", "images"], "train/ and val/", "DATA/train/CLASS"),
        (["attn-map", "nowhere.jpg"], "nowhere.jpg does not exist", ""),
        (["attn-map", "nowhere", "--film", "gif"], "nowhere does not exist", ""),
        (["attn-map", "images"], "no checkpoint given", "dino pretrain"),
        (["match", "nowhere.jpg", "images/a/0000.png"], "nowhere.jpg does not exist", ""),
        (["match", "images/a/0000.png", "images/a/0001.png"], "no checkpoint given", "dino pretrain"),
        (["track", "images", "--mask", "nowhere.png"], "nowhere.png does not exist", ""),
        (["track", "nowhere", "--mask", "images/a/0000.png"], "nowhere does not exist", ""),
        (["segment", "nowhere.jpg"], "nowhere.jpg does not exist", ""),
        (["segment", "images"], "no checkpoint given", "dino pretrain"),
        (["presets", "show", "vits61"], "no preset 'vits61'", "vits16"),
        (["linear", "--checkpoint", "x"], "need images (--paper)", "--paper"),
        (["pretrain", "images", "--set", "views.local.scale=[0.4, 0.05]"], "views.local.scale", "--set views.local.scale"),
        (["pretrain", "images", "--set", "optimizer.betas=[0.9, 1.5]"], "optimizer.betas", "--set"),
        (["pretrain", "images", "--set", "teacher.momentum.start=1.5"], "teacher.momentum.start is 1.5; expected from 0 to 1", "--set teacher.momentum.start=0.996"),
        (["pretrain", "images", "--epochs", "5"], "optimizer.lr.warmup_epochs=10 (at most 4)", "--set optimizer.lr.warmup_epochs=0"),
        (["pretrain", "images", "--preset", "tiny-dino", "--batch-size", "4", "--set", "backbone.name=resnet18", "--set", "backbone.options={}"],
         "no class token", "--set backbone.class_token_std=none"),
        (["pretrain", "images", "--preset", "tiny", "--batch-size", "4", "--set", "backbone.options.patch_size=0"], "cannot build", "backbone.options"),
        (["demo", "--out", "images"], "images exists and holds no demo", "--out"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_and_one_hint(
    dino: Dino, tmp_path: Path, images: Path, words: list[str], message: str, hint: str
) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = dino(*words, code=1)
    error, said = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ")
    assert message in error
    assert said.startswith("hint: ")
    assert hint in said
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before, "a mistake writes nothing"


@pytest.mark.parametrize(
    "words",
    [["pretrain"], ["pretrain", "images", "--colour"], ["fly"], ["extract", "a", "b", "c"], ["match", "a", "b", "c"]],
)
def test_wrong_usage_is_code_two(dino: Dino, words: list[str]) -> None:
    done = dino(*words, code=2)
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: dino")
    assert "--help" in hint
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("pretrain images --lr 0.001", "No such option: --lr", "use --set optimizer.lr.start=0.001"),
        ("pretrain images --preset tiny --lr=0.001", "No such option: --lr", "use --set optimizer.lr.start=0.001"),
        ("pretrain images --learning-rate 1e-3", "No such option: --learning-rate", "use --set optimizer.lr.start=1e-3"),
        ("pretrain images --wd 0.1", "No such option: --wd", "use --set optimizer.weight_decay.start=0.1"),
        ("pretrain images --temperature 0.1", "--temperature", "use --set losses.dino.targets.temperature.start=0.1"),
        ("pretrain images --preset tiny --temperature 0.1", "", "use --set losses.dino.targets.temperature.value=0.1"),
        ("pretrain images --momentum 0.9", "--momentum", "use --set teacher.momentum.start=0.9 or --set losses.dino.targets"),
        ("pretrain images --crops 8", "No such option: --crops", "use --set views.locals=8"),
        ("pretrain images --patch-size 8", "No such option: --patch-size", "use --set backbone.options.patch_size=8"),
        ("pretrain images --arch vit_base", "--arch", "use --preset NAME (dino presets lists them), or --set backbone.name=vit_base"),
        ("pretrain images --gpu 2", "No such option: --gpu", "use --gpus 2"),
        ("pretrain images --amp", "No such option: --amp", "use --set training.precision=VALUE"),
        ("pretrain images --out-dim 64", "--out-dim", "use --set heads.dino.prototypes=64"),
        ("pretrain images --num-workers 3", "--num-workers", "use --workers 3"),
        ("pretrain images --batch_size 4", "--batch_size", "use --batch-size 4"),
        ("pretrain images -b 4", "No such option: -b", "use --batch-size 4"),
        ("pretrain images --step 4", "No such option: --step", "use --steps 4"),
        ("pretrain images --resume", "No such option: --resume", "remove --resume: the same command resumes"),
        ("pretrain images --continue", "No such option: --continue", "remove --continue"),
        ("pretrain --data images", "No such option: --data", "give the images without an option: dino pretrain images"),
        ("pretrain images --batch-size 0", "--batch-size 0 is too small; expected 1 or more", "use --batch-size 1 or more"),
        ("pretrain images --workers -1", "--workers -1 is too small; expected 0 or more", "use --workers 0 or more"),
        ("pretrain images --epochs 0", "--epochs 0 is too small; expected 1 or more", "use --epochs 1 or more"),
        ("pretrain images --epochs ten", "--epochs ten is not a whole number", "use --epochs N"),
        ("pretrain images --on-collapse halt", "--on-collapse halt is not one of stop, warn", "use --on-collapse"),
        ("pretrain images --set lr 0.1", "dino pretrain takes images; unexpected argument 0.1", "use --set lr=0.1"),
        ("pretrain images --set views.mean=[0.5, 0.5, 0.5]", "takes images", "--set 'views.mean=[0.5, 0.5, 0.5]'"),
        ("pretrain images --set optimizer.lr=a=1 optimizer.lr=b=2", "takes images", "quote the value"),
        ("pretrain", "dino pretrain needs IMAGES", "dino pretrain ./images --preset tiny"),
        ("pretrian images", "dino has no command pretrian", "dino pretrain images"),
        ("knn 20", "dino knn takes no argument; unexpected argument 20", "dino knn --k 20"),
        ("knn feats", "dino knn takes no argument and reads features; unexpected argument feats", "dino knn --features feats"),
        ("knn --k many", "--k many is not a whole number", "use --k N"),
    ],
)  # fmt: skip
def test_a_usage_error_says_what_to_type(dino: Dino, words: str, message: str, hint: str) -> None:
    done = dino(*words.split(), code=2)
    error, said = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert said.startswith("hint: ")
    assert hint in said
    assert done.stdout == ""


def test_processes_of_another_launcher_do_not_train_alone(
    dino: Dino, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for command in ("pretrain", "extract"):
        done = dino(command, "images", code=1)
        assert done.stderr.startswith("error: RANK=1 WORLD_SIZE=2 without MASTER_ADDR")
        assert "torchrun --nproc-per-node 2" in done.stderr.splitlines()[1]
    assert "Usage" in dino("pretrain", "--help").stdout
    assert dino("presets", "show", "tiny").stdout, "a command without output may run in each process"
    refused = dino("knn", code=1).stderr
    assert refused.startswith("error: dino knn runs in one process; RANK=1 WORLD_SIZE=2 announces 2")
    assert "env -u RANK -u WORLD_SIZE dino knn" in refused
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert "torchrun" in dino("pretrain", "images", code=1).stderr.splitlines()[1]
    assert "run it without srun: dino adapt" in dino("adapt", "images", code=1).stderr
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert "srun" not in dino("knn", code=1).stderr, "a step of one task works alone"


def test_dino_without_a_command_prints_its_help(dino: Dino) -> None:
    assert "pretrain" in (done := dino(code=2)).stdout + done.stderr


@pytest.mark.parametrize(
    "failure",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("[enforce fail] can't allocate memory")],
)
def test_too_little_memory_is_an_error(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinocli import cli

    def fail(words: list[str], **options: object) -> None:
        raise failure

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "not enough memory" in capsys.readouterr().err


def test_outputs_in_the_image_folder_are_ignored_and_the_same_command_resumes(
    dino: Dino, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    (images / "film.mp4").touch()
    words = ("pretrain", ".", "--preset", "tiny", *SMALL)
    first = dino(*words, "--steps", "2")
    assert "note: not read: 1 .mp4" in first.stderr and "ignoring" not in first.stderr
    dino("attn-map", next(str(path) for path in images.rglob("*.png")))
    dino("extract", "ckpt.safetensors", ".")
    dino("search", next(str(path) for path in images.rglob("0*.png")))
    again = dino(*words, "--steps", "3")
    assert "note: ignoring attention/, features/, runs/ and search.png here: written by dino" in again.stderr
    assert "tiny: 12 images" in first.stderr and "tiny: 12 images" in again.stderr
    assert "resuming from step 2 of 3 in runs/tiny-1" in again.stderr
    assert json.loads(dino("extract", "ckpt.safetensors", ".", "--json").stdout)[0]["images"] == 12


@pytest.mark.slow
@pytest.mark.job
def test_ctrl_c_to_the_process_group_saves_and_the_same_command_resumes(
    dino: Dino, tmp_path: Path, images: Path
) -> None:
    words = [
        "pretrain",
        "images",
        "--preset",
        "tiny",
        *SMALL[:-4],
        "--workers",
        "1",
        "--device",
        "cpu",
        "--set",
        "training.steps_per_epoch=100000",
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "dinocli", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "runs" / "tiny-1" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 0, said
    assert "Traceback" not in said
    assert "stopped at step" in said
    from safetensors import safe_open

    with safe_open(tmp_path / "ckpt.safetensors", framework="numpy") as file:
        step = int(file.metadata()["step"])
    assert step >= 20
    again = dino(*words, "--steps", str(step + 2))
    assert f"resuming from step {step} of {step + 2} in runs/tiny-1" in again.stderr
    assert "done: 2 steps" in again.stderr
    assert f"after {step} before" in again.stderr
    assert again.stdout == "runs/tiny-1/ckpt.safetensors\n"
    words += ["--no-report"]
    assert "into runs/tiny-2" in dino(*words, "--steps", "1").stderr, "a completed run is not resumed"
    assert "into runs/tiny-3" in dino(*words, "--steps", "1", "--seed", "5").stderr


def test_save_every_takes_a_time_or_steps(dino: Dino, images: Path) -> None:
    words = ["pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "6", "--no-report"]
    dino(*words, "--save-every", "2", "--keep", "9", "--out", "steps")
    assert {p.name for p in Path("steps/state").iterdir()} == {"0", "2", "4", "6"}
    dino(*words, "--save-every", "2h", "--milestones", "5", "--out", "time")
    assert {p.name for p in Path("time/state").iterdir()} == {"5", "6"}
    for wrong in ("0", "ten", "5 days", "-1min", "1.5h"):
        assert "expected a time or a number of steps" in dino(*words, f"--save-every={wrong}", code=1).stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(dino: Dino, tmp_path: Path, images: Path) -> None:
    numbers = json.loads(dino("pretrain", "images", "--preset", "tiny", *SMALL, "--dry-run", "--json").stdout)
    assert numbers["images"] == 12
    assert numbers["flops"] > 0
    done = dino("pretrain", "images", "--preset", "tiny", *SMALL, "--dry-run")
    for word in ("images", "steps", "learning rate", "parameters", "memory", "time", "runs/tiny-1"):
        assert word in done.stdout
    assert "2x16 + 4x8 " in done.stdout
    low = ["--set", "views.low_resolution={epochs=2, global_size=8}"]
    done = dino("pretrain", "images", "--preset", "tiny", *SMALL, *low, "--dry-run")
    assert "2x8 + 4x8 for 2 of 8 epochs, then 2x16 + 4x8" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]
    run = dino("pretrain", "images", "--preset", "tiny", *SMALL, *low, "--steps", "2", "--no-report")
    assert "note: views of 2x8 + 4x8 for 2 of 8 epochs, then 2x16 + 4x8: later steps take longer" in run.stderr
    assert "stops at step 2 of 400" in run.stderr
    assert "the epochs of low resolution (100 steps)" in run.stderr


def test_a_dry_run_makes_the_checks_of_the_run(dino: Dino, tmp_path: Path, images: Path) -> None:
    words = ["pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "1", "--no-report"]
    dino(*words, "--out", "taken")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("mine")
    (tmp_path / "plain").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "plain" / f"{i}.png")
    (tmp_path / "no.pth").write_text("no weights")
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    for more, message in (
        (["--init", "no.pth"], "no.pth cannot be read as weights"),
        (["--init", "taken", "--set", "backbone.options.embed_dim=32"], "cls_token is 1x1x16; expected 1x1x32"),
        (["--teacher", "no.pth"], "no.pth cannot be read as weights"),
        (["--teacher", "taken", "--set", "heads.dino.prototypes=8"], "has 16 prototypes; the student's has 8"),
        (["--monitor", "plain"], "--monitor needs images in class folders"),
        (["--monitor", "nowhere"], "nowhere does not exist"),
        (["--out", "other"], "other holds a metrics.jsonl but no valid state"),
        (["--out", "taken", "--seed", "7"], "the run began with training.seed = 0; 7 is now set"),
        (["--out", "no.pth"], "--out no.pth is a file"),
    ):
        dry = dino(*words, *more, "--dry-run", code=1)
        assert message in dry.stderr, more
        assert dry.stdout == ""
        assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before, "nothing is written"
        assert dino(*words, *more, code=1).stderr.splitlines()[-2:] == dry.stderr.splitlines()[-2:], (
            "the same error as the run's"
        )
    dino(*words, "--init", "taken", "--monitor", "images", "--out", "new", "--dry-run")
    assert not (tmp_path / "new").exists()


def test_a_short_trial_keeps_the_link_to_a_longer_run(dino: Dino, tmp_path: Path, images: Path) -> None:
    words = ["pretrain", "images", "--preset", "tiny", *SMALL, "--no-report"]
    link = tmp_path / "ckpt.safetensors"
    assert "points to" not in dino(*words, "--steps", "3").stderr
    short = dino(*words, "--steps", "1", "--seed", "1")
    assert "note: ./ckpt.safetensors still points to runs/tiny-1/ckpt.safetensors (step 3)" in short.stderr
    assert "next: dino extract runs/tiny-2/ckpt.safetensors" in short.stderr
    assert os.readlink(link) == "runs/tiny-1/ckpt.safetensors"
    longer = dino(*words, "--steps", "4", "--seed", "2").stderr
    assert (
        "now points to runs/tiny-3/ckpt.safetensors (step 4); before: runs/tiny-1/ckpt.safetensors (step 3)" in longer
    )
    assert os.readlink(link) == "runs/tiny-3/ckpt.safetensors"
    ends = [
        "training.epochs=1",
        "training.steps_per_epoch=2",
        "optimizer.lr.warmup_epochs=0",
        "heads.dino.freeze_last_layer_epochs=0",
    ]
    whole = dino(*words, *(word for end in ends for word in ("--set", end))).stderr
    assert "now points to runs/tiny-4/ckpt.safetensors (step 2)" in whole, (
        "a completed run takes the link, even if it is shorter"
    )


def test_more_steps_than_the_run_has_are_noted(dino: Dino, images: Path) -> None:
    done = dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "999", "--dry-run")
    assert "note: --steps 999 is more than the run's 400 steps; it ends after 400; see --epochs" in done.stderr


def test_the_doctor_writes_nothing(dino: Dino, tmp_path: Path) -> None:
    write_images(tmp_path / "my images" / "a", 40, size=16)
    (tmp_path / "my images" / "a" / "b\x1b[1m.png").write_bytes(b"none")
    before = sorted(path for path in tmp_path.rglob("*"))
    done = dino("doctor", "my images", "--device", "cpu")
    assert sorted(tmp_path.rglob("*")) == before
    assert "41 images in 1 class; all checked" in done.stdout
    assert "PNG 40" in done.stdout
    assert "1 not an image, such as a/b?[1m.png" in done.stdout
    command = done.stdout.splitlines()[-1]
    assert command.startswith("dino pretrain 'my images' --preset tiny --batch-size 32 --epochs 40")
    assert "note: 2,000 steps of 32" in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) <= 40
    plan = json.loads(dino(*shlex.split(command)[1:], "--dry-run", "--json").stdout)
    assert plan["steps"] == 2000
    assert sorted(tmp_path.rglob("*")) == before


def test_the_doctor_prints_json(dino: Dino, tmp_path: Path) -> None:
    write_images(tmp_path / "few", 3)
    told = json.loads(dino("doctor", "few", "--json").stdout)
    assert told["machine"]["cores"] >= 1
    assert (told["images"]["count"], told["images"]["read"], told["command"]) == (3, 3, None)
    assert told["images"]["width"]["median"] == 32
    assert "fewer than 32" in told["notes"][0]
    alone = json.loads(dino("doctor", "--json").stdout)
    assert (alone["images"], "command" in alone) == (None, False)


def test_the_doctor_prints_a_fault_and_its_remedy(dino: Dino, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinocli.apps.doctor import machine

    monkeypatch.setattr(
        machine, "faults_of", lambda *about: {"timm needs torch >=9; 2 is installed": "pip install torch"}
    )
    done = dino("doctor", code=1)
    assert "error: timm needs torch >=9; 2 is installed" in done.stderr
    assert "hint: pip install torch" in done.stderr
    assert "1 fault, listed below" in done.stdout


def test_data_goes_to_stdout_and_messages_to_stderr(dino: Dino, tmp_path: Path, images: Path) -> None:
    done = dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "2")
    assert done.stdout == "runs/tiny-1/ckpt.safetensors\n"
    assert "tiny: 12 images, 2 steps of 4 on cpu" in done.stderr
    assert "stops at step 2" in done.stderr
    assert "\x1b" not in done.stderr
    assert (tmp_path / "ckpt.safetensors").resolve() == (tmp_path / "runs" / "tiny-1" / "ckpt.safetensors").resolve()
    taken = dino("extract", "images", "--json", "--workers", "0")
    assert "checkpoint: ckpt.safetensors -> runs/tiny-1/ckpt.safetensors, step 2\n" in taken.stderr
    assert json.loads(taken.stdout)[0]["images"] == 12
    scores = json.loads(dino("knn", "--k", "1", "--k", "3", "--json").stdout)
    assert [s["k"] for s in scores["scores"]] == [1, 3]
    assert scores["leave_one_out"] is True
    above = dino("knn", "--k", "12", code=1)
    assert "--k 12 is larger than the 11 other images that can vote" in above.stderr
    options = ("--views", "2", "--dtype", "float16", "--out", "seen", "--workers", "0")
    assert json.loads(dino("extract", "images", "--json", *options).stdout)[0]["shape"][0] == 3
    patches = dino("extract", "images", "--tokens", "patches", *options, code=1)
    assert "one feature vector per image" in patches.stderr
    assert "hint: remove --tokens patches" in patches.stderr
    assert json.loads(dino("knn", "--features", "seen", "--k", "3", "--json").stdout)["neighbours"] == 11


def test_no_color_turns_colors_off(tmp_path: Path) -> None:
    assert "\x1b[" in in_a_process("knn", cwd=tmp_path, FORCE_COLOR="1").stderr
    # NO_COLOR keeps bold; the codes of colors begin with a 3.
    assert "\x1b[3" not in in_a_process("knn", cwd=tmp_path, FORCE_COLOR="1", NO_COLOR="1").stderr


def test_a_closed_pipe_gives_no_traceback(tmp_path: Path) -> None:
    line = f"{sys.executable} -m dinocli presets show vits16 | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "no space left on the disk of x"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "no permission for /x"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "no permission for /x"),
        (OSError("SafetensorError: No space left on device"), "no space left"),
        (OSError(errno.EIO, "Input/output error", "x"), "Input/output error (x)"),
    ],
)
def test_a_disk_error_is_one_line(
    failure: OSError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinocli import cli

    def fail(words: list[str], **options: object) -> None:
        raise failure

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert hint.startswith("hint: ")


def test_parts_of_an_extraction_are_merged(dino: Dino, tmp_path: Path, start: Path) -> None:
    write_images(tmp_path / "data" / "train" / "a", 5)
    write_images(tmp_path / "data" / "val" / "a", 1)
    words = ["extract", "start.safetensors", "data", "--batch-size=2", "--workers=0", "--device=cpu"]
    dino(*words, "--out=whole")
    for part in ("2/2", "1/2"):
        assert "dino extract --merge features" in dino(*words, "--part", part).stderr.splitlines()[-1]
        if part == "2/2":
            assert "1 of 2 parts are missing" in dino("extract", "--merge", "features", code=1).stderr
    done = dino("extract", "--merge", "features/train.parts", "features/val.parts/1-of-2.safetensors",
                "features/val.parts/2-of-2.safetensors", "--out=joined", "--json")  # fmt: skip
    assert [each["images"] for each in json.loads(done.stdout)] == [5, 1]
    for name in ("train.safetensors", "val.safetensors"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        ".dinocli", "train.safetensors", "val.safetensors"
    ]  # fmt: skip
    for given in ("3/2", "0/2", "1/1", "half"):
        assert f"--part {given} is invalid" in dino(*words, "--part", given, code=1).stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_an_error(dino: Dino, tmp_path: Path, images: Path) -> None:
    tmp_path.chmod(0o500)
    done = dino("pretrain", "images", "--preset", "tiny", *SMALL, code=1)
    assert "no permission" in done.stderr


def test_an_output_below_a_file_is_an_error(dino: Dino, tmp_path: Path, images: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = dino("pretrain", "images", "--preset", "tiny", *SMALL, "--out", "file/run", code=1)
    assert done.stderr.strip().splitlines()[-2].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_paper_protocol_needs_both_splits(dino: Dino, tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train" / "a", 2)
    assert "has train" in dino("linear", "--paper", "data", code=1).stderr


def test_features_of_other_weights_are_not_mixed(dino: Dino, tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train" / "a", 6)
    write_images(tmp_path / "data" / "val" / "a", 6, seed=3)
    for seed in ("0", "1"):
        dino("pretrain", "data", "--preset", "tiny", *SMALL, "--steps", "0", "--seed", seed)
        dino("extract", "data", "--workers", "0", "--out", f"features{seed}")
    (tmp_path / "features1" / "val.safetensors").replace(tmp_path / "features0" / "val.safetensors")
    done = dino("knn", "--features", "features0", "--k", "1", code=1)
    assert "made with different weights" in done.stderr


def test_segment_draws_measures_and_learns(dino: Dino, tmp_path: Path, images: Path) -> None:
    dino("pretrain", str(images), "--preset", "tiny", *SMALL, "--steps", "0")
    (images / "a" / "torn.png").write_bytes(b"no image")
    write_images(tmp_path / "masks" / "a", 6, seed=0)  # RGB images, which are not masks
    for path in sorted((tmp_path / "masks" / "a").iterdir()):
        mask = Image.fromarray((np.arange(32 * 32).reshape(32, 32) > 500).astype(np.uint8) * 255)
        if path.stem != "0003":
            (mask if path.stem != "0002" else mask.convert("RGB")).save(path)

    done = dino("segment", "images", "--masks", "--json")
    told = json.loads(done.stdout)
    assert [d["picture"] for d in told[:2]] == ["segments/a/0000.png", "segments/a/0001.png"]
    assert len(told) == 12
    assert "note: skipped images/a/torn.png: not an image" in done.stderr
    alike = dino("segment", "images/a/0000.png", "images/a/0001.png", "--tau", "-1", "--out", "alike")
    assert "no foreground found in images/a/0000.png and 1 more" in alike.stderr
    with Image.open(told[0]["mask"]) as mask:
        assert mask.size == (32, 32)
    assert dino("segment", "images/a/0000.png", "--by", "attention", "--out", "one").stdout == "one/0000.png\n"
    assert dino("segment", "images", "--by", "pca", "--out", "colors").stdout == "colors/pca.png\n"
    other = dino("segment", "images", "--by", "pca", "--foreground", "attention", "--out", "other")
    assert other.stdout == "other/pca.png\n"

    done = dino("eval", "segment", "images/a", "--truth", "masks/a", "--json")
    measured = json.loads(done.stdout)
    assert list(measured["jaccard"]) == ["attention", "cut", "border", "all foreground", "centred ellipse"]
    assert measured["jaccard"]["all foreground"] == pytest.approx(523 / 1024)
    assert measured["photos"] == 5
    assert sorted(measured["skipped"]) == ["images/a/0003.png", "images/a/torn.png"]
    table = dino("eval", "segment", "images/a", "--truth", "masks", "--by", "cut").stdout
    assert "masks of 5 photos" in table
    assert "attention" not in table
    nothing = dino("eval", "segment", "images/a/0003.png", "--truth", "masks", code=1).stderr
    assert "none of 1 photos has a mask of its name and size in masks" in nothing

    for split, names in (("train", "0124"), ("val", "5")):
        for name in names:
            for kind, folder in (("images", images), ("masks", tmp_path / "masks")):
                place = tmp_path / "data" / split / kind / f"{name}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes((folder / "a" / f"000{name}.png").read_bytes())
    done = dino("eval", "segment", "--train", "data", "--epochs", "2", "--json")
    learned = json.loads(done.stdout)
    assert (learned["train_photos"], learned["val_photos"], learned["path"]) == (4, 1, "segments/head.safetensors")
    assert list(learned["head"]["iou"]) == ["background", "object"]
    drawn = dino("segment", "images/b/0001.png", "--classifier", "segments/head.safetensors", "--masks", "--json")
    assert set(json.loads(drawn.stdout)[0]["shares"]) <= {"background", "object"}
    assert "no segmentation head" in dino("segment", "images", "--classifier", "ckpt.safetensors", code=1).stderr
    folder = dino("segment", "images", "--classifier", "segments", code=1).stderr
    assert "hint: use --classifier segments/head.safetensors" in folder
    assert "omit --masks or --by pca" in dino("segment", "images", "--by", "pca", "--masks", code=2).stderr
    assert "--classifier cannot be" in dino("segment", "images", "--by", "pca", "--classifier", "x", code=2).stderr
    convolutional = ["--set", "backbone={name='resnet10t'}", "--set", "backbone.class_token_std=none"]
    dino("pretrain", "images", "--preset", "tiny", *SMALL, *convolutional, "--steps", "0", "--out", "resnet")
    by_cut = dino("eval", "segment", "images/a", "--truth", "masks", "--checkpoint", "resnet", "--json")
    assert list(json.loads(by_cut.stdout)["jaccard"]) == ["cut", "border", "all foreground", "centred ellipse"]
    assert "note: a convolutional network has no attention" in by_cut.stderr
    table = dino("eval", "segment", "--train", "data", "--epochs", "1").stdout
    assert table.splitlines()[-1] == "segments/head.safetensors"


def test_no_picture_overwrites_a_photo(dino: Dino, images: Path) -> None:
    dino("pretrain", str(images), "--preset", "tiny", *SMALL, "--steps", "0")
    photo = images / "a" / "0000.png"
    before = photo.read_bytes()
    for words in (["segment", str(photo)], ["attn-map", str(photo)], ["segment", str(images)]):
        out = images if words[1] == str(images) else photo.parent
        assert "the output would overwrite it" in dino(*words, "--out", str(out), code=1).stderr
    strip = photo.parent / "a.png"
    photo.rename(strip)
    done = dino("attn-map", str(images / "a"), "--film", "strip", "--out", str(images / "a"), code=1)
    assert "a.png is an input" in done.stderr
    assert strip.read_bytes() == before


def test_each_folder_of_frames_is_a_film_and_all_single_files_are_one(dino: Dino, images: Path) -> None:
    dino("pretrain", str(images), "--preset", "tiny", *SMALL, "--steps", "0")
    for name in ("dog", "cat"):
        write_images(Path(name, "frames"), 9, size=24)
    assert dino("attn-map", "dog/frames", "--film", "strip").stdout == "attention/frames.png\n"
    both = dino("attn-map", "dog/frames", "cat/frames", "--film", "gif", "--head", "1", "--fps", "5").stdout
    assert both == "attention/dog-frames.gif\nattention/cat-frames.gif\n"
    files = [str(path) for path in sorted(Path("dog/frames").glob("000[1-3].png"))]
    told = json.loads(dino("attn-map", *files, "--film", "gif", "--json").stdout)
    assert told == [{"film": "attention/frames.gif", "frames": 3, "skipped": {}}]


def test_options_of_films_need_film(dino: Dino, tmp_path: Path) -> None:
    assert "--film" in dino("attn-map", "x.jpg", "--head", "2", code=2).stderr
    assert "photos only" in dino("attn-map", "x", "--film", "gif", "--raw", code=2).stderr
    (tmp_path / "x.mp4").touch()
    assert "hint: add --film strip, gif or mp4" in dino("attn-map", "x.mp4", code=1).stderr


def test_export_prints_how_to_load_its_output(dino: Dino, images: Path) -> None:
    dino("pretrain", str(images), "--preset", "tiny", *SMALL, "--steps", "0")
    done = dino("export", "--to", "official", "--json")
    assert json.loads(done.stdout)["path"] == "tiny-1.pth"
    assert "the same features" in done.stderr
    assert "torch.load('tiny-1.pth')" in done.stderr
    assert dino("export", "runs/tiny-1", "--to", "torch-export", "--out", "sub/net.pt2").stdout == "sub/net.pt2\n"
    assert dino("export", "runs/tiny-1", "--to", "official", "--projection-head").stdout == "tiny-1-heads.pth\n"
    assert dino("export", "--to", "timm").stdout == "tiny-1-timm\n"
    assert dino("export", "--to", "timm").stdout == "tiny-1-timm\n", "an export may replace its own"


def test_push_prints_what_to_check_and_the_upload_command(dino: Dino, images: Path) -> None:
    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "1", "--workers", "0")
    done = dino("push")
    assert done.stdout == "tiny-1-hub\n"
    assert "next: hf upload USER/tiny-1 tiny-1-hub" in done.stderr
    assert "12 images" in Path("tiny-1-hub/README.md").read_text()
    told = json.loads(dino("push", "runs/tiny-1", "my birds", "--json").stdout)
    assert (told["path"], told["name"], told["knn"]) == ("my birds", "my-birds", None)
    assert dino("extract", "timm:local-dir:tiny-1-hub", "images").stdout


def test_push_uploads_only_if_asked_and_with_a_token(
    dino: Dino, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from dinocli.apps.hub import upload

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused = dino("push", str(start), "--upload", "ada/my-birds", code=1)
    assert "error: no token for the Hugging Face Hub" in refused.stderr
    assert "hint: hf auth login" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == [start.name], "nothing is written"
    assert "add --upload USER/NAME" in dino("push", str(start), "--private", code=2).stderr
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(upload, "upload", lambda folder, name, *, private: f"https://hub/{name}?private={private}")
    done = dino("push", str(start), "birds", "--upload", "ada/my-birds", "--private")
    assert done.stdout == "birds\n"
    assert done.stderr.endswith("results saved to birds, https://hub/ada/my-birds?private=True\n")
    assert "hf-hub:ada/my-birds" in (tmp_path / "birds" / "README.md").read_text()


def test_an_export_never_overwrites_its_source(dino: Dino, tmp_path: Path) -> None:
    import timm
    import torch

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8)
    both = {name: {f"backbone.{k}": v for k, v in model.state_dict().items()} for name in ("student", "teacher")}
    torch.save(both, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    for words, name in (
        (["official"], "checkpoint-official.pth"),
        (["official", "--network", "student"], "checkpoint-student-official.pth"),
        (["torch-export", "--network", "student"], "checkpoint-student.pt2"),
        (["timm"], "checkpoint-timm"),
    ):
        assert dino("export", "checkpoint.pth", "--to", *words).stdout == f"{name}\n"
    said = dino("export", "checkpoint.pth", "--to", "official", "--out", "checkpoint.pth", code=1).stderr
    assert "which would be overwritten" in said
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("out", ["/proc/x.pth", "/proc/sub/x.pth"])
def test_an_impossible_output_is_named_as_typed(dino: Dino, images: Path, out: str) -> None:
    dino("pretrain", str(images), "--preset", "tiny", *SMALL, "--steps", "0")
    said = dino("export", "--to", "official", "--out", out, code=1).stderr
    assert f"({Path(out) if out == '/proc/x.pth' else Path(out).parent})" in said
    assert ".part" not in said
    assert "contains the source" in dino("export", "--to", "timm", "--out", ".", code=1).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "tf"], "--to tf is not one of official, timm, transformers, onnx, torch-export, parquet, csv, npy"),
        ([], "Missing option '--to'. Choose from: official, timm, transformers, onnx, torch-export, parquet, csv, npy"),
        (["--to", "onnx", "--projection-head"], "--projection-head needs --to official; this is --to onnx"),
        (
            ["--to", "timm", "--size", "32"],
            "--tokens, --size and --any-size are only for the graphs of --to onnx and --to torch-export; this is --to timm",
        ),
    ],
)
def test_export_explains_a_wrong_option_in_one_line(dino: Dino, words: list[str], said: str) -> None:
    assert said in dino("export", *words, code=2).stderr.splitlines()[0]


def test_more_gpus_than_the_machine_has_is_an_error(dino: Dino, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3)
    done = dino("pretrain", "images", "--gpus", "99", code=1)
    assert "--gpus 99 is more than the" in done.stderr
    assert "hint:" in done.stderr


def test_a_single_process_command_refuses_several_processes(dino: Dino, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    done = dino("knn", code=1)
    assert "dino knn runs in one process; torchrun started 2" in done.stderr
    assert left == [1]
    monkeypatch.setenv("RANK", "1")
    assert not dino("knn", code=1).stderr, "only the first process prints the error"


@pytest.mark.parametrize("address", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}])
def test_training_commands_of_one_process_refuse_the_variables_of_several(
    dino: Dino, address: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each process would train alone on part of the batch and write to the same files as the others."""
    for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | address).items():
        monkeypatch.setenv(name, value)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    for command in ("adapt", "finetune"):
        done = dino(command, "images", "--from", "x.pth", code=1)
        assert f"dino {command} runs in one process; RANK=0 WORLD_SIZE=2 announces 2" in done.stderr
        assert f"env -u RANK -u WORLD_SIZE dino {command}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_prints_stopped(dino: Dino, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinocli.cli.options.newest_run", interrupted)
    assert dino("knn", code=130).stderr == "stopped\n"


@pytest.fixture
def searched(dino: Dino, tmp_path: Path) -> list[str]:
    """Extract features of four images, a copy and a resized copy; return the option that names their folder."""
    from PIL import Image

    write_images(tmp_path / "images", 4, 32)
    first = Image.open(tmp_path / "images" / "0000.png")
    first.save(tmp_path / "images" / "same.png")
    first.resize((16, 16)).resize((24, 24)).save(tmp_path / "images" / "small.png")
    dino("pretrain", "images", "--preset", "tiny", "--steps", "0", *SMALL)
    dino("extract", "ckpt.safetensors", "images", "--workers", "0", "--device", "cpu")
    return ["--features", "features"]


def test_search_finds_and_draws_neighbours(dino: Dino, searched: list[str], tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    done = dino("search", "images/0001.png", "torn.jpg", "--k", "3", "--device", "cpu")
    assert "0001.png" in done.stdout
    assert "search.png" in done.stdout
    assert "skipped torn.jpg" in done.stderr
    for kind in ("exact", "hnsw", "ivf"):
        found = json.loads(dino("search", "images", "--index", kind, "--device", "cpu", *searched, "--json").stdout)
        assert found["index"] == kind
        for hit in found["found"]:
            nearest = {n["image"] for n in hit["neighbours"] if n["cosine"] > 1 - 1e-5}
            assert Path(hit["query"]).name in nearest
    assert (tmp_path / "features" / "index.ivf").is_dir()
    assert json.loads(dino("knn", "--k", "1", code=1).stdout or "0") == 0, "an index beside features is no split"


def test_search_refuses_features_that_do_not_fit(dino: Dino, searched: list[str], tmp_path: Path) -> None:
    assert "nothing.jpg does not exist" in dino("search", "nothing.jpg", code=1).stderr
    assert "gnd_roxford5k" in dino("eval", "retrieval", "x.pkl", code=1).stderr
    dino("pretrain", "images", "--preset", "tiny", "--steps", "0", *SMALL, "--seed", "5", "--out", "other")
    assert "other weights" in dino("search", "images", "--checkpoint", "other", "--device", "cpu", code=1).stderr


def test_retrieval_and_copies_are_scored(dino: Dino, searched: list[str], tmp_path: Path) -> None:
    truth = {
        "imlist": ["0000.png", "0001.png"],
        "qimlist": ["same.png"],
        "gnd": [{"easy": [0], "hard": [], "junk": []}],
    }
    (tmp_path / "gnd.json").write_text(json.dumps(truth))
    told = json.loads(dino("eval", "retrieval", "gnd.json", "--images", "images", "--device", "cpu", "--json").stdout)
    assert [s["mean_ap"] for s in told["scores"]][:2] == [100, 100]
    assert told["scores"][2] == {"level": "hard", "mean_ap": None, "precisions": None, "queries": 0}
    table = dino("eval", "retrieval", "gnd.json", "--images", "images", "--device", "cpu").stdout
    assert [line.split("│")[2].strip() for line in table.splitlines() if "hard" in line] == ["-"]
    write_images(tmp_path / "set" / "original", 3)
    write_images(tmp_path / "set" / "strong", 3)
    done = dino("eval", "copies", "set", "--whiten", "images", "--distractors", "images", "--device", "cpu")
    assert "3 originals among 6 others, whitened by 6" in " ".join(done.stdout.split())


def test_dedup_shows_a_threshold_then_groups_and_a_list(
    dino: Dino, searched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinocli.apps.search import dedup as near_duplicates

    first = dino("dedup")
    assert "next: the same command with --threshold" in first.stderr
    assert (tmp_path / "dedup" / "histogram.png").is_file()
    told = json.loads(dino("dedup", "--threshold", "0.999999", "--json").stdout)
    assert [(g["kept"], g["dropped"]) for g in told["groups"]] == [("0000.png", ["same.png"])]
    assert told["kept"] == 5
    keep = (tmp_path / "dedup" / "keep.txt").read_text().split()
    assert str(tmp_path / "images" / "same.png") not in keep
    assert len(keep) == 5
    assert "groups.jpg" in dino("dedup", "--threshold", "0.999999").stdout
    assert "5 images" in dino("pretrain", "dedup/keep.txt", "--preset", "tiny", "--steps", "0", *SMALL).stderr
    monkeypatch.setattr(near_duplicates, "ALL_PAIRS_UP_TO", 2)
    monkeypatch.setattr(near_duplicates, "_SAMPLE", 4)
    by_bounds = dino("dedup", "--threshold", "0.999999", "--json")
    assert json.loads(by_bounds.stdout)["groups"] == told["groups"]
    assert "the histogram is of 4 random images of 6; see --all-pairs" in " ".join(by_bounds.stderr.split())
    assert "4 random images of 6" in " ".join(dino("dedup").stderr.split())
    assert "random images" not in dino("dedup", "--threshold", "0.999999", "--all-pairs").stderr
    (tmp_path / "images").rename(tmp_path / "moved")
    assert "no list was written" in dino("dedup", "--threshold", "0.999999").stderr
    assert "keep.txt" in dino("dedup", "--threshold", "0.999999", "--data", "moved").stdout
    assert "of the nearest images cannot be shown (" in dino("search", "moved/same.png", "--device", "cpu").stderr
    assert "use --json to print their names" in dino("curate", "features", "--clusters", "2", code=1).stderr
    assert (
        "is an input" in dino("search", "moved/same.png", "--out", "moved/same.png", "--device", "cpu", code=1).stderr
    )


def test_curate_selects_the_nearest_to_the_seeds(dino: Dino, searched: list[str], tmp_path: Path) -> None:
    for name, images in (("seeds", ["0001.png"]), ("held", ["0002.png"])):
        (tmp_path / name).mkdir()
        for image in images:
            (tmp_path / name / image).write_bytes((tmp_path / "images" / image).read_bytes())
        dino("extract", name, "--out", f"f-{name}", "--workers", "0", "--device", "cpu")
    told = json.loads(dino("curate", "features", "--like", "f-seeds", "--k", "1", "--json").stdout)
    assert told["images"] == ["0001.png"]
    options = ("--without", "f-held", "--threshold", "0.999999", "--like", "f-seeds", "--k", "9")
    told = json.loads(dino("curate", "features", *options, "--json").stdout)
    assert told["left"] == {"pool": 6, "away from f-held": 5, "without duplicates": 4, "chosen": 4}
    assert not {"same.png", "0002.png"} & set(told["images"])
    done = dino("curate", "features", "--clusters", "2", "--each", "1", "--out", "two.txt")
    assert "chosen" in done.stdout
    assert len((tmp_path / "two.txt").read_text().split()) == 2
    assert "--like" in dino("curate", "features", code=1).stderr
    assert "threshold" in dino("curate", "features", "--like", "f-seeds", "--without", "f-held", code=1).stderr
    assert "holds 4 of the 1 seeds" in dino("curate", "features", "--like", "f-seeds", "--clusters", "2", code=1).stderr


def test_a_run_can_be_the_frozen_teacher_of_another(dino: Dino, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    plan = ["pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "1", "--no-report"]
    dino(*plan, "--out", "large")
    taught = [*plan, "--out", "small", "--teacher", "large"]
    assert "large (vit_tiny_patch16_224), frozen" in dino(*taught, "--dry-run").stdout
    dino(*taught)
    assert json.loads(Path("small/preset.json").read_text())["teacher"]["frozen"]
    watched = dino(*plan, "--out", "on", "--init", "large")
    assert "note: no --monitor set: forgetting of the initial weights will go unnoticed" in watched.stderr
    failed = dino(*plan, "--out", "none", "--set", "teacher.frozen=true", code=1)
    assert "--teacher is not set" in failed.stderr and "hint: --teacher RUN" in failed.stderr


def test_the_features_of_any_encoder_teach_any_student(dino: Dino, tmp_path: Path, images: Path) -> None:
    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report", "--out", "large")
    small = "backbone.options={img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2}"
    plan = ["pretrain", "images", "--preset", "distill-features", "--set", small, "--set", "views.global_1.size=16",
            "--batch-size", "4", "--steps", "2", "--workers", "0", "--device", "cpu", "--no-report"]  # fmt: skip
    taught = [*plan, "--teacher", "large", "--out", "small", "--set", "views.fixed=2", "--cache-teacher", "features"]
    dry = dino(*taught, "--dry-run")
    assert "large (0.0 M parameters, views of 16), frozen" in dry.stdout
    assert "the teacher's features of all fixed views take 0.1 MB of disk, in features/" in dry.stderr
    assert not Path("features").exists() and not Path("small").exists()
    run = dino(*taught)
    assert "teacher: wrote 0.1 MB of features" in run.stderr
    dino("extract", "small", "images", "--size", "16", "--device", "cpu", "--workers", "0", "--out", "found")
    for words, message, hint in (
        ([*plan, "--set", "views.fixed=2", "--teacher", "large", "--teacher", "large"], "has the weights of", "name it once"),
        (plan, "--teacher is not set", "--teacher timm:NAME"),
        ([*plan, "--teacher", "large", "--cache-teacher", "x"], "needs fixed views", "--set views.fixed=4"),
        ([*plan, "--teacher", "large", "--set", "backbone.options.embed_dim=64"], "a student learns little from", "larger --teacher"),
        (["pretrain", "images", "--preset", "tiny", *SMALL, "--teacher", "small"], "small has no heads", "--preset distill-features"),
        (["pretrain", "images", "--preset", "tiny", *SMALL, "--teacher", "timm:resnet18.a1_in1k"], "has no heads", "--preset distill-features"),
        (["pretrain", "images", "--preset", "tiny", *SMALL, "--teacher", "a", "--teacher", "b"], "is set 2 times", "--preset distill-features"),
        (["pretrain", "images", "--preset", "tiny", *SMALL, "--cache-teacher", "x"], "losses.features is not set", "--preset distill-features"),
    ):  # fmt: skip
        for more in ([], ["--dry-run"]):
            failed = dino(*words, "--out", "none", *more, code=1)
            assert message in failed.stderr and hint in failed.stderr.splitlines()[-1], failed.stderr
    assert not Path("none").exists()


def test_match_and_track_draw_and_score(dino: Dino, images: Path) -> None:
    from PIL import Image

    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    a, b = "images/a/0000.png", "images/a/0001.png"
    Path("k.csv").write_text("x_a,y_a,x_b,y_b\n4,4,4,4\n20,20,20,20\n")
    points = ("--keypoints", "k.csv", "--short-side", "32")
    wide = dino("eval", "match", a, a, *points, "--layer", "1", "--layer", "-1", "--pca", "6")
    assert "100.0" in wide.stdout and "matches/0000-0000.png" in wide.stdout
    found = json.loads(dino("match", a, b, "--json").stdout)
    assert Path(found["picture"]).is_file() and "pck" not in found
    assert set(found["pairs"][0]) == {"x_a", "y_a", "x_b", "y_b", "cosine"}

    Path("truth").mkdir()
    for i in range(6):
        Image.linear_gradient("L").resize((32, 32)).point(lambda v: 255 * (v > 120)).save(f"truth/{i:04}.png")
    asked = ["eval", "track", "images/a", "--mask", "truth/0000.png", "--short-side", "32", "--truth", "truth"]
    score = json.loads(dino(*asked, "--json").stdout)
    assert score["frames"] == 6 and score["copying the first mask"]["mean"] == {"j": 1, "f": 1}
    assert 0 < score["score"]["objects"]["255"]["j"] <= 1
    assert "track/track.gif" in dino(*asked).stdout
    assert "J&F" not in dino(*asked[1:-2]).stdout and Path("track/masks/0005.png").is_file()
    done = dino("track", "images/a", "--mask", "track/masks/0000.png", code=1)
    assert "would be overwritten" in done.stderr
    done = dino("track", "track/masks", "--mask", "truth/0000.png", code=1)
    assert "would be overwritten" in done.stderr
    assert "images is a folder" in dino("match", a, "images", code=1).stderr


def test_the_network_of_the_package_serves_every_command_offline(
    dino: Dino, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(connection: socket.socket, address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(draw(i, size=64).image).save(photos / f"{i}.png")
    network = ("--checkpoint", "dinocli:mini", "--device", "cpu")
    small = ("--short-side", "64")
    assert "attention" in dino("attn-map", "photos/0.png", "photos/1.png", *network, *small).stdout
    assert "segment" in dino("segment", "photos/0.png", "photos/1.png", *network, *small).stdout
    assert json.loads(dino("match", "photos/0.png", "photos/1.png", *network, *small, "--json").stdout)["pairs"]
    dino("extract", "dinocli:mini", "photos", "--device", "cpu", "--workers", "0")
    found = json.loads(dino("search", "photos/2.png", "--device", "cpu", "--json").stdout)["found"]
    assert found[0]["neighbours"][0]["image"] == "2.png"


def test_deep_images_of_low_contrast_are_named_with_their_window(dino: Dino) -> None:
    Path("deep").mkdir()
    for i in range(24):
        values = np.random.default_rng(i).integers(0, 101, (24, 24))
        values[:2] = [[0] * 24, [100] * 24]
        Image.fromarray(values.astype(np.uint16)).save(f"deep/{i}.png")
    note = (
        "note: 24 of 24 images are a single color after conversion to 8 bits; raw values span 0 to 100: "
        "--set images.window='[0, 100]'"
    )
    start = ("pretrain", "deep", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    assert note in dino(*start).stderr
    assert "single color" not in dino(*start, "--set", "images.window=[0, 100]").stderr
    assert note not in dino("extract", "deep", "--device", "cpu", "--workers", "0").stderr, "the run's own window"
    done = dino("extract", "deep", "--device", "cpu", "--workers", "0", "--set", "images.window=[0, 65535]")
    assert note in done.stderr


@pytest.mark.parametrize(
    "words",
    [("linear", "--paper", "x", "--lr", "inf"), ("knn", "--temperature", "nan"), ("dedup", "--threshold", "nan")],
)
def test_numbers_on_the_command_line_are_finite(dino: Dino, words: tuple[str, ...]) -> None:
    done = dino(*words, code=2)
    assert done.stderr.startswith(f"error: {words[-2]} {words[-1]} is not a finite number\nhint: ")


def test_knn_prints_the_run_and_the_step_and_has_a_valid_default_k(dino: Dino, tmp_path: Path, images: Path) -> None:
    write_images(images / "a", 12)
    train = ["pretrain", "images", "--preset", "tiny", *SMALL, "--no-report"]
    dino(*train, "--steps", "2")
    dino("extract", "ckpt.safetensors", "images", "--workers", "0", "--device", "cpu")
    done = dino("knn")
    assert "k-NN of ckpt.safetensors (runs/tiny-1, step 2): 18 images of 2 classes" in done.stdout
    assert "│ 10 │" in done.stdout
    assert "│ 20 │" not in done.stdout, "of 18 images 17 can vote"
    told = json.loads(dino("knn", "--json").stdout)
    assert (told["checkpoint"], told["run"], told["step"]) == ("ckpt.safetensors", "runs/tiny-1", 2)
    done = dino("knn", "--index", "ivf", "--json")
    assert json.loads(done.stdout) == {**told, "recall": 1.0}, "one list holds all of so few images"
    assert "ivf index: found 100.0% of the ten nearest in a sample of training images" in done.stderr
    assert Path("features/knn/index.ivf/about.json").is_file()
    assert "linear probe of ckpt.safetensors (runs/tiny-1, step 2)" in dino("linear", "--epochs", "1").stdout
    for k, message in (
        ("0", "--k 0 is below 1"),
        ("-1", "--k -1 is below 1"),
        ("500", "--k 500 is larger than the 17"),
    ):
        said = dino("knn", "--k", k, code=1).stderr
        assert message in said
        assert "hint: use --k 17" in said
    Path("one").mkdir()
    (images / "a").rename("one/a")
    dino("extract", "ckpt.safetensors", "one", "--out", "single", "--workers", "0", "--device", "cpu")
    said = dino("knn", "--features", "single", code=1).stderr
    assert "all 12 images of one are of one class, a; expected at least two classes" in said
    (images / "b").rename("one/b")
    Path("one").rename("val")
    Path("data").mkdir()
    Path("val").rename("data/val")
    dino("extract", "ckpt.safetensors", "data", "--out", "held", "--workers", "0", "--device", "cpu")
    assert "note: held has only the val split" in dino("knn", "--features", "held").stderr
    write_images(Path("plain"), 2)
    dino("extract", "ckpt.safetensors", "plain", "--out", "bare", "--workers", "0", "--device", "cpu")
    assert "have no labels: plain has no class folders" in dino("knn", "--features", "bare", code=1).stderr


def test_a_default_checkpoint_is_printed_with_a_note_if_another_run_is_longer(dino: Dino, images: Path) -> None:
    train = ["pretrain", "images", "--preset", "tiny", *SMALL, "--no-report"]
    dino(*train, "--steps", "2")
    first = dino("attn-map", "images/a/0000.png").stderr
    assert "checkpoint: ckpt.safetensors -> runs/tiny-1/ckpt.safetensors, step 2\n" in first
    assert "trained longer" not in first
    dino(*train, "--steps", "1", "--seed", "5")
    Path("ckpt.safetensors").unlink()
    Path("last.safetensors").symlink_to("runs/tiny-2/ckpt.safetensors")
    for named, told in (
        ([], "runs/tiny-2/ckpt.safetensors"),
        (["--checkpoint", "last.safetensors"], "last.safetensors -> "),
    ):
        said = dino("attn-map", "images/a/0000.png", *named).stderr
        assert f"checkpoint: {told}" in said
        assert "ckpt.safetensors, step 1\n" in said
        assert "note: runs/tiny-1 was trained longer (2 steps); name it to use it\n" in said
    assert "note" not in dino("attn-map", "images/a/0000.png", "--checkpoint", "runs/tiny-2").stderr


def test_a_size_of_partial_patches_and_settings_without_effect_are_errors(dino: Dino, images: Path) -> None:
    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    for words in (["extract", "images"], ["export", "--to", "onnx"]):
        done = dino(*words, "--size", "20", code=1)
        assert "--size 20 is not a multiple of the patch size 8 of ckpt.safetensors" in done.stderr
        assert "hint: --size 16 or --size 24" in done.stderr
    said = dino("extract", "images", "--set", "backbone.options.num_heads=2", code=1).stderr
    assert "--set backbone.options.num_heads=2 is only for official files of a plain ViT" in said
    said = dino("export", "--to", "official", "--set", "images.window=[0, 1]", code=1).stderr
    assert "has no effect here; expected backbone.KEY=VALUE" in said


def test_an_official_export_of_tiny_gives_the_features_of_its_checkpoint(dino: Dino, images: Path) -> None:
    import torch

    import dinocli

    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    dino("export", "--to", "official", "--out", "tiny.pth")
    torch.save(dict(torch.load("tiny.pth", weights_only=True)), "bare.pth")
    heads = ["--set", "backbone.options.num_heads=2"]
    # The bare file stores no mean and std; it gets ImageNet's, which the preset also uses.
    stored = []
    for source, more in (("ckpt.safetensors", []), ("tiny.pth", []), ("bare.pth", heads)):
        place = ["--out", f"f{len(stored)}", "--workers", "0", "--device", "cpu", "--size", "16"]
        dino("extract", source, "images", *place, *more)
        stored.append(dinocli.read_features(f"{place[1]}/all.safetensors").values[:])
    np.testing.assert_allclose(stored[1], stored[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stored[2], stored[0], rtol=1e-5, atol=1e-5)
    said = dino("extract", "bare.pth", "images", code=1).stderr
    assert "bare.pth does not store its number of attention heads, and its width 16 is not a multiple of 64" in said
    assert "hint: --set backbone.options.num_heads=N" in said


def test_features_are_written_for_other_tools(dino: Dino, tmp_path: Path, labelled: Path, start: Path) -> None:
    options = ("--workers", "0", "--device", "cpu")
    done = dino("extract", str(start), "labelled", "--to", "csv", "--json", *options)
    assert [part["files"] for part in json.loads(done.stdout)] == [
        [f"features/{split}.csv", f"features/{split}.json"] for split in ("train", "val")
    ]
    names = "features/train.safetensors, features/val.safetensors, features/train.csv, features/train.json"
    assert f"results saved to {names}, features/val.csv, features/val.json\n" in done.stderr
    assert done.stderr.endswith("next: dino knn --features features\n")
    again = dino("export", "--to", "csv", "--out", "other")
    assert again.stdout == "other/train.csv\nother/val.csv\n"
    names = "other/train.csv, other/train.json, other/val.csv, other/val.json"
    assert again.stderr.endswith(f"results saved to {names}\nnext: dino plot features\n")
    for name in ("train.csv", "val.json"):
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "features" / name).read_bytes()
    one = dino("export", "features/val.safetensors", "--to", "npy", "--json")
    assert json.loads(one.stdout) == {"val": ["features/val.npy", "features/val.rows.csv", "features/val.json"]}
    refused = dino("export", str(start), "--to", "csv", code=1).stderr
    assert f"{start} is a checkpoint; expected features, which --to csv writes" in refused
    assert f"hint: dino extract {start} IMAGES --to csv" in refused
    patches = dino("extract", str(start), "labelled", "--to", "csv", "--tokens", "patches", *options, code=1)
    assert "these features are patch tokens" in patches.stderr
    assert "extract train" not in patches.stderr


def test_an_unknown_tracker_is_a_usage_error(dino: Dino, images: Path) -> None:
    done = dino("pretrain", "images", "--log", "wandbb", code=2)
    assert "--log wandbb is not valid; expected tensorboard, wandb, mlflow, trackio" in done.stderr
    assert "hint: --log wandb\n" in done.stderr


def test_every_command_ends_with_the_next_one(dino: Dino, labelled: Path, start: Path) -> None:
    options = ("--workers", "0", "--device", "cpu")
    dino("extract", str(start), "labelled", *options)
    for words, following in (
        (["extract", str(start), "labelled", "--out", "f", *options], "dino knn --features f"),
        (["extract", str(start), "labelled", "--out", "p", "--tokens", "patches", *options], "dino export p --to npy"),
        (["linear", "--features", "f"], "dino linear --features f --save"),
        (["export", "f", "--to", "csv"], "dino plot f"),
        (["export", str(start), "--to", "official", "--out", "w.pth"], f"dino compare {start} OTHER --on DATA"),
        (["presets"], "dino pretrain IMAGES --preset tiny"),
        (["presets", "show", "vits16"], "dino pretrain IMAGES --preset vits16"),
        (["presets", "show", "high-resolution"], "dino pretrain IMAGES --preset high-resolution --from RUN"),
        (["presets", "backbones", "resnet18*"], "dino pretrain IMAGES --set backbone.name=resnet18"),
        (["doctor", "--device", "cpu"], "dino doctor IMAGES"),
        (["slurm", "extract", str(start), "labelled"], "sbatch FILE, with the script in FILE"),
        (["pretrain", "labelled", "--dry-run", *SMALL], "the same command without --dry-run"),
    ):
        assert dino(*words).stderr.splitlines()[-1] == f"next: {following}"
    advised = dino("doctor", "labelled", "--device", "cpu")
    assert advised.stderr.splitlines()[-1] == f"next: {advised.stdout.splitlines()[-1]}"


def test_images_that_moved_are_named_with_the_option_that_finds_them(dino: Dino, labelled: Path, start: Path) -> None:
    dino("extract", str(start), "labelled", "--workers", "0", "--device", "cpu")
    labelled.rename(labelled.with_name("moved"))
    done = dino("dedup", "--threshold", "0.9999", "--pages", "0")
    assert done.stderr.splitlines()[-2:] == [
        "results saved to dedup/histogram.png", "next: the same command with --data DIR"
    ]  # fmt: skip
    told = dino("curate", "features", "--clusters", "2", "--data", "moved", "--json")
    assert told.stderr.splitlines()[-2:] == ["results saved to curated.txt", "next: dino pretrain curated.txt"]

"""`dino pretrain`: training of a backbone on unlabelled images."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import MACHINE, MONITORING, RECIPE, RUN_FOLDER, SPEED
from dinocli.cli.options import (
    AllSettings,
    Device,
    Json,
    ManyImages,
    Workers,
    compiles,
    decodes,
    note_inside,
    output_place,
    refuse_address,
)
from dinocli.cli.presets import complete_preset
from dinocli.cli.training import (
    Accumulate,
    BatchSize,
    DryRun,
    Graph,
    MonitorEvery,
    Recompute,
    SaveEvery,
    Seed,
    Trackers,
    given_settings,
    parse_saving,
    refuse_images_folder,
    run_plan,
    show_plan,
)
from dinocli.core.distributed import launch, local_size, size, unused_tasks
from dinocli.core.errors import DinoError
from dinocli.method import shipped

if TYPE_CHECKING:
    from dinocli.method.preset import Preset
    from dinocli.weights.feature_teachers import FeatureTeachers
    from dinocli.weights.frozen_teacher import FrozenTeacher

OnCollapse = Literal["stop", "warn"]


def pretrain(
    images: ManyImages,
    preset: Annotated[
        str,
        typer.Option(
            help="Name of a shipped preset (`dino presets` lists them), or a .toml file of your own.",
            autocompletion=complete_preset,
            rich_help_panel=RECIPE,
        ),
    ] = "vits16",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Short for --set training.epochs=N.", rich_help_panel=RECIPE)
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Stop early after N steps. Schedules still span all epochs. 0 writes the untrained network.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    overrides: AllSettings = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="FILE|timm:NAME", help="Initial weights. Default: random.", rich_help_panel=RECIPE),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN|FILE",
            help="A finished run to continue with a stage (gram-refine, high-resolution), in a new run folder.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN|FILE|timm:NAME",
            help="Trained network to use as a frozen teacher; also sets teacher.frozen=true. --preset distill-features "
            "takes any encoder, and several.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: an unfinished run with the same settings, else a new runs/<preset>-<n>.",
            rich_help_panel=RUN_FOLDER,
        ),
    ] = None,
    save_every: SaveEvery = "10min",
    keep: Annotated[
        int, typer.Option(min=1, help="Number of newest saved states to keep.", rich_help_panel=RUN_FOLDER)
    ] = 2,
    milestones: Annotated[
        int | None,
        typer.Option(
            min=1, help="Also save a state every N steps and keep it permanently.", rich_help_panel=RUN_FOLDER
        ),
    ] = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Small folder of images in class folders; during training, measure the teacher's k-NN accuracy on it.",
            rich_help_panel=MONITORING,
        ),
    ] = None,
    monitor_every: MonitorEvery = None,
    on_collapse: Annotated[
        OnCollapse,
        typer.Option(
            help="Action when training collapses (every image gets the same output).", rich_help_panel=MONITORING
        ),
    ] = "warn",
    log: Trackers = None,
    report: Annotated[
        bool, typer.Option(help="Write report.html and curves.png into the run folder.", rich_help_panel=MONITORING)
    ] = True,
    accumulate: Accumulate = 1,
    recompute: Recompute = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the transformer blocks and a GPU's augmentation (about a minute to start). Default: on CUDA.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    decode: Annotated[
        Literal["cpu", "gpu"],
        typer.Option(
            help="Decode JPEGs in the workers, or on the GPU, which then cuts their crops too.", rich_help_panel=SPEED
        ),
    ] = "cpu",
    graph: Graph = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="ram|DIR",
            help="Cache decoded images for later epochs, in memory or in a folder, if they fit.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    cache_teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Store the teachers' features of fixed views once (views.fixed), and read them back in every step.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        typer.Option(
            help="`ddp` replicates the model in every process; `fsdp` shards it, for large backbones.",
            rich_help_panel=SPEED,
        ),
    ] = "ddp",
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train on N CUDA devices of this machine; each gets a part of every batch.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    workers: Workers = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a vision transformer on a folder of images with DINO.

    Examples:
        dino pretrain ./images --preset tiny --dry-run
        dino pretrain ./images --epochs 100 --batch-size 256 --monitor ./labelled
        dino pretrain ./photos:0.7 ./drawings:0.3
        dino pretrain ./images --from runs/vits16-1 --preset gram-refine
    """
    out = out and output_place(out)
    teachers = teacher or []
    sources = [(init, "--init"), (origin, "--from"), (monitor, "--monitor")]
    for value, option in [*sources, *((source, "--teacher") for source in teachers)]:
        refuse_address(value or "", option, "a local path" + " or timm:NAME" * (option in ("--init", "--teacher")))
    _refuse_names(init, teachers)
    if init and origin:
        raise DinoError(
            f"--from {origin} and --init {init} are two starts of one run",
            f"--from {origin} continues a run with its heads and optimizer; --init starts a new one from a backbone",
        )
    for each in images:
        refuse_images_folder(out, each)
    cache = _check_cache(cache)
    cache_teacher = cache_teacher and output_place(cache_teacher, "--cache-teacher")
    given = given_settings(epochs, batch_size, seed, overrides)
    if (tasks := unused_tasks()) > 1 and not gpus:
        console.say(f"note: SLURM gave this job {tasks} tasks, but this command runs in one process; see --gpus")
    if gpus and not dry_run and _launch(gpus, device):
        return

    from dinocli.data.sources.open import within
    from dinocli.data.sources.several import open_sources

    source = open_sources(images)  # before torch is loaded, so that a wrong path or name fails at once
    if not preset.endswith(".toml"):
        shipped.text(preset)

    from dinocli.method.preset import load_preset
    from dinocli.train.origin import Origin
    from dinocli.train.plan import start_clock
    from dinocli.train.prepare import prepare

    before = Origin.read(origin) if origin else None
    changed = [*(overrides or []), *given, *(["teacher.frozen=true"] if teachers else [])]
    run = (before.preset, before.peak_lr, before.clock) if before else ()
    loaded = load_preset(preset, changed, *run)
    source = within(source, loaded.images)
    console.notes(source.notes)
    total = start_clock(loaded, source.count).total
    if steps and steps > total:
        console.say(f"note: --steps {steps} is more than the run's {total} steps; it ends after {total}; see --epochs")
    plan = prepare(
        Path(preset).name.removesuffix(".toml").removesuffix(".stage"),
        loaded,
        source,
        steps=steps,
        out=out,
        device=device,
        workers=workers,
        init=init,
        teacher=_read_teachers(teachers, loaded),
        origin=before,
        teacher_cache=cache_teacher,
        cache=cache,
        decode=decode,
        accumulate=accumulate,
        saving=parse_saving(save_every, keep, milestones),
        on_collapse=on_collapse,
        monitor=monitor,
        monitor_every=monitor_every,
        parallel=parallel,
        trackers=tuple(log or ()),
        report=report,
        recompute=recompute,
        graph=graph,
    )
    plan = replace(plan, compiled=plan.device.type == "cuda" if compiled is None else compiled)
    note_inside(plan.out, *images)
    if dry_run:
        show_plan(plan, json)
    else:
        run_plan(
            replace(
                plan,
                compiled=plan.compiled and compiles(plan.device, asked=compiled is True),
                decode="gpu" if decode == "gpu" and decodes(plan.device) else "cpu",
            ),
            json,
        )


def _read_teachers(sources: list[str], preset: Preset) -> FrozenTeacher | FeatureTeachers | None:
    """Read the teachers of --teacher: encoders if the preset compares features, else one network with heads.

    Raises:
        DinoError: If one cannot be read, or several teach a preset that compares the outputs of heads.
    """
    from dinocli.weights.feature_teachers import FeatureTeachers
    from dinocli.weights.frozen_teacher import FrozenTeacher

    if not sources:
        return None
    if preset.losses.features:
        return FeatureTeachers.read(sources, console.say)
    if len(sources) > 1:
        raise DinoError(
            f"--teacher is set {len(sources)} times; a preset with heads takes one teacher",
            "--preset distill-features takes several, or keep one --teacher",
        )
    return FrozenTeacher.read(sources[0])


def _refuse_names(init: str | None, teachers: list[str]) -> None:
    """Refuse a bare model name for --init, and a preset's name for --teacher.

    Raises:
        DinoError: If one is given.
    """
    weights = (".pth", ".pt", ".safetensors")
    named = init if init and re.fullmatch(r"[a-z]\w*(\.\w+)?", init) and not init.endswith(weights) else None
    if named and not Path(named).exists():
        raise DinoError(f"--init {init} does not exist here", f"use --init timm:{init} for a model of timm, or a path")
    for teacher in teachers:
        if teacher in shipped.names() and not Path(teacher).exists():
            trained = f"dino pretrain IMAGES --preset {teacher}, then --teacher runs/{teacher}-1"
            raise DinoError(f"--teacher {teacher} is a preset; expected a trained run", f"train it first: {trained}")


def _check_cache(given: str | None) -> str | None:
    if given is None or given.lower() == "ram":
        return given and "ram"
    return str(output_place(Path(given), "--cache"))


def _launch(gpus: int, device: str) -> bool:
    """Start one process per GPU, and return True if they completed the run; False if this process must train.

    Raises:
        DinoError: If there are too few CUDA devices, --device is not CUDA, or the number of started processes differs.
    """
    if size() > 1:
        if gpus != local_size():
            raise DinoError(f"--gpus {gpus} differs from the {local_size()} processes started", "remove --gpus")
        return False
    import torch

    count = torch.cuda.device_count()
    if count < gpus or not device.startswith(("auto", "cuda")):
        several = "torchrun --nproc-per-node N -m dinocli pretrain ... --device cpu"
        raise DinoError(
            f"--gpus {gpus} is more than the {count} CUDA devices of this machine"
            if count < gpus
            else f"--gpus {gpus} needs CUDA devices; --device is {device}",
            f"--gpus {count}" if count else f"remove --gpus; several processes on CPUs: {several}",
        )
    if gpus > 1 and (code := launch(gpus)):
        raise typer.Exit(code)
    return gpus > 1

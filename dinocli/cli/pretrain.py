"""`dino pretrain`: training of a backbone on unlabelled images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import MACHINE, MONITORING, OUTPUT, RECIPE, RUN_FOLDER, SPEED
from dinocli.cli.options import (
    AllSettings,
    Device,
    Images,
    Json,
    Workers,
    compiles,
    output_place,
    refuse_address,
    step_of,
)
from dinocli.cli.presets import complete_preset
from dinocli.core.distributed import from_first, launch, local_size, rank, size, unused_tasks
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, link_newest, next_folder, runs_of
from dinocli.method import shipped

if TYPE_CHECKING:
    from dinocli.method.preset import Preset
    from dinocli.train.cost import Estimate
    from dinocli.train.plan import Plan, Saving
    from dinocli.weights.feature_teachers import FeatureTeachers
    from dinocli.weights.frozen_teacher import FrozenTeacher

OnCollapse = Literal["stop", "warn"]


def pretrain(
    images: Images,
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
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Short for --set training.batch_size=N.", rich_help_panel=RECIPE)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Short for --set training.seed=N.", rich_help_panel=RECIPE)
    ] = None,
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
    save_every: Annotated[
        str,
        typer.Option(
            metavar="TIME|STEPS",
            help="Time or steps between saved states: 90s, 10min, 2h, or 500.",
            rich_help_panel=RUN_FOLDER,
        ),
    ] = "10min",
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
    monitor_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between k-NN evaluations. Default: chosen so that they take at most 5 % of the time.",
            rich_help_panel=MONITORING,
        ),
    ] = None,
    on_collapse: Annotated[
        OnCollapse,
        typer.Option(
            help="Action when training collapses (every image gets the same output).", rich_help_panel=MONITORING
        ),
    ] = "warn",
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Also write the metrics for TensorBoard, into the run folder.",
            rich_help_panel=MONITORING,
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Write report.html and curves.png into the run folder.", rich_help_panel=MONITORING)
    ] = True,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Split each batch into N parts and accumulate their gradients, to save memory.",
            rich_help_panel=SPEED,
        ),
    ] = 1,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Activation checkpointing: less memory for about a third more compute.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the transformer blocks and hue jitter with torch.compile (about a minute to start). Default: "
            "on CUDA.",
            rich_help_panel=SPEED,
        ),
    ] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and train nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
) -> None:
    """Train a vision transformer on a folder of images with DINO.

    Examples:
        dino pretrain ./images --preset tiny --dry-run
        dino pretrain ./images --epochs 100 --batch-size 256 --monitor ./labelled
        dino pretrain ./images --from runs/vits16-1 --preset gram-refine
    """
    out = out and output_place(out)
    teachers = teacher or []
    sources = [(images, "IMAGES"), (init, "--init"), (origin, "--from"), (monitor, "--monitor")]
    for value, option in [*sources, *((source, "--teacher") for source in teachers)]:
        refuse_address(value or "", option, "a local path" + " or timm:NAME" * (option in ("--init", "--teacher")))
    _refuse_names(init, teachers)
    if init and origin:
        raise DinoError(
            f"--from {origin} and --init {init} are two starts of one run",
            f"--from {origin} continues a run with its heads and optimizer; --init starts a new one from a backbone",
        )
    if out and Path(images).is_dir() and out.resolve() == Path(images).resolve():
        raise DinoError(f"--out {out} is the folder of the images", f"use --out runs/{out.resolve().name}")
    cache = _check_cache(cache)
    cache_teacher = cache_teacher and output_place(cache_teacher, "--cache-teacher")
    short = {"training.epochs": epochs, "training.batch_size": batch_size, "training.seed": seed}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    _refuse_two_values(given, overrides or [])
    if (tasks := unused_tasks()) > 1 and not gpus:
        console.say(f"note: SLURM gave this job {tasks} tasks, but this command runs in one process; see --gpus")
    if gpus and not dry_run and _launch(gpus, device):
        return

    from dinocli.data.sources.open import open_source

    source = open_source(images)  # before torch is loaded, so that a wrong path or name fails at once
    console.notes(source.notes)
    if not preset.endswith(".toml"):
        shipped.text(preset)

    from dinocli.core.device import default_workers, pick_device
    from dinocli.method.preset import load_preset
    from dinocli.train.origin import Origin
    from dinocli.train.plan import Plan, start_clock
    from dinocli.train.resume import unfinished

    before = Origin.read(origin) if origin else None
    changed = [*(overrides or []), *given, *(["teacher.frozen=true"] if teachers else [])]
    loaded = load_preset(preset, changed, before.preset, before.peak_lr) if before else load_preset(preset, changed)
    frozen = _read_teachers(teachers, loaded)
    same = (loaded, source.fingerprint, init, frozen.fingerprint if frozen else None)
    total = start_clock(loaded, source.count).total
    if steps and steps > total:
        console.say(f"note: --steps {steps} is more than the run's {total} steps; it ends after {total}; see --epochs")
    picked = pick_device(device)
    name = Path(preset).name.removesuffix(".toml").removesuffix(".stage")
    stop = total if steps is None else min(steps, total)
    plan = Plan(
        name=name,
        preset=loaded,
        source=source,
        stop=stop,
        out=from_first(
            out or unfinished(runs_of(name), same, stop, before.stages if before else ()) or next_folder(name)
        ),
        device=picked,
        workers=default_workers(picked) if workers is None else workers,
        init=init,
        teacher=frozen,
        teacher_cache=cache_teacher,
        cache=cache,
        accumulate=accumulate,
        saving=_parse_saving(save_every, keep, milestones),
        on_collapse=on_collapse,
        monitor=monitor,
        monitor_every=monitor_every,
        parallel=parallel,
        tensorboard=tensorboard,
        report=report,
        compiled=picked.type == "cuda" if compiled is None else compiled,
        recompute=recompute,
        origin=before,
    )
    if dry_run:
        from dinocli.train.pretrain import rehearse

        rehearse(plan, console.say)
        for line in _list_notes(plan, begun=False):
            console.say(f"note: {line}")
        _print_plan(plan, json)
    else:
        _run(replace(plan, compiled=plan.compiled and compiles(picked, asked=compiled is True)), json)


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


def _refuse_two_values(given: list[str], overrides: list[str]) -> None:
    """Refuse different values for one key from an option and from --set.

    Raises:
        DinoError: If the values differ.
    """
    keyed = {key.strip(): value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    for key, _, value in (one.partition("=") for one in given):
        if keyed.get(key, value) != value:
            option = f"--{key.rpartition('.')[2].replace('_', '-')} {value}"
            raise DinoError(f"{option} and --set {key}={keyed[key]} are two values for one key", f"keep one: {option}")


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


def _parse_saving(every: str, keep: int, milestones: int | None) -> Saving:
    from dinocli.train.plan import Saving

    units = {"s": 1, "min": 60, "h": 3600}
    found = re.fullmatch(r"([1-9]\d*)\s*(s|min|h|)", every.strip())
    if not found:
        raise DinoError(
            f"--save-every {every!r} is invalid; expected a time or a number of steps", "--save-every 10min"
        )
    amount, unit = int(found[1]), found[2]
    if unit:
        return Saving(seconds=amount * units[unit], keep=keep, milestones=milestones)
    return Saving(seconds=None, steps=amount, keep=keep, milestones=milestones)


def _print_plan(plan: Plan, json: bool) -> None:
    from dinocli.core.resources import memory_of
    from dinocli.train.cost import estimate, to_fit
    from dinocli.train.plan import peak_lr

    preset, clock, cost = plan.preset, plan.clock, estimate(plan)
    free, _ = memory_of(plan.device)
    fits = cost.fits(free)
    less = None if fits else to_fit(lambda again: estimate(replace(plan, recompute=again, accumulate=1)), free)
    networks = f"{cost.backbone_parameters / 1e6:.1f} M parameters, {cost.parameters / 1e6:.1f} M with heads"
    steps = f"{plan.stop} of {clock.total}" if plan.stop < clock.total else f"{plan.stop}"
    rows = {
        "images": f"{plan.source.count or 'an unknown number'} in {plan.source.where}",
        "backbone": f"{preset.backbone.name}, {networks}",
        "views": _format_views(plan),
        "batch": f"{preset.training.batch_size} images"
        + (f", {plan.images_each} in each of {size()} processes" if size() > 1 else "")
        + (f", in {plan.accumulate} parts" if plan.accumulate > 1 else "")
        + (", activation checkpointing" if plan.recompute else ""),
        "steps": f"{steps}, {clock.steps_per_epoch} per epoch, {clock.epochs} epochs",
        "learning rate": f"up to {peak_lr(plan):.3g} for this batch ({preset.optimizer.kind})",
        "device": f"{plan.device}, {plan.workers} workers",
        "start": plan.origin.describe(preset) if plan.origin else plan.init or "random weights",
        **({"teacher": f"{plan.teacher.describe(preset)}, frozen"} if plan.teacher else {}),
        "out": str(plan.out),
        "compute": f"{cost.flops / 1e9:.3g} GFLOP per image",
        "memory": f"about {console.size(cost.memory)} (an estimate); {console.size(free)} are free: "
        + ("it fits" if fits else "it does not fit" + _format_alternative(less)),
        "time": f"about {console.duration(cost.seconds)} (estimated from the speed of matrix products on this device)",
    }
    if json:
        numbers = {
            "images": plan.source.count,
            "steps": plan.stop,
            "schedule_steps": clock.total,
            "peak_lr": peak_lr(plan),
        }
        memory = {"memory": cost.memory, "free": free, "fits": fits, "instead": less and less[0]}
        console.out_json(numbers | asdict(cost) | memory | {"out": str(plan.out), "device": str(plan.device)})
        return
    console.table(["plan", plan.name], [[name, value] for name, value in rows.items()])


def _format_views(plan: Plan) -> str:
    """Format the number and the size of the views, with the epochs of each size if it changes."""
    low, words = plan.preset.views.low_resolution, []
    for views in plan.preset.views.variants:
        local = f" + {views.locals}x{views.local.size}" if views.local else ""
        words.append(f"{len(views.globals)}x{views.global_1.size}{local}")
    if mixes := plan.preset.views.mixes:
        return ", ".join(f"{word} in {share:.0%} of the steps" for word, (share, _) in zip(words, mixes, strict=True))
    return f" for {low.epochs} of {plan.clock.epochs} epochs, then ".join(words) if low else words[0]


def _format_alternative(less: tuple[dict[str, str], Estimate] | None) -> str:
    if less is None:
        return ", not even with one image at a time: use a smaller backbone, or --parallel fsdp over several GPUs"
    typed, cost = less
    words = " ".join(word for pair in typed.items() for word in pair if word)
    return f"; {words} takes about {console.size(cost.memory)}"


def _list_notes(plan: Plan, *, begun: bool) -> Iterator[str]:
    """Yield the notes to print before a run. A resumed run (`begun`) omits those printed at its start."""
    from dinocli.apps.doctor.inspection import warn_of
    from dinocli.train.plan import cautions, short_stop
    from dinocli.train.teacher_cache import check_space, describe

    if plan.preset.views.low_resolution:
        yield f"views of {_format_views(plan)}: later steps take longer"
    if facts := check_space(plan):
        yield describe(facts)
    if not begun:
        yield from warn_of(plan.source, plan.preset.images) if rank() == 0 else ()
        yield from cautions(plan)
        if plan.init and not plan.monitor:
            yield "no --monitor set: forgetting of the initial weights will go unnoticed"
    if line := short_stop(plan):
        yield line


def _run(plan: Plan, json: bool) -> None:
    from dinocli.train.pretrain import pretrain
    from dinocli.train.state import saved_states

    count, size = plan.source.count, plan.preset.training.batch_size
    images = f"{count} images" if count else "a stream of images"
    console.say(f"{plan.name}: {images}, {plan.stop} steps of {size} on {plan.device}, into {plan.out}")
    begun = any(True for _ in saved_states(plan.out))
    for line in _list_notes(plan, begun=begun):
        console.say(f"note: {line}")
    with console.progress("pretrain", plan.stop, "steps") as advance:
        run = pretrain(plan, lambda progress: advance(progress.step, progress.note), console.say)
    linked = _link(run.checkpoint, unfinished=run.step < plan.clock.total)
    if run.fresh_heads:
        console.say(f"note: the backbone starts from {plan.init}; new heads: {', '.join(run.fresh_heads)}")
    if run.bad.reasons:
        console.say(
            f"note: {len(run.bad.reasons)} images could not be read and were replaced by others: {run.bad.summary()}; "
            f"they are listed in {run.folder / 'bad_images.txt'}"
        )
    if run.cached is not None:
        console.say(f"note: the cache held {run.cached} of {count} images")
    if run.skipped:
        console.say(f"note: skipped {run.skipped} steps whose loss or gradient was not finite")
    loss = f", loss {run.loss:.3f}" if run.loss is not None else ""
    if run.stopped:
        console.say(f"stopped at step {run.step} of {plan.stop}{loss}; saved; run the same command to resume")
    elif run.step > run.began or not run.step:
        before = f", after {run.began} before" if run.began else ""
        console.say(f"done: {run.step - run.began} steps in {console.duration(run.seconds)}{before}{loss}")
    console.say(f"next: dino extract {run.checkpoint.name if linked else run.checkpoint} DATA")
    if json:
        console.out_json(
            {
                "checkpoint": str(run.checkpoint),
                "steps": run.step,
                "stopped": run.stopped,
                "loss": run.loss,
                "seconds": run.seconds,
                "bad_images": len(run.bad.reasons),
            }
        )
    else:
        console.out(str(run.checkpoint))


def _link(checkpoint: Path, *, unfinished: bool) -> bool:
    """Link `./ckpt.safetensors` to a run's weights, and print a note if the link changes or cannot change.

    An unfinished run of fewer steps does not replace the link to a longer run.

    Returns:
        True if the link now points to the run.
    """
    if rank() > 0:
        return True
    link = Path(CHECKPOINT)
    target = link.readlink() if link.is_symlink() and link.exists() else None
    other = target is not None and link.resolve() != checkpoint.resolve()
    before, now = (step_of(path) or 0 for path in (link if other else checkpoint, checkpoint))
    if other and unfinished and before > now:
        console.say(
            f"note: ./{link} still points to {target} (step {before}), which was trained longer than {checkpoint} "
            f"(step {now})"
        )
        return False
    if not link_newest(checkpoint):
        console.say(f"note: ./{link} was not changed: it is not a link to a run, or it is not writable")
        return False
    if other:
        console.say(f"note: ./{link} now points to {checkpoint} (step {now}); before: {target} (step {before})")
    return True

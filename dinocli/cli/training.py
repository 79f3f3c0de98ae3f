"""Training on the command line: the plan, the notes before a run, its progress and its result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import MONITORING, OUTPUT, RECIPE, RUN_FOLDER, SPEED
from dinocli.cli.options import step_of
from dinocli.cli.words import Misuse
from dinocli.core.distributed import rank, size
from dinocli.core.errors import DinoError, nearest
from dinocli.core.resources import format_bytes
from dinocli.core.runs import CHECKPOINT, link_newest

if TYPE_CHECKING:
    from dinocli.train.cost import Estimate
    from dinocli.train.plan import Plan, Saving
    from dinocli.train.pretrain import Run
    from dinocli.weights.starting_point import StartingPoint


_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Short for --set training.batch_size=N.", rich_help_panel=RECIPE)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Short for --set training.seed=N.", rich_help_panel=RECIPE)]
Steps = Annotated[
    int | None,
    typer.Option(min=0, help="Stop early after N steps. Schedules still span all epochs.", rich_help_panel=RECIPE),
]
SaveEvery = Annotated[
    str,
    typer.Option(
        metavar="TIME|STEPS",
        help="Time or steps between saved states: 90s, 10min, 2h, or 500.",
        rich_help_panel=RUN_FOLDER,
    ),
]
MonitorEvery = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between evaluations. Default: chosen to take at most 5 % of the time, if the run is long enough.",
        rich_help_panel=MONITORING,
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(
        min=1,
        help="Split each batch into N parts and accumulate their gradients, to save memory. BatchNorm and KoLeo "
        "see one part at a time.",
        rich_help_panel=SPEED,
    ),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        help="Activation checkpointing: less memory for about a third more compute.",
        rich_help_panel=SPEED,
    ),
]
Graph = Annotated[
    bool | None,
    typer.Option(
        "--graph/--no-graph",
        help="Replay steps as CUDA graphs, which helps if kernel launches limit the speed. Default: on CUDA, in one "
        "process without --accumulate and --recompute.",
        rich_help_panel=SPEED,
    ),
]


def _check_trackers(names: list[str] | None) -> list[str] | None:
    """Check the names of --log, since typer knows no list of choices.

    Raises:
        Misuse: If one is unknown.
    """
    for name in names or ():
        if name not in _TRACKERS:
            raise Misuse(
                f"--log {name} is not valid; expected {', '.join(_TRACKERS)}", f"--log {nearest(name, _TRACKERS)}"
            )
    return names and list(dict.fromkeys(names))


Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="|".join(_TRACKERS),
        callback=_check_trackers,
        help="Also send figures, curves and pictures to an experiment tracker; may be repeated.",
        rich_help_panel=MONITORING,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.", rich_help_panel=OUTPUT)]


def given_settings(
    epochs: int | None, batch_size: int | None, seed: int | None, overrides: Sequence[str] | None
) -> list[str]:
    """Return the settings of --epochs, --batch-size and --seed, as for --set.

    Raises:
        DinoError: If --set has another value for one of them.
    """
    short = {"training.epochs": epochs, "training.batch_size": batch_size, "training.seed": seed}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    _refuse_two_values(given, overrides or [])
    return given


def refuse_images_folder(out: Path | None, images: str) -> None:
    """Refuse the folder of the images as run folder.

    Raises:
        DinoError: If `out` is that folder.
    """
    if out and Path(images).is_dir() and out.resolve() == Path(images).resolve():
        raise DinoError(f"--out {out} is the folder of the images", f"use --out runs/{out.resolve().name}")


def starting_point(source: str, overrides: Sequence[str] | None) -> StartingPoint:
    """Read the weights of --from, with notes on a download and on assumptions.

    Raises:
        DinoError: If the weights cannot be read, or take images with other channels than --set says.
    """
    from dinocli.weights.load import announcement
    from dinocli.weights.starting_point import read_starting_point, refuse_other_channels

    if line := announcement(source):
        console.say(line)
    start = read_starting_point(source, overrides or [])
    console.notes(start.notes)
    own = [override for override in overrides or [] if override.startswith("images.")]
    refuse_other_channels(start, start.images.changed(own, for_training=True).channels)
    return start


def show_plan(plan: Plan, json: bool) -> None:
    """Make the checks of a real run, and print the plan; nothing is written.

    Raises:
        DinoError: If a real run would fail before its first step.
    """
    from dinocli.train.pretrain import rehearse

    rehearse(plan, console.say)
    for line in list_notes(plan, begun=False):
        console.say(f"note: {line}")
    _print_plan(plan, json)
    console.saved([], "the same command without --dry-run")


def _refuse_two_values(given: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse different values for one key from an option and from --set.

    Raises:
        DinoError: If the values differ.
    """
    keyed = {key.strip(): value.strip() for key, _, value in (override.partition("=") for override in overrides)}
    for key, _, value in (one.partition("=") for one in given):
        if keyed.get(key, value) != value:
            option = f"--{key.rpartition('.')[2].replace('_', '-')} {value}"
            raise DinoError(f"{option} and --set {key}={keyed[key]} are two values for one key", f"keep one: {option}")


def parse_saving(every: str, keep: int, milestones: int | None) -> Saving:
    """Return the schedule of a run's states from --save-every, --keep and --milestones.

    Raises:
        DinoError: If --save-every is neither a time nor a number of steps.
    """
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
    """Print a plan with its estimated cost, as a table or as JSON."""
    from dinocli.core.resources import memory_of
    from dinocli.train.cost import estimate, to_fit
    from dinocli.train.plan import peak_lr

    preset, clock, cost = plan.preset, plan.clock, estimate(plan)
    free, _ = memory_of(plan.device)
    fits = cost.fits(free)
    less = (
        None if fits else to_fit(lambda again: estimate(replace(plan, recompute=again, accumulate=1, graph=None)), free)
    )
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
        "memory": f"about {format_bytes(cost.memory)} (an estimate); {format_bytes(free)} are free: "
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
    return f"; {words} takes about {format_bytes(cost.memory)}"


def list_notes(plan: Plan, *, begun: bool) -> Iterator[str]:
    """Yield the notes to print before a run. A resumed run (`begun`) omits those printed at its start."""
    from dinocli.apps.doctor.inspection import warn_of
    from dinocli.train.plan import cautions, short_stop
    from dinocli.train.teacher_cache import check_space, describe

    if (wanted := plan.preset.training.precision) != plan.precision:
        scaled = " with loss scaling" * (plan.precision == "float16")
        yield f"{plan.device} has no native {wanted}: training in {plan.precision}{scaled}"
    if plan.preset.views.low_resolution:
        yield f"views of {_format_views(plan)}: later steps take longer"
    if facts := check_space(plan):
        yield describe(facts)
    if not begun:
        yield from warn_of(plan.source, plan.preset.images) if rank() == 0 else ()
        yield from dict.fromkeys(cautions(plan))  # two heads may have the same one
        if plan.init and not plan.monitor and plan.labels is None:
            yield "no --monitor set: forgetting of the initial weights will go unnoticed"
    if line := short_stop(plan):
        yield line


def run_plan(plan: Plan, json: bool, after: Callable[[Run], dict[str, Any]] = lambda run: {}) -> None:
    """Train, with notes, progress and the result.

    Args:
        plan: Settings of the run.
        json: Print the result as JSON.
        after: Function called when the training ends. Its result is added to the JSON.
    """
    from dinocli.train.pretrain import pretrain
    from dinocli.train.state import saved_states

    count, size = plan.source.count, plan.preset.training.batch_size
    images = f"{count} images" if count else "a stream of images"
    console.say(f"{plan.name}: {images}, {plan.stop} steps of {size} on {plan.device}, into {plan.out}")
    begun = any(True for _ in saved_states(plan.out))
    for line in list_notes(plan, begun=begun):
        console.say(f"note: {line}")
    with console.progress(
        plan.name if plan.keep_best or plan.labels is not None else "pretrain", plan.stop, "steps"
    ) as advance:
        run = pretrain(plan, lambda progress: advance(progress.step, progress.note), console.say)
    more = after(run)
    # The weights to fine-tune are often ./ckpt.safetensors itself, and the next run must not start from this one's.
    linked = plan.labels is None and _link(run.checkpoint, unfinished=run.step < plan.clock.total)
    if run.fresh_heads and plan.labels is None:
        console.say(f"note: the backbone starts from {plan.init}; new heads: {', '.join(run.fresh_heads)}")
    if run.bad.reasons:
        console.say(
            f"note: {len(run.bad.reasons)} images could not be read and were replaced by others: {run.bad.summary()}; "
            f"they are listed in {run.folder / 'bad_images.txt'}"
        )
    if run.cached is not None:
        console.say(f"note: the cache held {run.cached} of {count} images")
    if run.on_device is not None:
        console.say(f"note: the GPU decoded {run.on_device:.0%} of the images, the workers the rest")
    if run.skipped:
        expected = "; a few are normal in float16" * (plan.precision == "float16")
        console.say(f"note: skipped {run.skipped} steps whose loss or gradient was not finite{expected}")
    loss = f", loss {run.loss:.3f}" if run.loss is not None else ""
    if run.stopped:
        console.say(f"stopped at step {run.step} of {plan.stop}{loss}; saved; run the same command to resume")
    elif run.step > run.began or not run.step:
        before = f", after {run.began} before" if run.began else ""
        console.say(f"done: {run.step - run.began} steps in {console.duration(run.seconds)}{before}{loss}")
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
            | more
        )
    else:
        console.out(str(run.checkpoint))
    following = ""
    if plan.labels is None:
        following = f"dino extract {run.checkpoint.name if linked else run.checkpoint} DATA"
    elif "classifier" in more:
        following = f"dino classify IMAGES --with {more['classifier']}"
    console.saved([run.folder, *(more[key] for key in ("predictions", "confusion") if key in more)], following)


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

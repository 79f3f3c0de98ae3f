"""`dino doctor`: a check of the machine and the images, and recommended settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD
from dinocli.cli.options import Device, Json, Limits
from dinocli.cli.places import images_place
from dinocli.core.errors import DinoError
from dinocli.core.resources import format_bytes

if TYPE_CHECKING:
    import torch

    from dinocli.apps.doctor.advice import Advised
    from dinocli.apps.doctor.inspection import Inspection, Spread
    from dinocli.apps.doctor.machine import Machine
    from dinocli.data.sources.open import Source
    from dinocli.data.views.crops import ViewsConfig
    from dinocli.method.preset import Preset
    from dinocli.train.cost import Estimate


_LONG = 40  # characters of a file name in the table


def doctor(
    images: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGES",
            callback=images_place,
            help="Images, as for `dino pretrain`. Default: check only the machine.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, help="Number of images to decode; all if there are fewer.", rich_help_panel=METHOD)
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.", rich_help_panel=METHOD)] = 0,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Minutes of one core to spend, on a CPU: choose preset and epochs from measured runs.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    overrides: Limits = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Check the machine and the images, and print the recommended command; change nothing.

    Examples:
        dino doctor
        dino doctor ./images --sample 500
        dino doctor ./images --minutes 10
    """
    source = None
    if images is not None:
        from dinocli.data.sources.open import open_source

        source = open_source(images)  # before torch is loaded, so that a wrong path fails at once
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise DinoError(
            f"torch cannot be loaded: {error}", "pip install --force-reinstall torch torchvision"
        ) from error

    from dinocli.apps.doctor.machine import look_at_machine
    from dinocli.core.device import pick_device

    picked = pick_device(device)
    machine = look_at_machine(picked)
    seen, advised = None, None
    if source:
        seen, advised = _inspect(source, machine, picked, sample, seed, minutes, overrides or [])
    if json:
        advice = asdict(advised) if advised else {}
        console.out_json({"machine": asdict(machine), "images": asdict(seen) if seen else None} | advice)
    else:
        console.table(["machine", ""], _machine_rows(machine))
        if seen and advised:
            from dinocli.method.preset import load_preset

            console.table(["images", seen.where], _image_rows(seen, load_preset("tiny").views))
            _print_advice(advised)
    for fault, remedy in machine.faults.items():
        console.error(fault, remedy)
    if machine.faults:
        raise typer.Exit(1)
    if not source:
        console.saved([], "dino doctor IMAGES")
    elif advised and advised.command:
        console.saved([], advised.command)


def _inspect(
    source: Source,
    machine: Machine,
    device: torch.device,
    sample: int,
    seed: int,
    minutes: float | None,
    overrides: list[str],
) -> tuple[Inspection, Advised]:
    from dinocli.apps.doctor.advice import advise
    from dinocli.apps.doctor.inspection import inspect
    from dinocli.data.images import DEFAULTS
    from dinocli.data.sources.open import within
    from dinocli.train.cost import estimate
    from dinocli.train.plan import Plan

    images = DEFAULTS.changed(overrides, for_training=True)  # for the command that it suggests
    source = within(source, images)
    console.notes(source.notes)
    total = sample if source.count is None else min(sample, source.count)
    with console.progress("inspect", total, "images") as advance:
        seen = inspect(source, images=images, sample=sample, seed=seed, report=advance)

    def cost(preset: Preset, steps: int, again: bool) -> Estimate:
        return estimate(Plan("doctor", preset, source, steps, Path(), device, 0, None, recompute=again))

    return seen, advise(machine, seen, cost, overrides, minutes)


def _machine_rows(machine: Machine) -> list[list[str]]:
    versions = {"torchvision": machine.torchvision, "timm": machine.timm, "Python": machine.python}
    rest = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    several = f"{machine.devices} x " if machine.devices > 1 else ""
    jpeg = "" if machine.fast_jpeg else "; JPEG with Pillow, 12 % slower than with torchvision"
    device = f"{machine.device}: {several}{machine.name}"
    if not machine.on_cpu:
        device += f", {_format_part(machine.memory, machine.memory_there)} free"
    faults = len(machine.faults)
    passed = "matrix product, training step, decoders: passed"
    return [
        ["torch", f"{machine.torch}, {rest}"],
        ["device", device],
        [
            "cores, RAM",
            f"{machine.cores} of {machine.cores_there}; {_format_part(machine.ram, machine.ram_there)} free",
        ],
        ["disk", f"{format_bytes(machine.disk)} free in {machine.folder}"],
        ["reads", ", ".join(machine.formats) + jpeg],
        ["checks", passed if not faults else f"{faults} fault{'s' if faults > 1 else ''}, listed below"],
    ]


def _format_part(part: float, whole: float) -> str:
    return f"{part / 1e9:.1f} of {format_bytes(whole)}"


def _image_rows(seen: Inspection, views: ViewsConfig) -> list[list[str]]:
    count = "an unknown number of images" if seen.count is None else f"{seen.count:,} images"
    labels = f"in {seen.classes} class{'es' if seen.classes > 1 else ''}" if seen.classes else "without labels"
    drawn = "all checked" if seen.whole else f"{seen.drawn:,} checked"
    rows = [["count", f"{count} {labels}; {drawn}"]]
    if seen.read:
        kinds = ", ".join(f"{name} {number:,}" for name, number in seen.formats.items())
        rows += [
            ["formats", kinds],
            ["width", _format_spread(seen.width)],
            ["height", _format_spread(seen.height)],
            ["long / short", _format_spread(seen.aspect, ".2g")],
            ["special", f"{seen.gray} grey, {seen.deep} deeper than 8 bits, {seen.flat} of one color"],
            ["mean", _format_beside_preset(seen.mean, views.mean)],
            ["std", _format_beside_preset(seen.std, views.std)],
            ["equal", _format_duplicates(seen)],
        ]
    return [*rows, ["unreadable", _format_unreadable(seen)]]


def _format_spread(spread: Spread, form: str = ".0f") -> str:
    least, low, median, high, most = (format(number, form) for number in astuple(spread))
    return least if least == most else f"median {median}, 90 % in {low} to {high}, all in {least} to {most}"


def _format_beside_preset(values: Sequence[float], preset: Sequence[float]) -> str:
    """Format a number per channel, followed by the preset's if it has the same number of channels."""
    return _format_numbers(values) + (
        f" (the preset's: {_format_numbers(preset)})" if len(values) == len(preset) else ""
    )


def _format_numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}".removeprefix("0") for value in values)


def _format_duplicates(seen: Inspection) -> str:
    such = "".join(f", such as {_shorten(pair.first)} and {_shorten(pair.second)}" for pair in seen.pairs[:1])
    words = f"{seen.copies} copies, {seen.near} near-equal{such}"
    twins = seen.copies + seen.near
    if seen.whole or not twins or seen.count is None:
        return words
    # A pair is found only if both its images are in the sample, hence the square.
    return f"{words}; about {float(f'{twins * (seen.count / seen.drawn) ** 2:.1g}'):,.0f} pairs in all"


def _format_unreadable(seen: Inspection) -> str:
    if not seen.bad:
        return "none"
    kinds = Counter(reason.split(":")[0] for reason in seen.bad.values()).most_common(4)
    such = {reason.split(":")[0]: name for name, reason in reversed(seen.bad.items())}
    return "; ".join(f"{number} {kind}, such as {_shorten(such[kind])}" for kind, number in kinds)


def _shorten(name: str) -> str:
    """Replace unprintable characters of a file name, and keep only the end of a long one."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= _LONG else f"...{shown[3 - _LONG :]}"


def _print_advice(advised: Advised) -> None:
    if advised.settings:
        console.table(["setting", "reason"], [[advice.what, advice.reason] for advice in advised.settings])
    for note in advised.notes:
        console.say(f"note: {note}")
    if advised.command:
        console.out(advised.command)

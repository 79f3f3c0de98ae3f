"""`dino presets`: the shipped presets, and the backbones that a preset may name."""

from __future__ import annotations

import tomllib
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.mistakes import App
from dinocli.cli.options import Json
from dinocli.method import shipped

presets = App(invoke_without_command=True)


def complete_preset(incomplete: str) -> list[str]:
    """Return the names of shipped presets and stages that begin with the typed text, for shell completion."""
    return [name for name in (*shipped.names(), *shipped.stages()) if name.startswith(incomplete)]


@presets.callback()
def list_presets(context: typer.Context, json: Json = False) -> None:
    """List the shipped presets with backbone, recipe, cost and expected result.

    Stages come last: they continue a finished run (--from) and have its backbone.

    Examples:
        dino presets
        dino presets backbones dinov3
    """
    if context.invoked_subcommand:
        return
    rows = []
    for name in (*shipped.names(), *shipped.stages()):
        data = tomllib.loads(shipped.text(name))
        about = data["about"]
        rows.append(
            {
                "preset": name,
                "backbone": data["backbone"]["name"] if "backbone" in data else "that of the run",
                "recipe": about["recipe"],
                "cost": about["cost"],
                "expected": about["expected"],
            }
        )
    if json:
        console.out_json(rows)
    else:
        # One row of several lines per preset, because five columns would break words in a terminal of 80 characters.
        cells = [
            [row["preset"], f"{row['backbone']}\n{row['recipe']}\ncost: {row['cost']}\nexpected: {row['expected']}"]
            for row in rows
        ]
        console.table(["preset", "backbone, recipe, cost and expected result"], cells, lines=True)
    console.saved([], "dino pretrain IMAGES --preset tiny")


@presets.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", autocompletion=complete_preset, help="Name of a shipped preset.")
    ],
) -> None:
    """Print a preset. Redirect it to a file to start your own.

    Examples:
        dino presets show tiny
        dino presets show dinov2-vits14 > mine.toml
    """
    for line in shipped.text(name).rstrip("\n").splitlines():
        console.out(line)
    before = " --from RUN" if name in shipped.stages() else ""
    console.saved([], f"dino pretrain IMAGES --preset {name}{before}")


_MANY = 300
_FEATURES = {"token": "class token", "head": "pooled", "mean": "average"}
_ROW = "{:<45} {:>9} {:>5} {:>5}  {:<11} {}"


@presets.command()
def backbones(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]", help="Part of a name, or a pattern such as 'vit_*dinov2'. Default: all names."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List networks of timm as backbones: parameters, patch size, width and feature.

    `timm:NAME.TAG` loads the weights of a tag. `--set backbone.name=NAME` trains the architecture. `class token` and
    `pooled` are the network's own feature; `average` is the mean over its map. Only networks with `masks` can be
    trained with masked patches (iBOT, DINOv2, DINOv3). All others work as encoders and with DINO. Without a
    PATTERN, all names are listed without facts.

    Examples:
        dino presets backbones dinov3
        dino presets backbones 'convnext_*'
    """
    from dataclasses import asdict

    from dinocli.models.catalog import find_names, inspect_network

    names, entries = find_names(pattern or "*"), []
    if pattern is None:
        # Each network must be built for its facts, which takes minutes for all.
        if json:
            console.out_json([{"name": name} for name in names])
        else:
            for name in names:
                console.out(name)
        console.say(f"{len(names):,} names; a PATTERN adds parameters, width and feature")
        console.saved([], "dino presets backbones PATTERN")
        return
    if len(names) > _MANY:
        console.say(f"note: building {len(names):,} networks takes a minute or more; a narrower PATTERN is faster")
    if not json:
        console.out(_ROW.format("name", "params", "patch", "width", "feature", "masks").rstrip())
    for name in names:
        entry = inspect_network(name)
        entries.append(asdict(entry))
        if json:
            continue
        if entry.reason:
            console.out(f"{name:<45} not supported: {entry.reason}")
            continue
        millions = f"{entry.parameters / 1e6:.1f} M"
        feature, masks = _FEATURES[entry.feature], "masks" if entry.masks else ""
        console.out(_ROW.format(name, millions, entry.patch_size, entry.width, feature, masks).rstrip())
        for tag in entry.released:
            console.out(f"  timm:{name}.{tag}")
    if json:
        console.out_json(entries)
    supported = sum(not entry["reason"] for entry in entries)
    console.say(f"{supported:,} of {len(names):,} names work")
    trained = next((entry["name"] for entry in entries if not entry["reason"]), None)
    console.saved([], f"dino pretrain IMAGES --set backbone.name={trained}" if trained else "dino presets backbones")

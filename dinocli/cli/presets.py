"""`dino presets`: the shipped presets."""

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
    """Return the names of shipped presets that begin with the typed text, for shell completion."""
    return [name for name in shipped.names() if name.startswith(incomplete)]


@presets.callback()
def list_presets(context: typer.Context, json: Json = False) -> None:
    """List the shipped presets with backbone, recipe, cost and expected result.

    Examples:
        dino presets
        dino presets show vits16 > mine.toml
    """
    if context.invoked_subcommand:
        return
    rows = []
    for name in shipped.names():
        data = tomllib.loads(shipped.text(name))
        about = data["about"]
        rows.append(
            {
                "preset": name,
                "backbone": data["backbone"]["name"],
                "recipe": about["recipe"],
                "cost": about["cost"],
                "expected": about["expected"],
            }
        )
    if json:
        console.out_json(rows)
        return
    # One row of several lines per preset, because five columns would break words in a terminal of 80 characters.
    cells = [
        [row["preset"], f"{row['backbone']}\n{row['recipe']}\ncost: {row['cost']}\nexpected: {row['expected']}"]
        for row in rows
    ]
    console.table(["preset", "backbone, recipe, cost and expected result"], cells, lines=True)


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

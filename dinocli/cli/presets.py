"""`dino presets`: the shipped presets."""

from __future__ import annotations

import tomllib
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.mistakes import App
from dinocli.cli.options import Json
from dinocli.method import shipped

presets = App(help="List the shipped presets, or show one.", invoke_without_command=True)


@presets.callback()
def list_presets(context: typer.Context, json: Json = False) -> None:
    """List the shipped presets with backbone, recipe, cost and expected result; `dino presets show NAME` prints one."""
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
    else:
        console.table(list(rows[0]), [list(row.values()) for row in rows])


@presets.command()
def show(name: Annotated[str, typer.Argument(help="Name of a shipped preset.")]) -> None:
    """Print a preset; redirect it to a file to start your own."""
    for line in shipped.text(name).rstrip("\n").splitlines():
        console.out(line)

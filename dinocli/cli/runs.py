"""`dino runs`: a list of runs."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import OUTPUT
from dinocli.cli.options import Json
from dinocli.core.errors import DinoError
from dinocli.core.runs import RUNS

if TYPE_CHECKING:
    from dinocli.train.summary import RunSummary


def runs(
    places: Annotated[
        list[Path] | None, typer.Argument(metavar="RUNS...", help="Run folders, and folders of runs. Default: ./runs.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Print only the folder of the best run.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
) -> None:
    """List runs with preset, images, steps, loss, k-NN accuracy, age and state, the last written first.

    The best run is that with the highest k-NN accuracy on its --monitor.

    Examples:
        dino runs
        dino runs runs/tiny-1 runs/tiny-2 --best
    """
    from dinocli.train.summary import best_of, list_runs

    listed = list_runs(places or [RUNS])
    chosen = best_of(listed)
    if best:
        if chosen is None:
            names = " ".join(str(run.folder) for run in listed[:2])
            raise DinoError(
                f"none of the {len(listed)} runs has a k-NN accuracy of --monitor",
                f"dino compare {names} --on DATA" if len(listed) > 1 else "dino extract RUN DATA, then dino knn",
            )
        console.out(str(chosen.folder))
        console.saved([], f"dino extract {shlex.quote(str(chosen.folder))} DATA")
        return
    following = shlex.join(["dino", "report", *(str(run.folder) for run in listed[:2])])
    if json:
        console.out_json({"runs": [_list_values(run) for run in listed], "best": chosen and str(chosen.folder)})
        console.saved([], following)
        return
    rows = [_format_row(run, best=run is chosen) for run in listed]
    console.table(["run", "training", "k-NN %", "state"], rows, lines=True)
    measured = [run for run in listed if run.knn is not None]
    if chosen and len(measured) > 1:
        console.say(f"best: {chosen.folder}, k-NN {chosen.knn:.1f} % at step {chosen.knn_step}")
        console.say("note: accuracies are comparable if the runs have the same --monitor; else use dino compare")
    console.saved([], following)


def _format_row(run: RunSummary, *, best: bool) -> list[str]:
    # Two lines per run: eight columns would break words in a terminal of 80 characters.
    images = "" if run.images is None else f", {run.images:,} images"
    steps = f"step {run.step}" + (f" of {run.steps}" if run.steps is not None else "")
    loss = "" if run.loss is None else f", loss {run.loss:.3f}"
    knn = "" if run.knn is None else f"{run.knn:.1f}" + " best" * best
    age = console.duration(max(0.0, time.time() - run.written)).split()[:2]  # the largest unit alone
    return [str(run.folder), f"{run.preset}{images}\n{steps}{loss}", knn, f"{run.condition}\n{' '.join(age)} ago"]


def _list_values(run: RunSummary) -> dict[str, Any]:
    return asdict(run) | {"folder": str(run.folder), "age": max(0.0, time.time() - run.written)}

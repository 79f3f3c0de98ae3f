"""`dino report`: the report of a run drawn anew, or the curves of several runs on the same axes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import Json, output_place
from dinocli.core.errors import DinoError
from dinocli.core.runs import CURVES, REPORT

_KEYS = ("loss", "knn", "accuracy", "rank", "uniformity")
_SUFFIXES = ("/teacher_entropy", "/kl", "/information", "/spread")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--value",
            metavar="KEY",
            help="Logged value to draw, such as dino/kl; may be repeated. Default: all that the report of a run draws.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html and curves.png. Default: report, or for one run its own folder.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Draw the curves of several runs on the same axes, with their different settings and last values.

    For one run, its report.html and curves.png are drawn anew from its metrics.

    Examples:
        dino report runs/tiny-1 runs/tiny-2
        dino report runs/tiny-1 runs/tiny-2 --value dino/kl --value knn
    """
    from dinocli.data.sources.outputs import marked
    from dinocli.viz.overlay import MOST, list_values, read_runs, write_overlay
    from dinocli.viz.report import write_report

    if len(runs) > MOST:
        raise DinoError(f"{len(runs)} runs; curves of at most {MOST} can be distinguished", f"name {MOST} or fewer")
    logged = read_runs(runs)
    if len(runs) == 1 and not values and out is None:
        folder = runs[0]
        write_report(folder)
    else:
        folder = output_place(out or Path("report"))
        with marked(folder, "report", [folder / CURVES]):
            write_overlay(logged, folder, values or ())
    rows = list_values(logged, values or ())
    if json:
        lasts = {name: {row[0]: float(row[i]) for row in rows if row[i]} for i, name in enumerate(logged, 1)}
        console.out_json({"runs": lasts, "page": str(folder / REPORT), "picture": str(folder / CURVES)})
    else:
        shown = rows if values else [row for row in rows if row[0] in ("step", *_KEYS) or row[0].endswith(_SUFFIXES)]
        console.table(["last value", *logged], shown)
    console.saved([folder / REPORT], "dino runs")

"""`dino adapt`: released weights made better on a user's own images, or a report that they were not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import MONITORING, RECIPE, RUN_FOLDER
from dinocli.cli.options import AllSettings, Device, Images, Json, Workers, note_inside, output_place, refuse_address
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
    Steps,
    Trackers,
    given_settings,
    parse_saving,
    refuse_images_folder,
    run_plan,
    show_plan,
    starting_point,
)
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.train.plan import Plan
    from dinocli.train.pretrain import Run


def adapt(
    images: Images,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="timm:NAME|FILE|RUN",
            help="Weights to adapt: a timm model, a released file, a transformers folder, or a run.",
            rich_help_panel=RECIPE,
        ),
    ],
    train: Annotated[
        str,
        typer.Option(
            metavar="lora|lora-RANK|last-N|all",
            help="Trained weights: low-rank additions, the last N blocks, or all.",
            rich_help_panel=RECIPE,
        ),
    ] = "lora",
    anchor: Annotated[
        float,
        typer.Option(
            min=0,
            help="Weight of a loss that keeps class tokens and patch similarities near those of the released weights.",
            rich_help_panel=RECIPE,
        ),
    ] = 0.0,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Recipe. Default: adapt-dinov2, adapt-dinov3 or adapt-lora, by the weights.",
            autocompletion=complete_preset,
            rich_help_panel=RECIPE,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs of 50 steps. Default: enough to see each image 20 times.", rich_help_panel=RECIPE
        ),
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    steps: Steps = None,
    overrides: AllSettings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: that of an unfinished run with the same settings, else runs/adapt-<n>.",
            rich_help_panel=RUN_FOLDER,
        ),
    ] = None,
    save_every: SaveEvery = "10min",
    monitor: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A labelled folder, preferably with train and val, that decides which weights are better.",
            rich_help_panel=MONITORING,
        ),
    ] = None,
    monitor_every: MonitorEvery = None,
    log: Trackers = None,
    accumulate: Accumulate = 1,
    recompute: Recompute = False,
    graph: Graph = None,
    workers: Workers = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Adapt released weights to your own images, and compare the result with them.

    New heads learn first, with the backbone frozen; then the backbone learns with them. With --monitor, the best
    weights of the run are compared with the released ones, and the released ones are kept if the others are worse.

    Examples:
        dino adapt ./images --from dinov2_vits14_pretrain.pth --monitor ./labelled
        dino adapt ./images --from dinov3_vitb16_pretrain_lvd1689m.pth --train last-4
    """
    out = out and output_place(out)
    for value, option in ((source, "--from"), (monitor, "--monitor")):
        refuse_address(value or "", option, "a local path" + " or timm:NAME" * (option == "--from"))
    refuse_images_folder(out, images)
    given = given_settings(epochs, batch_size, seed, overrides)

    from dinocli.data.sources.open import open_source, within

    opened = open_source(images)  # before torch is loaded, so that a wrong path or name fails at once

    from dinocli.method.preset import load_preset
    from dinocli.train.adapt import RECIPES, recipe
    from dinocli.train.best import BEST
    from dinocli.train.prepare import prepare

    start = starting_point(source, overrides)
    name = preset or RECIPES[start.family]
    opened = within(opened, load_preset(name, [*(overrides or []), *given]).images)
    console.notes(opened.notes)
    chosen = recipe(start, load_preset(name), opened.count, batch_size, train, anchor)
    settings = [*(f"{key}={value}" for key, value in chosen.items()), *(overrides or []), *given]
    loaded = load_preset(name, settings)
    plan = prepare(
        "adapt",
        loaded,
        opened,
        steps=steps,
        out=out,
        device=device,
        workers=workers,
        init=source,
        initial=start.weights,
        saving=parse_saving(save_every, 2, None),
        report=True,
        monitor_every=monitor_every,
        accumulate=accumulate,
        recompute=recompute,
        trackers=tuple(log or ()),
        monitor=monitor,
        keep_best=True,
        graph=graph,
    )
    note_inside(plan.out, images)
    if (plan.out / BEST).is_file() and not monitor:
        raise DinoError(
            f"the adaptation in {plan.out} chose its weights with --monitor, which is not set now",
            "name the same --monitor DIR, or another --out",
        )
    console.say(f"recipe: {name}, --train {train}" + (f", --anchor {anchor:g}" if anchor else ""))
    if dry_run:
        show_plan(plan, json)
        return
    run_plan(plan, json, lambda run: _conclude(plan, run, json=json))


def _conclude(plan: Plan, run: Run, *, json: bool) -> dict[str, Any]:
    """Compare the new weights with the released ones, print a table, and return the figures for JSON."""
    from dinocli.train.adapt import conclude

    if run.stopped:
        return {}
    console.say("comparing the new weights with the released ones")
    result = conclude(plan)
    if not json:
        columns = ["figure", "released", "adapted", "difference (95 % interval)"]
        console.table(columns, result.rows)
    console.say(result.verdict)
    knn = result.difference
    figures: dict[str, dict[str, Any]] = {
        figure: {"before": before, "after": after} for figure, (before, after) in result.figures.items()
    }
    if knn:
        interval = {"difference": knn.mean, "low": knn.low, "high": knn.high, "verdict": knn.verdict}
        figures["knn"] = {"before": knn.before, "after": knn.after} | interval
    return {"step_kept": result.step, "figures": figures}

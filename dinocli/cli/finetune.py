"""`dino finetune`: a backbone and a classifier learn labelled images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import MONITORING, RECIPE, RUN_FOLDER
from dinocli.cli.learned import CLASSIFIER, PredictionsFile, predictions_place, print_class_accuracies, save_predictions
from dinocli.cli.options import AllSettings, Device, Json, Workers, note_inside, output_place, refuse_address
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
from dinocli.core.runs import CHECKPOINT

if TYPE_CHECKING:
    from dinocli.train.finetune import FineTuned, Task
    from dinocli.train.plan import Plan
    from dinocli.train.pretrain import Run


def finetune(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Labelled images: class folders, with or without train/ and val/, or a list with labels.",
        ),
    ],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="timm:NAME|FILE|RUN",
            help="Weights to start from: a timm model, a released file, a transformers folder, or a run.",
            rich_help_panel=RECIPE,
        ),
    ],
    train: Annotated[
        str,
        typer.Option(
            metavar="all|last-N|lora|lora-RANK",
            help="Trained weights: all, the last N blocks, or low-rank additions.",
            rich_help_panel=RECIPE,
        ),
    ] = "all",
    few_shot: Annotated[
        int | None, typer.Option(min=1, help="Learn from N random images of each class.", rich_help_panel=RECIPE)
    ] = None,
    balanced: Annotated[
        bool,
        typer.Option(
            "--balanced", help="Show all classes equally often: repeat images of rare ones.", rich_help_panel=RECIPE
        ),
    ] = False,
    several: Annotated[
        bool,
        typer.Option(
            "--multi-label",
            help="Images may have several classes: labels like 'cat;dog' in a .csv list.",
            rich_help_panel=RECIPE,
        ),
    ] = False,
    preset: Annotated[
        str, typer.Option(help="Recipe.", autocompletion=complete_preset, rich_help_panel=RECIPE)
    ] = "finetune",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=2, help="Length. Default: each image 30 times, in 600 to 20,000 steps.", rich_help_panel=RECIPE
        ),
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    steps: Steps = None,
    overrides: AllSettings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: that of an unfinished run with the same settings, else runs/finetune-<n>.",
            rich_help_panel=RUN_FOLDER,
        ),
    ] = None,
    save_every: SaveEvery = "10min",
    held_out: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.5,
            help="Share of the training images to hold out, to choose the best weights and calibrate confidences.",
            rich_help_panel=MONITORING,
        ),
    ] = 0.1,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Stop after N evaluations (about 20 per run) without a better accuracy on held-out images; 0 never "
            "stops early.",
            rich_help_panel=MONITORING,
        ),
    ] = 5,
    monitor_every: MonitorEvery = None,
    log: Trackers = None,
    accumulate: Accumulate = 1,
    recompute: Recompute = False,
    graph: Graph = None,
    workers: Workers = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    predictions: PredictionsFile = None,
    json: Json = False,
) -> None:
    """Fine-tune a backbone with a classifier on labelled images.

    A part of the training images is held out. The weights with the best accuracy on them become the checkpoint, and
    classifier.safetensors beside it classifies photos with `dino classify`.

    Examples:
        dino finetune ./data --from ckpt.safetensors
        dino finetune ./data --from timm:vit_small_patch16_224.dino --few-shot 10
    """
    out, predictions = out and output_place(out), predictions_place(predictions)
    for value, option in ((data, "DATA"), (source, "--from")):
        refuse_address(value, option, "a local path" + " or timm:NAME" * (option == "--from"))
    refuse_images_folder(out, data)
    if several and predictions:
        raise DinoError(
            f"--predictions {predictions} needs one class per image, and --multi-label is set", "remove --predictions"
        )
    given = given_settings(epochs, batch_size, seed, overrides)

    from dinocli.data.sources.open import splits, within

    opened = splits(data, several=several)  # before torch is loaded, so that a wrong path fails at once

    from dinocli.method.preset import load_preset
    from dinocli.train.finetune import open_task, recipe
    from dinocli.train.prepare import prepare

    asked = load_preset(preset, [*(overrides or []), *given])
    opened = {split: within(part, asked.images) for split, part in opened.items()}
    console.notes(note for part in opened.values() for note in part.notes)
    task = open_task(
        data, opened, held_out=held_out, few_shot=few_shot, balanced=balanced, several=several, seed=asked.training.seed
    )
    console.notes(task.notes)
    start = starting_point(source, overrides)
    chosen = recipe(start, load_preset(preset), task, batch_size, train)
    loaded = load_preset(preset, [*(f"{key}={value}" for key, value in chosen.items()), *(overrides or []), *given])
    plan = prepare(
        "finetune",
        loaded,
        task.train.images,
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
        keep_best=task.held_out is not None,
        labels=task.train.labels,
        held_out=task.held_out,
        patience=patience or None,
        graph=graph,
    )
    note_inside(plan.out, data)
    _describe(task)
    if dry_run:
        show_plan(plan, json)
        return
    run_plan(plan, json, lambda run: _conclude(plan, task, run, predictions, json=json))


def _describe(task: Task) -> None:
    aside = f", {len(task.held_out.images)} held out" if task.held_out else ", none held out"
    test = f", {len(task.test.images)} to test" if task.test else ""
    console.say(f"{len(task.train.images)} training images{aside}{test}; {len(task.classes)} classes")


def _conclude(plan: Plan, task: Task, run: Run, predictions: Path | None, *, json: bool) -> dict[str, Any]:
    """Evaluate the best weights, save their classifier, and return the figures for JSON."""
    from dinocli.evals.calibration import FEW
    from dinocli.evals.predictions import predict
    from dinocli.train.finetune import conclude

    if run.stopped:
        return {}
    console.say("evaluating the best weights")
    result = conclude(plan, task)
    _save_classifier(plan, task, result)
    console.skipped(result.unread)
    if run.step < plan.stop:
        evaluations = "1 evaluation" if plan.patience == 1 else f"{plan.patience} evaluations"
        console.say(f"no better accuracy in {evaluations}: ended at step {run.step} of {plan.stop}")
    console.say(f"kept the weights of step {result.step}")
    facts: dict[str, Any] = {"step_kept": result.step, "classifier": str(plan.out / CLASSIFIER)}
    scored = result.test or result.held_out
    if scored and not result.test:
        console.say("note: no test split: the held-out images chose the weights, so their accuracy is optimistic")
    if scored and task.several:
        console.say(f"mean average precision {scored.accuracy:.2f} % over {len(scored.names)} {scored.where}")
        facts["mean_average_precision"] = scored.accuracy
    elif scored:
        answers = predict(scored.names, scored.labels, scored.logits, result.temperature)
        facts |= {"top1": answers.percent(1), "interval": answers.interval, "macro": answers.macro}
        console.say(
            f"accuracy {answers.percent(1):.2f} % (95 % interval {answers.interval}) of {len(answers)} "
            f"{scored.where}; mean over classes {answers.macro:.2f} %"
        )
        if result.held_out:
            before, after = answers.errors
            count = len(result.held_out.names)
            console.say(
                f"confidence: temperature {result.temperature:.2f}, fitted on {count} held-out images; expected "
                f"calibration error {before:.1f} % before, {after:.1f} % after"
            )
            if count < FEW:
                console.say(f"note: {count} images are few; best weights and confidences are a rough guess")
        if predictions:
            saved = save_predictions(predictions, answers, task.classes, "finetune")
            facts |= saved
            if not json:
                print_class_accuracies(saved["per_class"])
    return facts


def _save_classifier(plan: Plan, task: Task, result: FineTuned) -> None:
    from dinocli.apps.classify.classifier import Classifier, LinearRule, write_classifier
    from dinocli.evals.accuracy import Interval, interval_of
    from dinocli.features.store import Provenance
    from dinocli.weights.load import load_encoder

    encoder = load_encoder(str(plan.out / CHECKPOINT), plan.device)
    about = Provenance(encoder.source, encoder.fingerprint, "cls", 1, encoder.size, task.train.images.where)
    scored = result.test or result.held_out
    accuracy, count = (scored.accuracy, len(scored.names)) if scored else (0.0, 0)
    classifier = Classifier(
        LinearRule(result.weight, result.bias),
        task.classes,
        replace(about, run=encoder.run, step=encoder.step),
        result.temperature,
        len(result.held_out.names) if result.held_out and not task.several else 0,
        accuracy,
        interval_of(round(accuracy * count / 100), count) if count and not task.several else Interval(0.0, 100.0),
        len(task.train.images),
        count,
        task.several,
    )
    write_classifier(plan.out / CLASSIFIER, classifier)

"""Options and output of the commands that classify test images: predictions, confusion matrix, saved classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import OUTPUT
from dinocli.cli.options import output_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.evals.calibration import Calibration
    from dinocli.evals.predictions import Predictions

CLASSIFIER = Path("classifier.safetensors")
_NAME = "predictions.csv"
_SHOWN = 20  # classes in the table; --json lists all

Save = Annotated[
    bool,
    typer.Option(
        "--save", help="Save the classifier, for `dino classify`; the file is set by --out.", rich_help_panel=OUTPUT
    ),
]
ClassifierFile = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="Classifier file of --save.", rich_help_panel=OUTPUT)
]
PredictionsFile = Annotated[
    Path | None,
    typer.Option(
        "--predictions",
        metavar="FILE",
        help="Write the predicted class and confidence of each test image to this CSV file, and a picture of the "
        "confusion matrix beside it; print the accuracy of each class.",
        rich_help_panel=OUTPUT,
    ),
]


def classifier_place(path: Path, *, save: bool) -> Path:
    """Check the file of --save, without writing.

    Raises:
        DinoError: If it cannot be written, is another file of the user, or is named without --save.
    """
    if not save:
        if path != CLASSIFIER:
            raise DinoError(f"--out {path} has no effect without --save", f"add --save, or remove --out {path}")
        return path
    path = output_place(path, file=CLASSIFIER.name)
    if path.suffix.lower() != ".safetensors":
        raise DinoError(f"--out {path} is no .safetensors file", f"use --out {path.with_suffix('.safetensors')}")
    from dinocli.apps.classify.classifier import check_classifier_file

    check_classifier_file(path)
    return path


def predictions_place(path: Path | None) -> Path | None:
    """Check the file of --predictions, without writing.

    Raises:
        DinoError: If it is no .csv, cannot be written, or is another file of the user.
    """
    if path is None:
        return None
    path = output_place(path, "--predictions", file=_NAME)
    if path.suffix.lower() != ".csv":
        raise DinoError(f"--predictions {path} is no .csv file", f"use --predictions {path.with_suffix('.csv')}")
    from dinocli.evals.predictions import check_predictions_file

    check_predictions_file(path)
    return path


def save_predictions(path: Path, predictions: Predictions, classes: Sequence[str], command: str) -> dict[str, Any]:
    """Write the predictions and the picture of their confusion matrix; return the paths and the class accuracies."""
    from dinocli.data.sources.outputs import marked
    from dinocli.evals.confusion import class_accuracies, confusion
    from dinocli.evals.predictions import write_predictions
    from dinocli.viz.confusion import write_confusion

    picture = path.with_name(f"{path.stem}-confusion.png")
    table = confusion(predictions.truth, predictions.predicted, len(classes))
    with marked(path.parent, command, [picture]):
        write_predictions(path, predictions, classes)
        title = f"{len(predictions)} test images, top-1 {predictions.percent(1):.1f} %"
        write_confusion(table, classes, title, picture)
    each = [asdict(one) for one in class_accuracies(table, list(classes))]
    return {"predictions": str(path), "confusion": str(picture), "per_class": each}


def print_class_accuracies(each: Sequence[dict[str, Any]]) -> None:
    """Print the accuracy of the worst classes, at most 20."""
    if len(each) > _SHOWN:
        console.say(f"note: the table shows the {_SHOWN} classes of lowest accuracy; --json lists all {len(each)}")
    console.table(
        ["class", "images", "accuracy %", "most often mistaken for"],
        [
            [
                one["name"],
                str(one["images"]),
                f"{one['accuracy']:.1f}",
                f"{one['mistaken_for']} ({one['mistakes']})" if one["mistakes"] else "",
            ]
            for one in each[:_SHOWN]
        ],
    )


def print_calibration(calibration: Calibration | None) -> None:
    """Print the temperature of the confidences and their error on the test images."""
    if calibration is None:
        console.say("note: no image was held out; confidences are not calibrated")
        return
    from dinocli.evals.calibration import FEW

    console.say(
        f"confidence: temperature {calibration.temperature:.2f}, fitted on {calibration.images} "
        f"{calibration.fitted_on}; expected calibration error on the test images {calibration.before:.1f} % before, "
        f"{calibration.after:.1f} % after"
    )
    if calibration.images < FEW:
        console.say(f"note: {calibration.images} images are few; the confidences are a rough guess")

"""Experiment trackers: the figures and pictures of a run in TensorBoard, Weights & Biases, MLflow and Trackio."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dinocli.core.atomic import write_json
from dinocli.core.checksums import unseal
from dinocli.core.errors import DinoError, reason_of

_PROJECT = "dinocli"
_IDS = "trackers.json"  # in the run folder: the run's id in each tracker, so that a resumed run continues there
Figures = Mapping[str, float | int]


@dataclass(frozen=True)
class Tracked:
    """Run as trackers see it.

    Attributes:
        folder: Run folder, which also names the run.
        settings: Resolved preset.
        step: Step to resume from.
    """

    folder: Path
    settings: dict[str, Any]
    step: int = 0

    def id(self, tracker: str, make: Callable[[], str] = lambda: secrets.token_hex(8)) -> str:
        """Return the run's id in a tracker; make and store one for a new run."""
        path = self.folder / _IDS
        try:
            ids = dict(unseal(path.read_bytes())) if path.exists() and self.step else {}
        except (OSError, ValueError):
            ids = {}  # a corrupt file costs the connection to earlier figures only
        if tracker not in ids:
            ids[tracker] = make()
            write_json(path, ids)
        return str(ids[tracker])


class Tracker(Protocol):
    """Destination of figures and pictures."""

    def write(self, figures: Figures) -> None:
        """Log the figures of a step; `step` is one of them."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a picture."""

    def close(self) -> None:
        """Send what is left."""


class _TensorBoard:
    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then no longer shows figures of later steps.
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def write(self, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, int(figures["step"]))
        self._writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Tracked) -> None:
        import wandb

        # Without a key the run is stored in its folder, for `wandb sync`, instead of asking for one.
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.folder.name,
            dir=run.folder,
            id=run.id("wandb"),
            resume="allow",
            mode=mode,
            config=run.settings,
            settings=wandb.Settings(silent=True),
        )
        self._picture = wandb.Image

    def write(self, figures: Figures) -> None:
        self._run.log(dict(figures), step=int(figures["step"]))

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._picture(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        place = run.folder.absolute()
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place}/mlflow.db")

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = client.get_experiment_by_name(name)
            here = None if os.environ.get("MLFLOW_TRACKING_URI") else (place / "mlruns").as_uri()
            experiment = found.experiment_id if found else client.create_experiment(name, here)
            made: str = client.create_run(experiment, run_name=run.folder.name).info.run_id
            client.log_batch(made, params=[Param(key, str(value)) for key, value in _flatten(run.settings)])
            return made

        self._client, self._metric = client, Metric
        self._id = run.id("mlflow", create)
        client.update_run(self._id, status="RUNNING")

    def write(self, figures: Figures) -> None:
        now, step = int(time.time() * 1000), int(figures["step"])
        metrics = [self._metric(name, float(value), now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(path), "pictures")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, run: Tracked) -> None:
        import trackio

        # Trackio resumes by name, and the names of two runs may be equal.
        name = f"{run.folder.name}-{run.id('trackio')[:6]}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=name,
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._trackio = trackio

    def write(self, figures: Figures) -> None:
        self._trackio.log(dict(figures), step=int(figures["step"]))

    def picture(self, name: str, path: Path, step: int) -> None:
        self._trackio.log({name: self._trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self._trackio.finish()


_CLASSES: dict[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class Guarded:
    """Tracker whose failure ends the tracking, not the run.

    Args:
        name: `tensorboard`, `wandb`, `mlflow` or `trackio`.
        run: Run to track.
        note: Callback that receives a one-line warning about the first failure.

    Raises:
        DinoError: If the tracker's package is not installed.
    """

    def __init__(self, name: str, run: Tracked, note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", _CLASSES[name](run)))

    def write(self, figures: Figures) -> None:
        """Log the figures of a step."""
        if tracker := self._tracker:
            self._try(lambda: tracker.write(figures))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a picture, if it exists."""
        if (tracker := self._tracker) and path.is_file():
            self._try(lambda: tracker.picture(name, path, step))

    def close(self) -> None:
        """Send what is left."""
        if tracker := self._tracker:
            self._try(tracker.close)
        self._tracker = None

    def _try(self, action: Callable[[], object]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # trackers print there, where data belong
                action()
        except ImportError as error:
            raise DinoError(
                f"--log {self._name} needs the package {error.name}, which is not installed",
                f"pip install 'dinocli[{self._name}]'",
            ) from error
        except Exception as error:  # services fail in many ways
            self._note(f"warning: --log {self._name} stops here, and training continues: {reason_of(error)}")
            self._tracker = None


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the settings as pairs of a key with dots and a value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs

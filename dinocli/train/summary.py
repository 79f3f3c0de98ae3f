"""Summaries of run folders, for a list that helps to find the best run."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dinocli.core.checksums import parse
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, METRICS, is_held
from dinocli.method import shipped
from dinocli.method.settings import description_of
from dinocli.train.best import BEST
from dinocli.train.plan import start_clock
from dinocli.train.state import State, saved_states
from dinocli.viz.history import Curve, read_history

_PRESET = "preset.json"
Condition = Literal["running", "finished", "finished early", "stopped", "corrupt"]


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    Attributes:
        folder: Run folder.
        preset: Name of the shipped preset, or the recipe in words.
        images: Number of training images, if known.
        where: Location of the training images; empty if unknown.
        step: Number of completed steps.
        steps: Number of steps of the schedules. None if unknown.
        loss: Last finite logged loss, if any.
        knn: k-NN accuracy of the run's weights on its monitor, in percent. None without a monitor.
        knn_step: Step at which it was measured.
        written: Time of the last write, in seconds since 1970.
        condition: `running` in another process, `finished` with all steps of its schedules, `finished early` because
            its score no longer rose, `stopped` before, or `corrupt` without a readable state.
    """

    folder: Path
    preset: str
    images: int | None
    where: str
    step: int
    steps: int | None
    loss: float | None
    knn: float | None
    knn_step: int | None
    written: float
    condition: Condition


def list_runs(places: Sequence[Path]) -> list[RunSummary]:
    """Return a summary of each run, the last written first.

    Args:
        places: Run folders, and folders of runs.

    Raises:
        DinoError: If a place does not exist, or holds no run.
    """
    runs = {run.resolve(): run for place in places for run in _find_runs(place)}
    names = {description_of(tomllib.loads(shipped.text(name))): name for name in shipped.names()}
    return sorted((_summarize(run, names) for run in runs.values()), key=lambda run: -run.written)


def best_of(runs: Sequence[RunSummary]) -> RunSummary | None:
    """Return the run with the highest k-NN accuracy on its monitor; None if no run has a monitor."""
    return max((run for run in runs if run.knn is not None), key=lambda run: run.knn or 0.0, default=None)


def _find_runs(place: Path) -> list[Path]:
    if not place.is_dir():
        fault = "is a file" if place.exists() else "does not exist"
        raise DinoError(f"{place} {fault}; expected a run, or a folder of runs", "dino pretrain IMAGES --preset tiny")
    if _is_run(place):
        return [place]
    runs = [path for path in sorted(place.iterdir()) if path.is_dir() and _is_run(path)]
    if not runs:
        raise DinoError(f"{place} holds no run", "dino pretrain IMAGES --preset tiny, which writes to runs/")
    return runs


def _is_run(folder: Path) -> bool:
    # A run writes the preset first, and it may have lost any other file.
    return (folder / _PRESET).is_file() and any((folder / name).exists() for name in (METRICS, CHECKPOINT, "state"))


def _summarize(folder: Path, names: dict[tuple[str, ...], str]) -> RunSummary:
    state = next((state for _, state in saved_states(folder) if state), None)
    history, preset = read_history(folder / METRICS), _read_preset(folder)
    logged = max((int(curve.steps[-1]) for curve in history.values()), default=0)
    step, steps = max(state.step if state else 0, logged), _count_steps(state) if state else None
    knn = _choose_evaluation(folder, history.get("knn"))
    loss = history["loss"].finite if "loss" in history else np.empty(0)
    condition: Condition = "corrupt"
    if is_held(folder):
        condition = "running"
    elif state:
        complete = steps is not None and state.step >= steps
        condition = "finished" if complete else "finished early" if state.early else "stopped"
    files = [path for name in (METRICS, CHECKPOINT, _PRESET) if (path := folder / name).exists()]
    about = preset.get("about")
    return RunSummary(
        folder=folder,
        preset=names.get(description_of(preset)) or str(about.get("recipe", "") if isinstance(about, dict) else ""),
        images=state.images.count if state else None,
        where=state.images.where if state else "",
        step=step,
        steps=steps,
        loss=float(loss[-1]) if len(loss) else None,
        knn=knn[1] if knn else None,
        knn_step=knn[0] if knn else None,
        written=max(path.stat().st_mtime for path in files),
        condition=condition,
    )


def _read_preset(folder: Path) -> dict[str, Any]:
    try:
        preset = parse((folder / _PRESET).read_bytes())
    except (OSError, ValueError):
        return {}
    return preset if isinstance(preset, dict) else {}


def _count_steps(state: State) -> int:
    try:
        return start_clock(state.preset, state.images.count).total
    except DinoError:  # the number of images is unknown, or the rules have changed since
        return state.stop


def _choose_evaluation(folder: Path, knn: Curve | None) -> tuple[int, float] | None:
    """Return the step and the accuracy of the run's weights: the last ones, or the best ones if the run keeps them."""
    if knn is None or not len(knn.finite):
        return None
    rows = np.flatnonzero(np.isfinite(knn.values))
    row = rows[np.argmax(knn.values[rows])] if (folder / BEST).is_file() else rows[-1]
    return int(knn.steps[row]), float(knn.values[row])

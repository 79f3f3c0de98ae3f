"""Preparation of a run: the plan of a user's settings, in the folder of the unfinished run that has the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dinocli.core.device import default_workers, pick_device
from dinocli.core.distributed import from_first
from dinocli.core.runs import next_folder, runs_of
from dinocli.data.sources.open import Source
from dinocli.method.preset import Preset
from dinocli.train.origin import Origin
from dinocli.train.plan import Plan, start_clock
from dinocli.train.resume import unfinished
from dinocli.weights.feature_teachers import FeatureTeachers
from dinocli.weights.frozen_teacher import FrozenTeacher


def prepare(
    name: str,
    preset: Preset,
    source: Source,
    *,
    steps: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    init: str | None = None,
    teacher: FrozenTeacher | FeatureTeachers | None = None,
    origin: Origin | None = None,
    **more: Any,
) -> Plan:
    """Return the plan of a run.

    Args:
        name: Name of the preset or command, which is that of its run folders.
        preset: Complete recipe.
        source: Images to train on.
        steps: Number of steps after which the run ends early. If None, it completes its schedules.
        out: Run folder. If None, that of an unfinished run with the same settings, else a new `runs/<name>-<n>`.
        device: Name of the device.
        workers: Number of decoding processes. If None, a number that suits the machine.
        init: Source of the initial weights.
        teacher: Frozen teacher, or encoders whose features teach.
        origin: Finished run that this run continues.
        more: Further attributes of the plan.

    Raises:
        DinoError: If the device does not exist, or the settings contradict each other.
    """
    total, picked = start_clock(preset, source.count).total, pick_device(device)
    stop = total if steps is None else min(steps, total)
    same = (preset, source.fingerprint, init, teacher.fingerprint if teacher else None)
    stages = origin.stages if origin else ()
    return Plan(
        name=name,
        preset=preset,
        source=source,
        stop=stop,
        out=from_first(out or unfinished(runs_of(name), same, stop, stages) or next_folder(name)),
        device=picked,
        workers=default_workers(picked) if workers is None else workers,
        init=init,
        teacher=teacher,
        origin=origin,
        **more,
    )

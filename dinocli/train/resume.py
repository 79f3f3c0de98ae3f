"""Resuming: the state to resume from, and the checks that a resumed run must pass."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NoReturn

from dinocli.core.config import format_toml
from dinocli.core.distributed import from_first, gathered, rank, size
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, CURVES, REPORT
from dinocli.data.sources.pixels import is_pixels
from dinocli.data.sources.shards import Shards, is_shards
from dinocli.engine.schedules import Clock, Schedule
from dinocli.method.preset import Preset
from dinocli.train.plan import Plan
from dinocli.train.state import SavedState, StageFacts, State, newest, other_contents, saved_states

BAD_IMAGES = "bad_images.txt"
# Files that a run writes only after its first state. A folder that holds one but no state is refused, because the run
# would overwrite it.
_WRITTEN = (CHECKPOINT, "preset.json", "metrics.jsonl", REPORT, CURVES, BAD_IMAGES)


def find_saved(plan: Plan, note: Callable[[str], None]) -> SavedState | None:
    """Return the state to resume from, or None for a new run.

    Raises:
        DinoError: If the folder's contents cannot be resumed, or the processes see different images.
    """
    if len(set(gathered(plan.source.fingerprint))) > 1:
        raise DinoError(
            f"the processes of this run see different images in {plan.source.where}",
            "copy the same images to all machines",
        )
    # Only the first process reads, because it may set corrupt states aside.
    saved = from_first(newest(plan.out, note) if rank() == 0 else None)
    if saved is None:
        refuse_taken(plan.out)
    return saved


def refuse_taken(out: Path) -> None:
    """Check that a folder without a valid state holds no file that a run would overwrite.

    Raises:
        DinoError: If it holds such files. The error names the first.
    """
    taken = next((name for name in _WRITTEN if (out / name).exists()), None)
    if taken:
        weights = f", and --init {out} to start from its weights" if taken == CHECKPOINT else ""
        raise DinoError(f"{out} holds a {taken} but no valid state to resume from", f"use another --out{weights}")


def resumed_plan(plan: Plan, state: State, note: Callable[[str], None]) -> Plan:
    """Return the plan of a resumed run, and report each change from the given plan or the earlier run.

    Raises:
        DinoError: If the preset, the images or the frozen teacher differ.
    """
    for line in changes(plan.preset, state, plan.clock):
        note(line)
    if state.images.fingerprint != plan.source.fingerprint:
        _refuse_other_images(plan, state)
    changed = other_contents(state.images.contents, plan.source) if rank() == 0 else None
    if changed:
        note(changed)
    if plan.stages != state.stages:
        began = f"continued {state.stages[-1].source}" if state.stages else "did not continue another run"
        own = f"--from {state.stages[-1].source}" if state.stages else "no --from"
        raise DinoError(f"the run in {plan.out} {began}", f"use {own} to resume, or another --out")
    if plan.teacher and plan.teacher.fingerprint != state.teacher:
        raise DinoError(
            f"the run in {plan.out} began with another teacher than {plan.teacher.source}",
            "name its own teacher with --teacher, or use another --out",
        )
    if plan.init and plan.init != state.init:
        note(f"note: ignoring --init {plan.init}: resuming from this run's own checkpoint")
    if isinstance(plan.source, Shards) and reading_processes(plan) != state.lanes:
        each, rest = divmod(state.lanes, size())
        if rest:
            note(
                f"note: {reading_processes(plan)} processes read the shards instead of {state.lanes}: the image order "
                "changes, and in this epoch some images repeat and some are skipped"
            )
        else:
            note(f"note: using --workers {each} as before: the order of the images in tar shards depends on it")
            plan = replace(plan, workers=each)
    if state.step < plan.stop:
        note(f"resuming from step {state.step} of {plan.stop} in {plan.out}")
    else:
        note(f"{plan.out} is finished: {state.step} steps done, {plan.stop} requested")
    return plan


def _refuse_other_images(plan: Plan, state: State) -> NoReturn:
    was, now, anew = state.images, plan.source, f"use another --out, and --init {plan.out} to start from its weights"
    kinds = [_kind_of_images(place) for place in (was.where, now.where)]
    if kinds[0] != kinds[1]:
        raise DinoError(
            f"{plan.out} began with {kinds[0]} in {was.where}, and {now.where} holds {kinds[1]}",
            f"name {was.where} to resume; or {anew}",
        )
    count = f"{now.count} with other names or in another order" if was.count == now.count else now.count
    raise DinoError(
        f"the images have changed since {plan.out} began: {was.count or 'an unknown number'} in {was.where} then, "
        f"{count or 'others'} in {now.where} now",
        anew,
    )


def _kind_of_images(place: str) -> str:
    if is_pixels(place):
        return "packed pixels"
    return "tar shards" if is_shards(place) else "image files"


def reading_processes(plan: Plan) -> int:
    """Return the number of processes that read images, over the whole run."""
    return size() * max(1, plan.workers)


def first_difference(one: Any, other: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return the first key whose values differ between two nested tables, with both values; None if all are equal."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else (path, one, other)
    for key in [*one, *(key for key in other if key not in one)]:
        inner = f"{path}.{key}" if path else key
        found = first_difference(one.get(key), other.get(key), inner)
        if found:
            return found
    return None


def changes(preset: Preset, state: State, clock: Clock) -> Iterator[str]:
    """Yield notes for the user on preset changes in a resumed run.

    Raises:
        DinoError: If the preset differs in more than the epochs of a finished run. The error names the first key.
    """
    before, now = (p.model_dump(mode="json", exclude={"about"}) for p in (state.preset, preset))
    old = replace(clock, epochs=state.preset.training.epochs, step=state.step)
    longer = state.step >= old.total and preset.training.epochs > old.epochs
    if longer:
        before["training"]["epochs"] = preset.training.epochs
    found = first_difference(before, now)
    if found:
        key, was, wanted = found
        message = f"the run began with {key} = {format_toml(was)}; {format_toml(wanted)} is now set"
        if key.endswith(".kind"):  # the other keys of a table belong to its kind
            key = key.removesuffix(".kind")
            was = reduce(getitem, key.split("."), before)
        raise DinoError(message, f"--set {shlex.quote(f'{key}={format_toml(was)}')} to resume, or another --out")
    if longer:
        new = replace(clock, step=state.step)
        schedules: dict[str, Schedule] = {
            "learning rate": preset.optimizer.lr_for(preset.training.batch_size),
            "weight decay": preset.optimizer.weight_decay,
            "teacher momentum": preset.teacher.momentum,
        }
        moves = (f"{what} from {s.at(old):.3g} to {s.at(new):.3g}" for what, s in schedules.items())
        yield (
            f"note: {preset.training.epochs} epochs instead of {old.epochs} stretch the schedules from {old.total} to "
            f"{new.total} steps; at step {state.step} they jump: {', '.join(moves)}"
        )


def unfinished(
    runs: Iterable[Path],
    plan: tuple[Preset, str, str | None, str | None],
    stop: int = 0,
    stages: Sequence[StageFacts] = (),
) -> Path | None:
    """Return the first unfinished run that matches the plan, or None.

    Args:
        runs: Run folders, newest first.
        plan: Preset, fingerprint of the images, initial weights, and fingerprint of the frozen teacher.
        stop: Number of planned steps. A run that `--steps` ended earlier counts as unfinished, unless at step 0. A run
            whose score no longer rose does not.
        stages: Earlier stages that the planned run continues.
    """
    for run in runs:
        state = next((state for _, state in saved_states(run) if state), None)
        if state and not state.early and (state.step < state.stop or 0 < state.step < stop):
            same = state.preset.model_copy(update={"about": plan[0].about})  # descriptions do not affect training
            if (same, state.images.fingerprint, state.init, state.teacher) == plan and state.stages == tuple(stages):
                return run
    return None

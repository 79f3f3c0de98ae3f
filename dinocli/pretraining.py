"""Pretraining: preset and images to a run folder."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dinocli.atomic import write_text
from dinocli.data.loader import BadFiles, TrainBatches
from dinocli.data.shards import Shards
from dinocli.device import autocast
from dinocli.distillation import SelfDistillation
from dinocli.encoder import initial_weights
from dinocli.engine.trainer import Trainer
from dinocli.errors import DinoError
from dinocli.models.network import load_strictly
from dinocli.planning import Plan, equal_parts
from dinocli.report import CURVES, REPORT
from dinocli.runs import CHECKPOINT, held
from dinocli.states import ImageFacts, Keeper, Saved, State, changes, newest
from dinocli.watching import Progress, Watch

_BAD = "bad_images.txt"
# Written once there is a state: where they lie without one, they are not of a run that can go on, and stay as they are.
_WRITTEN = (CHECKPOINT, "preset.json", "metrics.jsonl", REPORT, CURVES, _BAD)


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: The run folder.
        checkpoint: The teacher in it.
        began: Steps that were done before; 0 for a run that did not go on from a state.
        step: Steps done.
        stopped: Whether it was stopped by the user before its end.
        loss: Of the last step that was logged; absent where none was.
        seconds: It took.
        bad: Files that could not be read.
        cached: Images whose pixels were kept, where that was asked for.
        fresh_heads: Heads that the weights to start from did not have, or in another shape.
        skipped: Steps that were left out, since their loss or gradient was not finite.
    """

    folder: Path
    checkpoint: Path
    began: int
    step: int
    stopped: bool
    loss: float | None
    seconds: float
    bad: BadFiles
    cached: int | None
    fresh_heads: list[str]
    skipped: int


def pretrain(plan: Plan, report: Callable[[Progress], None], note: Callable[[str], None] = lambda line: None) -> Run:
    """Train, and leave a run folder with the teacher, the resolved preset, the metrics, and states to go on from.

    Where the folder holds an unfinished run of the same preset on the same images, it goes on from the newest state
    that is whole. Ctrl-C, SIGTERM or SIGUSR1 end it after the step that is going on, with all saved.

    Args:
        plan: What to do.
        report: Told where the run stands, now and again.
        note: Told, in a line, what a person should know.

    Raises:
        DinoError: The folder is taken, the images cannot be read, the weights to start from do not fit, the device's
            memory is too small, or nothing is learned.
    """
    began = time.perf_counter()
    with held(plan.out), _stop_signals() as asked_to_stop:
        saved = _found(plan, note)
        if saved:
            plan = going_on(plan, saved.state, note)
        trainer, method, fresh = _trainer(plan, saved)
        watch = Watch(plan, trainer, method, report, note)
        session = _Session(plan, trainer, method, saved)
        batches = _batches(plan, trainer)
        session.bad = batches.bad
        try:
            watch.begin()
            for batch in batches if trainer.clock.step < plan.stop else ():
                due = watch.due()
                values = session.step(batch, due)
                watch.saw(batch.rows, batches.waited)
                if due:
                    watch.log(values)
                if session.save_now_and_then():
                    watch.draw()
                if asked_to_stop or trainer.clock.step >= plan.stop:
                    break
        finally:
            batches.close()
            session.close()
        watch.draw(last=True)
    return Run(
        folder=plan.out,
        checkpoint=plan.out / CHECKPOINT,
        began=saved.state.step if saved else 0,
        step=trainer.clock.step,
        stopped=trainer.clock.step < plan.stop,
        loss=watch.loss,
        seconds=time.perf_counter() - began,
        bad=batches.bad,
        cached=batches.cache.kept if batches.cache else None,
        fresh_heads=fresh,
        skipped=int(trainer.skipped[0]),
    )


def _found(plan: Plan, note: Callable[[str], None]) -> Saved | None:
    """The state that a run goes on from.

    Raises:
        DinoError: What lies in the folder cannot be gone on from.
    """
    saved = newest(plan.out, note)
    taken = next((name for name in _WRITTEN if (plan.out / name).exists()), None) if saved is None else None
    if taken:
        weights = f", and --init {plan.out} to begin with its weights" if taken == CHECKPOINT else ""
        raise DinoError(
            f"{plan.out} holds a {taken} and no whole state of a run to go on from", f"take another --out{weights}"
        )
    return saved


def going_on(plan: Plan, state: State, note: Callable[[str], None]) -> Plan:
    """The plan of a run that goes on from a state, told to the user where it differs from what was asked for.

    Raises:
        DinoError: Preset or images are others.
    """
    for line in changes(plan.preset, state, plan.clock):
        note(line)
    if state.images.fingerprint != plan.source.fingerprint:
        was = f"{state.images.count or 'an unknown number'} in {state.images.where}"
        raise DinoError(
            f"the images have changed since {plan.out} began: {was} then, {plan.source.count or 'others'} in "
            f"{plan.source.where} now",
            f"take another --out, and --init {plan.out} to begin with its weights",
        )
    if plan.init and plan.init != state.init:
        note(f"note: --init {plan.init} is passed over; the run goes on from weights of its own")
    lanes = max(1, plan.workers)
    if isinstance(plan.source, Shards) and lanes != state.lanes:
        note(f"note: --workers {state.lanes}, as before: the order of the images in tar shards depends on it")
        plan = replace(plan, workers=state.lanes)
    if state.step < plan.stop:
        note(f"going on from step {state.step} of {plan.stop} in {plan.out}")
    else:
        note(f"{plan.out} is finished: {state.step} steps are done, and {plan.stop} were asked for")
    return plan


def _trainer(plan: Plan, saved: Saved | None) -> tuple[Trainer, SelfDistillation, list[str]]:
    """What trains, where it is to begin; what it trains; and the heads that stay fresh."""
    preset = plan.preset
    torch.manual_seed(preset.training.seed)
    method = preset.method()
    fresh = start_from(method, plan.init) if plan.init and not saved else []
    trainer = Trainer(
        method.to(plan.device),
        preset.optimizer,
        replace(plan.clock, step=saved.state.step if saved else 0),
        batch_size=preset.training.batch_size,
        accumulate=plan.accumulate,
        precision=autocast(plan.device, preset.training.precision),
        seed=preset.training.seed,
        guarded=True,
    )
    if saved:
        saved.restore(trainer)
    return trainer, method, fresh


def _batches(plan: Plan, trainer: Trainer) -> TrainBatches:
    return TrainBatches(
        plan.source,
        plan.preset.views,
        batch_size=plan.preset.training.batch_size,
        seed=plan.preset.training.seed,
        images=plan.preset.images,
        start=trainer.clock.step,
        workers=plan.workers,
        device=plan.device,
        cache=plan.cache,
    )


class _Session:
    """Does steps, and saves where they have led: before the first, so that a full disk is known then, and after it."""

    def __init__(self, plan: Plan, trainer: Trainer, method: SelfDistillation, saved: Saved | None) -> None:
        self.plan, self.trainer, self.method, self.bad = plan, trainer, method, BadFiles()
        self.keeper = Keeper(plan.out, plan.saving.keep, plan.saving.milestones)
        self.whole = True  # between two steps, and what could be saved was
        path = plan.out / _BAD
        self.bad_before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        self.saved_step = saved.state.step if saved else -1
        if saved:
            self.keeper.mend(saved)
        self.save()
        write_text(plan.out / "preset.json", plan.preset.model_dump_json(indent=2))

    def step(self, batch: object, watch: bool) -> dict[str, torch.Tensor | float]:
        """One step.

        Raises:
            DinoError: The device's memory is too small for it.
        """
        self.whole = False
        try:
            values = self.trainer.step(batch, watch=watch)
        except torch.OutOfMemoryError as error:
            size, parts = self.plan.preset.training.batch_size, self.plan.accumulate
            more = next((f"--accumulate {n}, which learns the same; or " for n in equal_parts(size) if n > parts), "")
            raise DinoError(
                f"the device's memory is too small for a batch of {size} in {parts} parts",
                f"{more}--batch-size {max(1, size // 2)}",
            ) from error
        self.whole = True
        return values

    def save(self) -> None:
        """Save, unless this step is."""
        step, source = self.trainer.clock.step, self.plan.source
        if step != self.saved_step:
            self.whole = False
            state = State(
                step=step,
                stop=self.plan.stop,
                preset=self.plan.preset,
                images=ImageFacts(where=source.where, count=source.count, fingerprint=source.fingerprint),
                init=self.plan.init,
                lanes=max(1, self.plan.workers),
            )
            self.keeper.write(state, self.trainer, self.method.teacher)
            self.whole = True
        self.saved_step, self._saved = step, time.perf_counter()
        if self.bad.reasons:
            lines = {f"{path!r}\t{reason}" for path, reason in self.bad.reasons.items()}
            write_text(self.plan.out / _BAD, "".join(f"{line}\n" for line in sorted(lines.union(self.bad_before))))

    def save_now_and_then(self) -> bool:
        """Save where it is time to, and say whether it was."""
        saving, step = self.plan.saving, self.trainer.clock.step
        due = [n for n in (saving.steps, saving.milestones) if n and step % n == 0]
        if not due and not (saving.seconds and time.perf_counter() - self._saved > saving.seconds):
            return False
        self.save()
        return True

    def close(self) -> None:
        """Save, unless a step or a save was broken off: then the state before it is the newest."""
        if self.whole:
            self.save()


def start_from(method: SelfDistillation, source: str) -> list[str]:
    """Put weights into student and teacher: the backbone's, and those of the heads that the source has in that shape.

    Returns:
        The heads that stay fresh.

    Raises:
        DinoError: The source is not there, or its backbone is of another shape.
    """
    weights, fresh = initial_weights(source), []
    for name, head in method.student.heads.items():
        stored = weights.heads.get(name, {})
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in head.state_dict().items()}:
            fresh.append(name)
    for network in (method.student, method.teacher):
        load_strictly(network.backbone.model, weights.backbone, source)
        for name, head in network.heads.items():
            if name not in fresh:
                head.load_state_dict(weights.heads[name])
    return fresh


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is no longer empty once a signal asked to stop; a second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    # What Ctrl-C, `kill` and schedulers send; SIGUSR1 is not on every system.
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    # Signals belong to the main thread; a run started from another one goes without.
    try:
        before = {name: signal.signal(getattr(signal, name), note) for name in names}
    except ValueError:
        before = {}
    try:
        yield came
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)

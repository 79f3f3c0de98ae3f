"""Pretraining: preset and images to a run folder."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dinocli.core.atomic import write_text
from dinocli.core.device import autocast, keep_freed_memory
from dinocli.core.distributed import any_of, from_first, gathered, rank, size
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, held
from dinocli.data.loader.batch import BadFiles, Share
from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.shards import Shards
from dinocli.engine.parallel import parallel
from dinocli.engine.trainer import Trainer
from dinocli.method.distillation import SelfDistillation
from dinocli.monitor import Monitor
from dinocli.planning import Plan, equal_parts
from dinocli.states import ImageFacts, Keeper, Saved, State, changes, newest, other_contents, sample_of, saved_states
from dinocli.stopping import stop_signals
from dinocli.viz.report import CURVES, REPORT
from dinocli.watching import Progress, Watch, check_weights
from dinocli.weights.load import start_from

_BAD = "bad_images.txt"
# Files of a run that has saved a state. Without a state the folder is refused, so they are never overwritten.
_WRITTEN = (CHECKPOINT, "preset.json", "metrics.jsonl", REPORT, CURVES, _BAD)


@dataclass(frozen=True)
class Run:
    """Result of a pretraining run.

    Attributes:
        folder: Run folder.
        checkpoint: Teacher checkpoint in the run folder.
        began: Step that the run resumed from, or 0 for a new run.
        step: Number of completed steps.
        stopped: True if the user stopped the run before its last step.
        loss: Last finite logged loss, if any.
        seconds: Wall time of the run.
        bad: Image files that could not be read.
        cached: Number of images in the pixel cache, or None without a cache.
        fresh_heads: Heads with random weights: the initial weights lack them, or have another shape.
        skipped: Number of steps skipped because of a non-finite loss or gradient.
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
    """Train, and write a run folder with the teacher, the resolved preset, the metrics and states to resume from.

    If the folder holds an unfinished run of the same preset on the same images, resume from its newest valid state.
    Ctrl-C, SIGTERM or SIGUSR1 stop the run after the current step and save everything. A second Ctrl-C stops it at once
    without saving.

    Args:
        plan: Settings of the run.
        report: Callback that receives the progress at each logged step.
        note: Callback that receives one-line messages for the user.

    Raises:
        DinoError: If the folder is taken, the images cannot be read, the initial weights do not fit, the device runs
            out of memory, or nothing is learned.
    """
    began = time.perf_counter()
    if plan.device.type == "cpu":
        keep_freed_memory()
    with (
        held(plan.out) if rank() == 0 else nullcontext(),
        stop_signals(note) as stopping,
        _collect_on_request() as tidy,
    ):
        saved = _find_saved(plan, note)
        if saved:
            plan = going_on(plan, saved.state, note)
            if saved.state.step >= plan.stop:  # finished: nothing new to evaluate or draw
                plan = replace(plan, report=False, monitor=None)
        trainer, method, fresh = _trainer(plan, saved, note)
        watch = Watch(plan, trainer, method, report, note)
        session = _Session(plan, trainer, method, saved)
        batches = _batches(plan, trainer, method)
        session.bad = batches.bad
        late = False
        try:
            watch.begin()
            for batch in batches if trainer.clock.step < plan.stop else ():
                if stopping.asked and size() == 1:
                    break
                stopping.step(session.took)
                due = watch.due() or late
                values = session.step(batch, due)
                watch.saw(batch.rows, batches.waited)
                if due:
                    watch.log(values)
                    tidy()
                # Clocks and signals differ between processes, so all processes decide together.
                late, save, stop = any_of(watch.late, session.late, stopping.asked)
                stopping.check()
                if session.save_now_and_then(save):
                    watch.draw()
                if stop or trainer.clock.step >= plan.stop:
                    break
            stopping.finish()
        finally:
            batches.close()
            if not stopping.at_once:
                session.close(broken=sys.exception() is not None)
        watch.draw(last=True)
    return Run(
        folder=plan.out,
        checkpoint=plan.out / CHECKPOINT,
        began=saved.state.step if saved else 0,
        step=trainer.clock.step,
        stopped=trainer.clock.step < plan.stop,
        loss=watch.loss,
        seconds=time.perf_counter() - began,
        bad=session.all_bad,
        cached=batches.cache.kept if batches.cache else None,
        fresh_heads=fresh,
        skipped=int(trainer.skipped[0]),
    )


def _find_saved(plan: Plan, note: Callable[[str], None]) -> Saved | None:
    """Return the state to resume from, or None for a new run.

    Raises:
        DinoError: If the folder's contents cannot be resumed, or the processes see different images.
    """
    if len(set(gathered(plan.source.fingerprint))) > 1:
        raise DinoError(
            f"the processes of this run see different images in {plan.source.where}",
            "give all machines the same images",
        )
    # Only the first process reads, because it may set corrupt states aside.
    saved = from_first(newest(plan.out, note) if rank() == 0 else None)
    if saved is None:
        _refuse_taken(plan.out)
    return saved


def _refuse_taken(out: Path) -> None:
    taken = next((name for name in _WRITTEN if (out / name).exists()), None)
    if taken:
        weights = f", and --init {out} to start from its weights" if taken == CHECKPOINT else ""
        raise DinoError(f"{out} holds a {taken} but no valid state to resume from", f"use another --out{weights}")


def rehearse(plan: Plan, note: Callable[[str], None] = lambda line: None) -> None:
    """Check a plan's run folder, weights, teacher and monitor, with the errors of a real run, and write nothing.

    Args:
        plan: Settings of the run to check.
        note: Callback that receives one-line messages for the user.

    Raises:
        DinoError: If the run would raise it before its first step.
    """
    saved = None
    if plan.out.is_dir():
        with held(plan.out):
            states = [state for _, state in saved_states(plan.out)]
        saved = next((state for state in states if state), None)
        if saved:
            going_on(plan, saved, note)
        elif not states:
            _refuse_taken(plan.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that copying to meta tensors has no effect
        with torch.device("meta"):
            method = plan.method()
        if plan.teacher:
            plan.teacher.load(method.teacher)
        if plan.init and not saved:
            start_from(method, plan.init, note)
    if plan.monitor:
        Monitor(plan.monitor, plan.preset, plan.workers)


def going_on(plan: Plan, state: State, note: Callable[[str], None]) -> Plan:
    """Return the plan of a resumed run, and report each difference from the requested one.

    Raises:
        DinoError: If the preset, the images or the frozen teacher differ.
    """
    for line in changes(plan.preset, state, plan.clock):
        note(line)
    if state.images.fingerprint != plan.source.fingerprint:
        was = f"{state.images.count or 'an unknown number'} in {state.images.where}"
        raise DinoError(
            f"the images have changed since {plan.out} began: {was} then, {plan.source.count or 'others'} in "
            f"{plan.source.where} now",
            f"use another --out, and --init {plan.out} to start from its weights",
        )
    changed = other_contents(state.images.contents, plan.source) if rank() == 0 else None
    if changed:
        note(changed)
    if plan.teacher and plan.teacher.fingerprint != state.teacher:
        raise DinoError(
            f"the run in {plan.out} began with another teacher than {plan.teacher.source}",
            "name its own teacher with --teacher, or use another --out",
        )
    if plan.init and plan.init != state.init:
        note(f"note: ignoring --init {plan.init}: resuming from this run's own checkpoint")
    if isinstance(plan.source, Shards) and _lanes(plan) != state.lanes:
        each, rest = divmod(state.lanes, size())
        if rest:
            note(
                f"note: {_lanes(plan)} processes read the shards instead of {state.lanes}: the image order changes, "
                "and in this epoch some images repeat and some are skipped"
            )
        else:
            note(f"note: using --workers {each} as before: the order of the images in tar shards depends on it")
            plan = replace(plan, workers=each)
    if state.step < plan.stop:
        note(f"resuming from step {state.step} of {plan.stop} in {plan.out}")
    else:
        note(f"{plan.out} is finished: {state.step} steps done, {plan.stop} requested")
    return plan


def _lanes(plan: Plan) -> int:
    """Return the number of reading processes of the whole run."""
    return size() * max(1, plan.workers)


def _trainer(
    plan: Plan, saved: Saved | None, note: Callable[[str], None]
) -> tuple[Trainer, SelfDistillation, list[str]]:
    """Return the trainer at its starting step, its method, and the names of heads that keep random weights."""
    preset = plan.preset
    torch.manual_seed(preset.training.seed)
    method = plan.method()
    for network in (method.student, method.teacher) if plan.compiled else ():
        network.compile_blocks()
    if plan.teacher:
        plan.teacher.load(method.teacher)
    fresh = start_from(method, plan.init, note) if plan.init and not saved else []
    trainer = Trainer(
        method.to(plan.device),
        preset.optimizer,
        replace(plan.clock, step=saved.state.step if saved else 0),
        batch_size=preset.training.batch_size,
        accumulate=plan.accumulate,
        precision=autocast(plan.device, preset.training.precision),
        seed=preset.training.seed,
        guarded=True,
        parallel=parallel(plan.parallel),
    )
    if saved:
        saved.restore(trainer)
    return trainer, method, fresh


def _batches(plan: Plan, trainer: Trainer, method: SelfDistillation) -> TrainBatches:
    return TrainBatches(
        plan.source,
        plan.preset.views,
        batch_size=plan.images_each,
        seed=plan.preset.training.seed,
        images=plan.preset.images,
        start=trainer.clock.step,
        steps_per_epoch=trainer.clock.steps_per_epoch,
        workers=plan.workers,
        device=plan.device,
        share=Share(rank(), size()),
        cache=plan.cache,
        compiled=plan.compiled,
        grid=method.student.backbone.grid,
    )


class _Session:
    """Steps and saves of a run; a save before the first step reveals a full disk early."""

    def __init__(self, plan: Plan, trainer: Trainer, method: SelfDistillation, saved: Saved | None) -> None:
        self.plan, self.trainer, self.method, self.bad = plan, trainer, method, BadFiles()
        self.all_bad = BadFiles()  # gathered from all processes
        source = plan.source
        contents = saved.state.images.contents if saved else ""  # as they were when the run began
        contents = contents or (sample_of(source) if rank() == 0 else "")
        self.images = ImageFacts(
            where=source.where, count=source.count, fingerprint=source.fingerprint, contents=contents
        )
        self.keeper = Keeper(plan.out, plan.saving.keep, plan.saving.milestones)
        self.whole = True  # False during a step or a save, and after one failed
        self.took = 0.0  # seconds that the last save took
        path = plan.out / _BAD
        self.bad_before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        self.saved_step = saved.state.step if saved else -1
        if saved:
            self.keeper.mend(saved)
        self.save()
        if rank() == 0:
            write_text(plan.out / "preset.json", plan.preset.model_dump_json(indent=2))

    def step(self, batch: object, watch: bool) -> dict[str, torch.Tensor | float]:
        """Run one step.

        Raises:
            DinoError: If the device runs out of memory.
        """
        self.whole = False
        try:
            values = self.trainer.step(batch, watch=watch)
        except torch.OutOfMemoryError as error:
            whole, each, parts = self.plan.preset.training.batch_size, self.plan.images_each, self.plan.accumulate
            same = [f"--accumulate {n}" for n in equal_parts(each) if n > parts][:1]
            if not self.plan.recompute and self.method.student.blocks():
                same.append("--recompute")
            more = f"{' or '.join(same)}, with the same gradient; or " if same else ""
            raise DinoError(
                f"the device's memory is too small for a batch of {each} in {parts} parts",
                f"{more}--batch-size {max(1, whole // 2)}",
            ) from error
        self.whole = True
        return values

    def save(self, *, broken: bool = False) -> None:
        """Save this step unless it is saved already; after a failure (`broken`), do so without the other processes.

        Raises:
            DinoError: If weights are not finite. Earlier states are kept.
        """
        step = self.trainer.clock.step
        new = step != self.saved_step
        if new and broken:
            new = self.trainer.is_finite()  # no error about the weights: the run's own error follows
        elif new:
            check_weights(self.trainer, self.plan.out)
        if new:
            began, self.whole = time.perf_counter(), False
            state = State(
                step=step,
                stop=self.plan.stop,
                preset=self.plan.preset,
                images=self.images,
                init=self.plan.init,
                teacher=self.plan.teacher.fingerprint if self.plan.teacher else None,
                lanes=_lanes(self.plan),
            )
            self.keeper.write(state, self.trainer, self.method.average)
            self.whole, self.took = True, time.perf_counter() - began
        self.saved_step, self._saved = step, time.perf_counter()
        for reasons in [self.bad.reasons] if broken else gathered(self.bad.reasons):
            self.all_bad.reasons.update(reasons)
        if self.all_bad.reasons and rank() == 0:
            lines = {f"{path!r}\t{reason}" for path, reason in self.all_bad.reasons.items()}
            write_text(self.plan.out / _BAD, "".join(f"{line}\n" for line in sorted(lines.union(self.bad_before))))

    @property
    def late(self) -> bool:
        """True if the last save is longer ago than the chosen interval."""
        seconds = self.plan.saving.seconds
        return seconds is not None and time.perf_counter() - self._saved > seconds

    def save_now_and_then(self, late: bool) -> bool:
        """Save if `late`, or if the step's number requires it, and return True if so."""
        saving, step = self.plan.saving, self.trainer.clock.step
        due = late or any(n and step % n == 0 for n in (saving.steps, saving.milestones))
        if due:
            self.save()
        return due

    def close(self, *, broken: bool) -> None:
        """Save, unless a step or a save was interrupted: then the state before it stays the newest.

        Sharded weights can only be saved by all processes together, and a failed run may lack one.
        """
        if self.whole and not (broken and size() > 1 and self.plan.parallel == "fsdp"):
            self.save(broken=broken)


@contextmanager
def _collect_on_request() -> Iterator[Callable[[], object]]:
    """Collect garbage only on request: a step makes little, and searching for it stalls the device."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()  # later collections ignore networks and libraries
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was:
            gc.enable()

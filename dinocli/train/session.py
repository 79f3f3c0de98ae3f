"""Steps and saves of a run."""

from __future__ import annotations

import time

import torch

from dinocli.core.atomic import write_text
from dinocli.core.distributed import gathered, rank, size
from dinocli.core.errors import DinoError
from dinocli.data.loader.batch import BadFiles
from dinocli.engine.trainer import Trainer
from dinocli.method.distillation import SelfDistillation
from dinocli.train.logger import check_weights
from dinocli.train.plan import Plan, equal_parts
from dinocli.train.resume import BAD_IMAGES, reading_processes
from dinocli.train.state import ImageFacts, SavedState, State, StateStore, sample_of


class Session:
    """Steps and saves of a run; a save before the first step reveals a full disk early."""

    def __init__(self, plan: Plan, trainer: Trainer, method: SelfDistillation, saved: SavedState | None) -> None:
        self.plan, self.trainer, self.method, self.bad = plan, trainer, method, BadFiles()
        self.all_bad = BadFiles()  # gathered from all processes
        source = plan.source
        contents = saved.state.images.contents if saved else ""  # as they were when the run began
        contents = contents or (sample_of(source) if rank() == 0 else "")
        self.images = ImageFacts(
            where=source.where, count=source.count, fingerprint=source.fingerprint, contents=contents
        )
        self.store = StateStore(plan.out, plan.saving.keep, plan.saving.milestones)
        self.whole = True  # False during a step or a save, and after one failed
        self.took = 0.0  # seconds that the last save took
        path = plan.out / BAD_IMAGES
        self.bad_before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        self.saved_step = saved.state.step if saved else -1
        if saved:
            self.store.repair(saved)
        self.save()
        if rank() == 0:
            write_text(plan.out / "preset.json", plan.preset.model_dump_json(indent=2))

    def step(self, batch: object, log: bool) -> dict[str, torch.Tensor | float]:
        """Run one step.

        Raises:
            DinoError: If the device runs out of memory.
        """
        self.whole = False
        try:
            values = self.trainer.step(batch, log=log)
        except torch.OutOfMemoryError as error:
            whole, each, parts = self.plan.preset.training.batch_size, self.plan.images_each, self.plan.accumulate
            same = [f"--accumulate {n}" for n in equal_parts(each) if n > parts][:1]
            if not self.plan.recompute and self.method.student.blocks:
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
                lanes=reading_processes(self.plan),
            )
            self.store.write(state, self.trainer, self.method.average)
            self.whole, self.took = True, time.perf_counter() - began
        self.saved_step, self._saved = step, time.perf_counter()
        for reasons in [self.bad.reasons] if broken else gathered(self.bad.reasons):
            self.all_bad.reasons.update(reasons)
        if self.all_bad.reasons and rank() == 0:
            lines = {f"{path!r}\t{reason}" for path, reason in self.all_bad.reasons.items()}
            write_text(
                self.plan.out / BAD_IMAGES, "".join(f"{line}\n" for line in sorted(lines.union(self.bad_before)))
            )

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

"""Session: logs, saves and stop requests between the steps of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from dinocli.core.atomic import write_json, write_text
from dinocli.core.distributed import any_of, gathered, rank, size
from dinocli.core.errors import DinoError
from dinocli.core.runs import STAGES
from dinocli.data.loader.batch import BadFiles, Batch
from dinocli.data.loader.train import TrainBatches
from dinocli.engine.graph import GraphTrainer
from dinocli.engine.schedules import Clock
from dinocli.engine.trainer import Trainer, Values
from dinocli.models.network import Network
from dinocli.train.interrupts import Stopping
from dinocli.train.logger import Logger, check_weights
from dinocli.train.plan import Plan, equal_parts
from dinocli.train.resume import BAD_IMAGES, reading_processes
from dinocli.train.state import ImageFacts, SavedState, State, StateStore, sample_of


class Session:
    """Logs and saves of a run. It also saves before the first step, so that a full disk is noticed early.

    Args:
        plan: Settings of the run.
        trainer: Trainer at its starting step.
        network: Network that the run exports.
        logger: Logger of the steps.
        stopping: Stop request of the user.
        tidy: Function that collects garbage, called at logged steps.
        saved: State that the run resumes from, if any.

    Attributes:
        bad: Files that could not be read, from all processes, as of the last save.
    """

    def __init__(
        self,
        plan: Plan,
        trainer: Trainer,
        network: Network,
        logger: Logger,
        stopping: Stopping,
        tidy: Callable[[], object],
        saved: SavedState | None,
    ) -> None:
        self.plan, self.trainer, self.network, self.logger = plan, trainer, network, logger
        self.stopping, self._tidy = stopping, tidy
        self.bad, self._bad_here = BadFiles(), BadFiles()
        source = plan.source
        contents = saved.state.images.contents if saved else ""  # from the start of the run
        contents = contents or (sample_of(source) if rank() == 0 else "")
        self.images = ImageFacts(
            where=source.where, count=source.count, fingerprint=source.fingerprint, contents=contents
        )
        self.store = StateStore(plan.out, plan.saving.keep, plan.saving.milestones)
        self._during: Literal["", "views", "step", "evaluation", "save"] = ""  # keeps its value after a failure
        self._due = self._late = self._ends = False
        self._taken = torch.empty(0, dtype=torch.int64), 0.0  # rows of the step's batch, and seconds waited for data
        self._save_took = 0.0  # seconds
        path = plan.out / BAD_IMAGES
        self.bad_before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        self.saved_step = saved.state.step if saved else -1
        if saved:
            self.store.repair(saved)
        self.save()
        if rank() == 0:
            write_text(plan.out / "preset.json", plan.preset.model_dump_json(indent=2))
            if plan.stages:
                earlier = [stage.model_dump(mode="json") for stage in plan.stages]
                write_json(plan.out / STAGES, {"stages": earlier}, indent=2)

    def train(self, batches: TrainBatches) -> None:
        """Train until the plan's last step, or until the user stops the run. Evaluate before the first step.

        Raises:
            DinoError: If the device runs out of memory, or a failure check of `Logger.log` fails.
        """
        self._bad_here = batches.bad
        try:
            self._during = "evaluation"
            self.logger.begin()
            self._during = "views"
            self.trainer.fit(self._until_stopped(batches), self.plan.stop, self._after_step, self._is_due)
        except torch.OutOfMemoryError as error:
            if self._during == "save":
                raise
            raise self._too_large() from error

    def _until_stopped(self, batches: TrainBatches) -> Iterator[Batch]:
        for batch in batches:
            if self.stopping.requested and size() == 1:
                return
            self.stopping.step(self._save_took)
            self._during, self._taken = "step", (batch.rows, batches.waited)
            yield batch
            if self._ends:
                return

    def _is_due(self) -> bool:
        self._due = self.logger.due() or self._late
        return self._due

    def _after_step(self, clock: Clock, values: Values) -> None:
        self._during = ""
        self.logger.count(*self._taken)
        if self._due:
            self._during = "evaluation"
            self.logger.log(values)
            self._during = ""
            self._tidy()
        # Clocks and signals differ between processes, so all processes decide together.
        ends = self.stopping.requested or self.logger.stalled
        self._late, save, self._ends = any_of(self.logger.late, self._save_is_late, ends)
        self.stopping.check()
        saving = self.plan.saving
        if save or any(n and clock.step % n == 0 for n in (saving.steps, saving.milestones)):
            self.save()
            self.logger.draw()
        self._during = "views"

    @property
    def _save_is_late(self) -> bool:
        seconds = self.plan.saving.seconds
        return seconds is not None and time.perf_counter() - self._saved > seconds

    def _too_large(self) -> DinoError:
        """Return the error for a lack of memory in what was being done, with what lessens the memory of that."""
        plan, fewer = self.plan, f"--batch-size {max(1, self.plan.preset.training.batch_size // 2)}"
        graphs = "--no-graph" if isinstance(self.trainer, GraphTrainer) and self.trainer.keeps_graphs else ""
        if self._during == "evaluation":
            optional = {"no --monitor": plan.monitor, "--no-report": plan.report and not plan.keep_best}
            without = " and ".join(option for option, used in optional.items() if used)
            return DinoError(
                "the device's memory is too small for an evaluation beside the networks in training",
                " or ".join(filter(None, (graphs, without, fewer))),
            )
        each, parts = plan.images_each, plan.accumulate
        if self._during == "views":  # of the whole batch at once
            return DinoError(
                f"the device's memory is too small for the views of a batch of {each}",
                " or ".join(filter(None, (graphs, fewer))),
            )
        same = [f"--accumulate {n}" for n in equal_parts(each) if n > parts][:1]
        if not plan.recompute and self.network.blocks:
            same.append("--recompute")
        more = f"{' or '.join(same)}, with the same gradient; or " if same else ""
        return DinoError(
            f"the device's memory is too small for a batch of {each}{f' in {parts} parts' if parts > 1 else ''}",
            f"{more}{fewer}",
        )

    def save(self, *, broken: bool = False) -> None:
        """Save this step unless it is already saved. After a failure (`broken`), do not wait for other processes.

        Raises:
            DinoError: If weights are not finite. Earlier states are kept.
        """
        step = self.trainer.clock.step
        new = step != self.saved_step
        if new and broken:
            new = self.trainer.is_finite()  # raises no error, because the run's own error follows
        elif new:
            check_weights(self.trainer, self.plan.out)
        if new:
            began, self._during = time.perf_counter(), "save"
            state = State(
                step=step,
                stop=self.plan.stop,
                early=self.logger.stalled,
                preset=self.plan.preset,
                images=self.images,
                init=self.plan.init,
                teacher=self.plan.teacher.fingerprint if self.plan.teacher else None,
                stages=self.plan.stages,
                lanes=reading_processes(self.plan),
            )
            self.store.write(state, self.trainer, self.network)
            self._during, self._save_took = "", time.perf_counter() - began
        self.saved_step, self._saved = step, time.perf_counter()
        for reasons in [self._bad_here.reasons] if broken else gathered(self._bad_here.reasons):
            self.bad.reasons.update(reasons)
        if self.bad.reasons and rank() == 0:
            lines = {f"{path!r}\t{reason}\n" for path, reason in self.bad.reasons.items()}
            lines.update(f"{line}\n" for line in self.bad_before)
            write_text(self.plan.out / BAD_IMAGES, "".join(sorted(lines)))

    def close(self, *, broken: bool) -> None:
        """Save, unless a step or a save was interrupted: then the previous state stays the newest.

        After a failure (`broken`), sharded weights are not saved either: that needs all processes, and one may be gone.
        """
        if self._during not in ("step", "save") and not (broken and size() > 1 and self.plan.parallel == "fsdp"):
            self.save(broken=broken)

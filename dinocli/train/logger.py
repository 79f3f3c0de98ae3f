"""Logs, evaluations and failure checks of a run in progress."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinocli.core.atomic import write_text
from dinocli.core.device import peak_memory
from dinocli.core.distributed import any_of, from_first, gathered, rank, size
from dinocli.core.errors import DinoError
from dinocli.core.runs import CURVES, METRICS
from dinocli.data.sources.indexed import Images
from dinocli.engine.checkpoint import state_of
from dinocli.engine.metrics import Metrics, Pace
from dinocli.engine.trainer import Trainer, Values
from dinocli.features.encoder import NotFinite
from dinocli.method.preset import AnyMethod
from dinocli.models.network import Network
from dinocli.train.best import BestWeights
from dinocli.train.collapse import CollapseDetector
from dinocli.train.held_out import HeldOut
from dinocli.train.knn_monitor import KnnMonitor, steps_between_evaluations
from dinocli.train.plan import Plan
from dinocli.train.snapshots import VIEWS, Photos
from dinocli.train.trackers import Guarded, Tracked
from dinocli.weights.checkpoint import not_finite

LOG_EVERY = 10  # steps; each log makes the host wait for the device
_LOG_AFTER = 5.0  # seconds; slow steps are logged more often
_DRAW_AFTER = 60.0  # seconds between reports in runs that save every few steps
_FALL = 2.0  # smallest drop of the k-NN accuracy that causes a warning, in percentage points
GIVE_UP = 20  # skipped steps in a row that end a run


@dataclass(frozen=True)
class Progress:
    """Progress of a run, for display.

    Attributes:
        step: Number of completed steps.
        loss: Loss of the last step.
        images_per_second: Throughput since the last report.
        skipped: Number of steps skipped because of a non-finite loss or gradient.
        score: Last accuracy of the monitor, in percent. None without a monitor.
        title: Name of the score.
    """

    step: int
    loss: float
    images_per_second: float
    skipped: int = 0
    score: float | None = None
    title: str = ""

    @property
    def note(self) -> str:
        """Text beside a progress bar."""
        score = f"  {self.title} {self.score:.1f} %" if self.score is not None else ""
        left_out = f"  {self.skipped} steps skipped" if self.skipped else ""
        return f"loss {self.loss:.3f}{score}  {self.images_per_second:.0f} images/s{left_out}"


def check_weights(trainer: Trainer, run: Path) -> None:
    """Check a trainer's weights, buffers and moments. All processes must call this function.

    Raises:
        DinoError: If a value is not finite. The error names the step and the first tensor.
    """
    (lost,) = any_of(not trainer.is_finite())
    if lost:
        found = (not_finite(state_of(trainer)) or "a buffer holds values that are not finite").removeprefix("method/")
        raise DinoError(
            f"after step {trainer.clock.step} {found}; {run} keeps the last finite state",
            f"start again with --out NEW --init {run} and a lower --set optimizer.lr.start=VALUE, or --set "
            "training.precision=float32",
        )


class Logger:
    """Logs, evaluations and failure checks of a run.

    Args:
        plan: Settings of the run.
        trainer: Trainer whose steps are logged.
        method: Networks that the trainer trains.
        report: Callback that receives the progress at each logged step.
        note: Callback that receives one-line messages for the user.
        monitor: Labelled set of the first process, if any.

    Attributes:
        loss: Last finite logged loss, or None before the first.
        score: Last accuracy of the monitor, in percent. None without a monitor.
    """

    def __init__(
        self,
        plan: Plan,
        trainer: Trainer,
        method: AnyMethod,
        report: Callable[[Progress], None],
        note: Callable[[str], None],
        monitor: KnnMonitor | HeldOut | None = None,
    ) -> None:
        self.plan, self.trainer, self.method, self.report, self.note = plan, trainer, method, report, note
        self.loss: float | None = None
        self.score: float | None = None
        self._best, self._fallen = 0.0, False
        first = rank() == 0  # only the first process evaluates and writes
        self._monitor = monitor
        keeps = (plan.monitor or monitor.where) if monitor and plan.keep_best else None
        self._best_weights = BestWeights(plan.out, plan.preset, keeps) if keeps else None
        self._photos = Photos.of(plan.source, plan.preset) if first and plan.report else None
        photos = len(self._photos.pool) * (1 + VIEWS * plan.keep_best) if self._photos else 0
        images = (self._monitor.images if self._monitor else 0) + photos
        images = from_first(images)
        preset = plan.preset
        self._every = 0  # steps between evaluations; 0 for none
        if images:
            between = steps_between_evaluations(images, plan.stop, preset.training.batch_size, preset.views)
            self._every = plan.monitor_every or between
        self._drawn = -math.inf
        self._metrics = Metrics(plan.out / METRICS, trainer.clock.step) if first else None
        run = Tracked(plan.out, preset.model_dump(mode="json"), trainer.clock.step)
        self._trackers = [Guarded(name, run, note) for name in plan.trackers if first]
        self._pace, self._waited = Pace(), 0.0
        self._last: deque[tuple[int, Tensor]] = deque(maxlen=GIVE_UP + LOG_EVERY)
        self._collapse = CollapseDetector(plan.preset, plan.clock.total)

    def due(self) -> bool:
        """Return True if the next step must be logged because of its number."""
        step = self.trainer.clock.step + 1
        return step % LOG_EVERY == 0 or step in (1, self.plan.stop) or self._evaluates_at(step)

    @property
    def late(self) -> bool:
        """True if the next step should be logged because the last log was too long ago."""
        return self._pace.elapsed > _LOG_AFTER

    @property
    def stalled(self) -> bool:
        """True if the plan's `patience` has run out: evaluations without a better score. Known to the first process."""
        best, patience = self._best_weights, self.plan.patience
        if best is None or patience is None:
            return False
        return self.trainer.clock.step - best.step >= patience * self._every

    def begin(self) -> None:
        """Evaluate before the first step, as a baseline for later results."""
        if self._evaluates_at(self.trainer.clock.step) and self.trainer.clock.step == 0:
            self._write({"step": 0, "epoch": 0.0, **self._evaluate()})
            if self._monitor and self.score is not None:
                title, where = self._monitor.title, self._monitor.where
                self.note(f"{title} before the first step: {self.score:.1f} % of {where}")

    def count(self, rows: Tensor, waited: float) -> None:
        """Count a step's images, and keep their indices for an error message.

        Args:
            rows: Index of each image in its source. [B]
            waited: Seconds spent waiting for data since the start.
        """
        self._waited = waited
        self._pace.add(self.plan.preset.training.batch_size)
        self._last.append((self.trainer.clock.step, rows))

    def _evaluates_at(self, step: int) -> bool:
        return self._every > 0 and (step % self._every == 0 or step == self.plan.stop)

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the student's moving average on the labelled images and the photos."""
        found: dict[str, float] = {}
        average = self._average()
        if self._monitor:
            answers = self._monitor.evaluate(average)
            self.score = answers.accuracy
            found[self._monitor.key] = round(self.score, 3)
            if self._best_weights:
                self._best_weights.update(answers, average, self.trainer.clock.step)
            if isinstance(self._monitor, KnnMonitor):
                self._warn_of_a_fall(self.score, self._monitor.measured)
        if self._photos:
            try:
                views = VIEWS if self.plan.keep_best else 0
                found |= self._photos.snapshot(average, self.trainer.clock.step, self.plan.out, views=views)
                for name in ("attention", "neighbours"):
                    self._send_picture(name, self.plan.out / "pictures" / f"{name}-{self.trainer.clock.step}.jpg")
            except NotFinite as error:  # training continues without the picture
                self.note(f"note: no pictures at step {self.trainer.clock.step}: {error.message}")
        return found

    def _warn_of_a_fall(self, knn: float, images: int) -> None:
        """Warn once if the accuracy falls below its best by more than chance; warn again only after a recovery."""
        self._best = max(self._best, knn)
        chance = 100 * math.sqrt(self._best / 100 * (1 - self._best / 100) / images)
        fallen = knn < self._best - max(_FALL, 3 * chance)
        if fallen and not self._fallen:
            self.note(f"warning: k-NN has fallen from {self._best:.1f} to {knn:.1f} %: the backbone is forgetting")
            lower = "a lower --set optimizer.lr.start=VALUE"
            self.note(
                f"hint: train as --preset continue-dinov2 does: --set backbone.learning.frozen_epochs=N, {lower}, "
                "--set teacher.momentum.start=0.999"
                if self.plan.init
                else f"hint: {lower}; --milestones N keeps the states before the drop"
            )
        self._fallen = fallen

    def _average(self) -> Network:
        """Return the student's moving average; if it is sharded, the first process gets a full copy."""
        if size() == 1 or self.plan.parallel == "ddp":
            return self.method.average
        weights = self.method.average.weights()  # a collective call: all processes must take part
        if rank() > 0:
            return self.method.average
        copy = self.plan.preset.network().to(self.plan.device)
        copy.load_weights(weights, "the run")
        return copy

    def draw(self, *, last: bool = False) -> None:
        """Draw the report if it is enabled, at most once a minute and at the end (`last`)."""
        if self._photos and (last or time.perf_counter() - self._drawn > _DRAW_AFTER):
            try:
                from dinocli.viz.report import write_report  # only here: it imports matplotlib

                write_report(self.plan.out)
                self._send_picture("curves", self.plan.out / CURVES)
            except Exception as error:  # training continues without the report
                self.note(f"note: the report could not be drawn: {error}")
            self._drawn = time.perf_counter()

    def log(self, values: Values) -> None:
        """Log a step, and check for failures. The host waits for the device.

        Raises:
            DinoError: If weights are not finite, if 20 steps in a row or all steps were skipped, or if training has
                collapsed and `on_collapse` is `stop`.
        """
        clock = self.trainer.clock
        plain = {name: float(value) for name, value in values.items()}
        skipped, in_a_row = self.trainer.skipped.tolist()
        rate, waiting = self._pace.look(self._waited)
        waits, memory = zip(*gathered((waiting, peak_memory(self.plan.device))), strict=True)
        check_weights(self.trainer, self.plan.out)
        scores = {}
        if self._evaluates_at(clock.step):
            scores = self._evaluate()
            self._pace.look(self._waited)  # excludes the evaluation from the throughput
        groups = self.trainer.optimizer.param_groups
        self._write(
            {
                "step": clock.step,
                "epoch": round(clock.step / clock.steps_per_epoch, 4),
                **plain,
                "lr": max(group["lr"] for group in groups),  # the heads' rate, if layers have their own
                "weight_decay": max(group["weight_decay"] for group in groups),
                "images_per_second": round(rate, 2),
                "data_wait": round(sum(waits) / len(waits), 4),
                "peak_memory": max(memory),
                "skipped": skipped,
                **scores,
            }
        )
        if math.isfinite(plain["loss"]):
            self.loss = plain["loss"]
        title = self._monitor.title if self._monitor else ""
        self.report(Progress(clock.step, plain["loss"], rate, skipped, self.score, title))
        # A run of fewer steps that skipped all of them has learned nothing either.
        if in_a_row >= GIVE_UP or (clock.step == self.plan.stop and in_a_row == clock.step):
            self._give_up(in_a_row)
        collapses = self._collapse.update(clock.step, plain)
        if collapses and self.plan.on_collapse == "stop":
            remedies = dict.fromkeys(collapse.remedy for collapse in collapses)
            raise DinoError("; ".join(collapse.words for collapse in collapses), "; ".join(remedies))
        for collapse in collapses:
            self.note(f"warning: {collapse.words}")
            self.note(f"hint: {collapse.remedy}")

    def _write(self, line: dict[str, float | int]) -> None:
        if self._metrics:
            self._metrics.write(line)
        for tracker in self._trackers:
            tracker.write(line)

    def _send_picture(self, name: str, path: Path) -> None:
        for tracker in self._trackers:
            tracker.picture(name, path, self.trainer.clock.step)

    def close(self) -> None:
        """End the trackers, which then send what is left."""
        for tracker in self._trackers:
            tracker.close()

    def _give_up(self, in_a_row: int) -> None:
        source, path = self.plan.source, self.plan.out / "not_finite.txt"
        name = source.names.__getitem__ if isinstance(source, Images) else "image {} of the stream".format
        # Each process has a part of every step's images, and all raise this error at the same step.
        shares = zip(*gathered([(step, rows.tolist()) for step, rows in self._last]), strict=True)
        lines = (f"{step}\t{name(row)!r}\n" for same in shares for step, rows in same for row in rows)
        if rank() == 0:
            write_text(path, "".join(lines))
        raise DinoError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, up to {self.trainer.clock.step}; "
            f"these steps changed nothing, and {path} lists their images",
            f"check those images; or start again from an earlier state, --out NEW --init {self.plan.out}/state/STEP, "
            "with --set training.precision=float32, a lower --set optimizer.lr.start=VALUE, or "
            "--set optimizer.clip='{kind=\"each_parameter\", norm=0.3}'",
        )

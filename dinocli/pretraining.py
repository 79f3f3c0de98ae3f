"""Pretraining: preset and images to a run folder."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dinocli.atomic import write_text
from dinocli.data.loader import BadFiles, TrainBatches
from dinocli.device import autocast, peak_memory
from dinocli.distillation import SelfDistillation
from dinocli.encoder import initial_weights
from dinocli.engine.metrics import Metrics, Pace
from dinocli.engine.trainer import Trainer, Values
from dinocli.errors import DinoError
from dinocli.models.network import load_strictly
from dinocli.planning import Plan
from dinocli.runs import CHECKPOINT
from dinocli.schedules import Clock
from dinocli.weights import write_checkpoint

_LOG_EVERY = 10  # steps; each log makes the host wait for the device once
_LOG_AFTER = 5.0  # seconds, for steps so slow that ten of them leave a person waiting
_SAVE_AFTER = 600.0  # seconds


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it.

    Attributes:
        step: Steps done.
        loss: Of the last step.
        images_per_second: Since the last report.
    """

    step: int
    loss: float
    images_per_second: float

    @property
    def note(self) -> str:
        """What stands beside a bar."""
        return f"loss {self.loss:.3f}  {self.images_per_second:.0f} images/s"


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: The run folder.
        checkpoint: The teacher in it.
        step: Steps done.
        stopped: Whether it was stopped by the user before its end.
        loss: Of the last step; absent where none was done.
        seconds: It took.
        bad: Files that could not be read.
        cached: Images whose pixels were kept, where that was asked for.
        fresh_heads: Heads that the weights to start from did not have, or in another shape.
    """

    folder: Path
    checkpoint: Path
    step: int
    stopped: bool
    loss: float | None
    seconds: float
    bad: BadFiles
    cached: int | None
    fresh_heads: list[str]


def pretrain(plan: Plan, report: Callable[[Progress], None]) -> Run:
    """Train, and leave a run folder with the teacher, the resolved preset and the metrics.

    Ctrl-C or SIGTERM ends it after the step that is going on, with the weights saved.

    Raises:
        DinoError: The folder is taken, the images cannot be read, the weights to start from do not fit, the device's
            memory is too small, or the loss is no longer a number.
    """
    preset, began, folder = plan.preset, time.perf_counter(), plan.out
    if (folder / CHECKPOINT).exists():
        raise DinoError(f"{folder} already holds a run", "take another --out, or leave it out for the next free folder")
    torch.manual_seed(preset.training.seed)
    method = preset.method()
    fresh = start_from(method, plan.init) if plan.init else []
    method = method.to(plan.device)
    batch_size = preset.training.batch_size
    trainer = Trainer(
        method,
        preset.optimizer,
        plan.clock,
        batch_size=batch_size,
        precision=autocast(plan.device, preset.training.precision),
    )
    saver = _Saver(folder, method, plan)
    write_text(folder / "preset.json", preset.model_dump_json(indent=2))
    metrics, pace = Metrics(folder / "metrics.jsonl"), Pace()
    last_loss: float | None = None

    with _stop_signals() as asked_to_stop:

        def on_step(clock: Clock, values: Values) -> bool:
            nonlocal last_loss
            pace.add(batch_size)
            stop = bool(asked_to_stop)
            if clock.step % _LOG_EVERY == 0 or clock.step in (1, plan.stop) or stop or pace.elapsed > _LOG_AFTER:
                plain = {name: float(value) for name, value in values.items()}  # waits for the device
                last_loss = plain["loss"]
                rate, waiting = pace.look(batches.waited)
                metrics.write(_line(clock, plain, rate, waiting, trainer, plan))
                if not math.isfinite(last_loss):
                    raise DinoError(
                        f"the loss is {last_loss} at step {clock.step}; the weights of step {saver.step} are kept",
                        "lower the rate (--set optimizer.lr.start=...), or clip: "
                        "--set optimizer.clip='{kind=\"each_parameter\", norm=0.3}'",
                    )
                report(Progress(clock.step, last_loss, rate))
                saver.save_now_and_then(clock.step)  # here and nowhere else: the loss has just been seen to be a number
            return stop

        batches = TrainBatches(
            plan.source,
            preset.views,
            batch_size=batch_size,
            seed=preset.training.seed,
            images=preset.images,
            workers=plan.workers,
            device=plan.device,
            cache=plan.cache,
        )
        try:
            trainer.fit(batches, plan.stop, on_step)
        except torch.OutOfMemoryError as error:
            raise DinoError(
                f"the device's memory is too small for a batch of {batch_size}",
                f"--batch-size {max(1, batch_size // 2)}",
            ) from error
        finally:
            batches.close()
            if last_loss is None or math.isfinite(last_loss):
                saver.save(trainer.clock.step)
            if batches.bad.reasons:
                lines = (f"{path!r}\t{reason}\n" for path, reason in sorted(batches.bad.reasons.items()))
                write_text(folder / "bad_images.txt", "".join(lines))
    return Run(
        folder=folder,
        checkpoint=folder / CHECKPOINT,
        step=trainer.clock.step,
        stopped=trainer.clock.step < plan.stop,
        loss=last_loss,
        seconds=time.perf_counter() - began,
        bad=batches.bad,
        cached=batches.cache.kept if batches.cache else None,
        fresh_heads=fresh,
    )


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


class _Saver:
    """Writes the teacher: once before the first step, so that a full disk is known then, and now and again after it."""

    def __init__(self, folder: Path, method: SelfDistillation, plan: Plan) -> None:
        self.path, self.method, self.plan = folder / CHECKPOINT, method, plan
        existed = folder.exists()
        try:
            self.save(0)
        except OSError:
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def save(self, step: int) -> None:
        write_checkpoint(self.path, self.method.teacher, self.plan.preset, step)
        self.step, self._saved = step, time.perf_counter()

    def save_now_and_then(self, step: int) -> None:
        if time.perf_counter() - self._saved > _SAVE_AFTER:
            self.save(step)


def _line(
    clock: Clock, values: dict[str, float], rate: float, waiting: float, trainer: Trainer, plan: Plan
) -> dict[str, float | int]:
    group = trainer.optimizer.param_groups[0]
    return {
        "step": clock.step,
        "epoch": round(clock.step / clock.steps_per_epoch, 4),
        **values,
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "images_per_second": round(rate, 2),
        "data_wait": round(waiting, 4),
        "peak_memory": peak_memory(plan.device),
    }


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C or SIGTERM came; a second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    # Signals belong to the main thread; a run started from another one goes without.
    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Processes that each run one method of a training step on request."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from stopwatch import PARTS, Stopwatch
from ways import Job, Way, batches, build, first_losses

from dinocli.core.device import peak_memory


class Steps:
    """Training steps of one method, with their measurements."""

    def __init__(self, way: Way, job: Job) -> None:
        self.way, self.job, self.device = way, job, torch.device(job.device)
        preset = job.read()
        self.stepper = build(way, preset, self.device)
        self.batches = batches(way, job, preset, self.device)
        self._do(2 if self.on_gpu or way.compiled else 1)
        self._rest()
        forget_peak(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self) -> float:
        """Return the mean seconds of a step over one turn."""
        # Warm up: during the turns of others, memory was released and a GPU lowered its clocks.
        self._do(2 if self.on_gpu else 1)
        began = self.job.now()
        self._do(self.job.steps)
        took = (self.job.now() - began) / self.job.steps
        self._rest()
        return took

    def memory(self) -> int:
        """Return the peak memory in bytes of all steps since the warm-up."""
        return peak(self.device)

    def parts(self) -> dict[str, float]:
        """Return the median seconds of each part, over one turn or at least three steps."""
        watch = Stopwatch(self.device, self.job.now)
        watch.attach(self.stepper)
        self._do(2 if self.on_gpu else 1)
        turns = []
        for _ in range(max(3, self.job.steps)):
            watch.begin()
            with watch.part("waiting"):
                batch = next(self.batches)
            self.stepper.step(batch)
            turns.append(watch.end())
        self._rest()
        return {part: statistics.median(each[part] for each in turns) for part in PARTS}

    def _do(self, steps: int) -> None:
        for _ in range(steps):
            self.stepper.step(next(self.batches))
        if self.on_gpu:
            torch.cuda.synchronize()

    def _rest(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()  # for the other processes


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # only Linux has it; elsewhere the peak includes compilation
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the peak memory in bytes. `getrusage` is not used: it includes the parent's memory at the start."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


@dataclasses.dataclass(frozen=True)
class Failed:
    """Failure of a method."""

    reason: str


def serve(pipe: Connection, way: Way, job: Job) -> None:
    """Answer requests in a method's process until the pipe is closed."""
    torch.set_num_threads(job.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch enables it for convolutions; float32 must mean float32
    try:
        pipe.send(first_losses(way, job))
        steps = Steps(way, job)
        pipe.send(None)
        while True:
            pipe.send(getattr(steps, pipe.recv())())
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # any failure is reported, and other methods continue
        pipe.send(Failed(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"))


class Process:
    """Handle of a method's process."""

    def __init__(self, way: Way, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.way, self.failed = way, ""
        self.process = context.Process(target=serve, args=(theirs, way, job))
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """Return the next answer, or None once the process has failed."""
        if self.failed:
            return None
        try:
            received = self.pipe.recv()
        except (EOFError, OSError):
            received = Failed("the process was killed, usually for lack of memory")
        if isinstance(received, Failed):
            self.failed, received = received.reason, None
        return received

    def ask(self, request: str) -> Any:
        """Send a request, and return its answer."""
        with contextlib.suppress(OSError):  # a process that ended gives no answer either
            self.pipe.send(request)
        return self.answer()

    def end(self) -> None:
        self.pipe.close()
        self.process.join()

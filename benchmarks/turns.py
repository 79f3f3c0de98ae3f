"""A way of doing a step in a process of its own, which works when it is asked to and waits otherwise."""

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
    """Does a way's steps, and says what they took."""

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
        """Of a step, on average over one turn."""
        # While the others had their turns, its memory went elsewhere, and on a GPU the clocks went down.
        self._do(2 if self.on_gpu else 1)
        began = self.job.now()
        self._do(self.job.steps)
        took = (self.job.now() - began) / self.job.steps
        self._rest()
        return took

    def memory(self) -> int:
        """Bytes at the peak of the steps so far, since the first ones."""
        return peak(self.device)

    def parts(self) -> dict[str, float]:
        """Seconds of each part of a step: medians over one turn, or three steps."""
        watch = Stopwatch(self.device, self.job.now)
        watch.attach(self.stepper)
        self._do(2 if self.on_gpu else 1)
        found = []
        for _ in range(max(3, self.job.steps)):
            watch.begin()
            with watch.part("waiting"):
                batch = next(self.batches)
            self.stepper.step(batch)
            found.append(watch.end())
        self._rest()
        return {part: statistics.median(each[part] for each in found) for part in PARTS}

    def _do(self, steps: int) -> None:
        for _ in range(steps):
            self.stepper.step(next(self.batches))
        if self.on_gpu:
            torch.cuda.synchronize()

    def _rest(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()  # the others may have it


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone has it; elsewhere what compilation took counts too
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes at the peak. The kernel's own figure for a process also holds what its parent had when it began."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


@dataclasses.dataclass(frozen=True)
class Failed:
    """Why a way is not there."""

    reason: str


def serve(pipe: Connection, way: Way, job: Job) -> None:
    """A way's process: answers what it is asked until nobody asks."""
    torch.set_num_threads(job.threads)
    torch.backends.cudnn.allow_tf32 = False  # torch's choice for convolutions alone; float32 is to be float32
    try:
        pipe.send(first_losses(way, job))
        steps = Steps(way, job)
        pipe.send(None)
        while True:
            pipe.send(getattr(steps, pipe.recv())())
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # of whatever kind: the other ways go on
        pipe.send(Failed(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"))


class Process:
    """A way in its process, as the others see it."""

    def __init__(self, way: Way, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.way, self.failed = way, ""
        self.process = context.Process(target=serve, args=(theirs, way, job))
        self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it says next; nothing once it has failed."""
        if self.failed:
            return None
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            said = Failed("it was killed, which mostly means that memory was short")
        if isinstance(said, Failed):
            self.failed, said = said.reason, None
        return said

    def ask(self, what: str) -> Any:
        """What it finds."""
        with contextlib.suppress(OSError):  # where it has gone, there will be no answer either
            self.pipe.send(what)
        return self.answer()

    def end(self) -> None:
        self.pipe.close()
        self.process.join()

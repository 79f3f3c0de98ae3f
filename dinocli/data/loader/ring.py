"""Worker processes that fill batches in shared memory; only the slot index crosses the process boundary."""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dinocli.core.distributed import end_with
from dinocli.core.errors import DinoError
from dinocli.core.signals import held_back

_STUCK = 300.0  # seconds for one chunk of a batch; decoding that takes longer will not end
# Forked processes inherit the shared memory; elsewhere torch passes it on by name.
_FORK = sys.platform == "linux"
# Signals that workers ignore: the process that starts them handles these for all. Windows has no SIGUSR1.
_MINDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Field(NamedTuple):
    """Shape and type of one array of a batch, and whether its memory is pinned if that of the batch is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pinned: bool = True


Fields = dict[str, Field]
Slot = dict[str, Tensor]


class Task(NamedTuple):
    """Chunk of a batch to fill: slot of the ring, batch number, first image, and number of images."""

    slot: int
    batch: int
    first: int
    images: int


Note = TypeVar("Note")
Told_co = TypeVar("Told_co", covariant=True)


class Filler(Protocol[Told_co]):
    """Function of a worker that fills a chunk and returns notes, such as names, that no array can hold."""

    def __call__(self, slot: dict[str, Tensor], task: Task) -> Sequence[Told_co]:
        """Fill images `first` to `first + images` of the batch."""


def chunk_size(batch_size: int, workers: int) -> int:
    """Return the number of images of a batch that a worker fills at a time."""
    return max(1, min(32, batch_size // workers)) if workers else batch_size


def _chunks(batch_size: int, workers: int) -> list[tuple[int, int]]:
    """Return the first image and the number of images of each chunk of a batch."""
    chunk = chunk_size(batch_size, workers)
    return [(first, min(chunk, batch_size - first)) for first in range(0, batch_size, chunk)]


def turns(lane: int, workers: int, batch_size: int, batches: int) -> int:
    """Count a worker's images in the first `batches` batches, if chunks go to the workers in turn."""
    chunks, workers = _chunks(batch_size, workers), max(1, workers)

    def first(batches: int) -> int:
        numbered = ((b * len(chunks) + i, size) for b in range(batches) for i, (_, size) in enumerate(chunks))
        return sum(size for number, size in numbered if number % workers == lane)

    # The turns repeat after as many batches as workers.
    return first(workers) * (batches // workers) + first(batches % workers)


def turns_before(lane: int, workers: int, batch_size: int, batch: int, first: int) -> int:
    """Count the images that a worker fills before the chunk of a batch that starts at image `first`."""
    chunks = _chunks(batch_size, workers)
    numbered = ((batch * len(chunks) + i, start, size) for i, (start, size) in enumerate(chunks))
    same = sum(size for number, start, size in numbered if start < first and number % max(1, workers) == lane)
    return turns(lane, workers, batch_size, batch) + same


class Ring(Generic[Note]):
    """Batches in order, filled ahead by worker processes.

    Each batch is split into chunks, so all workers share the first batch and memory does not grow with their number.

    If shapes change during a run, a slot has memory for the largest, and each batch uses a part of it. Workers are not
    restarted, so they keep the images that they have read ahead.

    Args:
        phases: Pairs of a batch number and the arrays, by name, of all batches from there on. The first pair is for
            the first batch.
        pick: Function from a batch number to the index of its phase, if phases do not follow one another.
        batch_size: Images per batch (B).
        make: Function that creates a filler in its worker, from the worker's lane and the number of lanes.
        prepare: Function that is called in this process before a batch is filled, with its arrays and its number.
        workers: Number of worker processes; 0 fills in this process.
        slots: Number of batches held at once.
        start: Number of the first batch.
        stride: Step between batch numbers, if other processes fill the batches between.
        bound: True if chunks must go to the workers in turn, as streams need; else they go to any idle worker.
        pin: CUDA device for whose copies the memory is pinned. If None, it is not.

    Attributes:
        waited: Seconds this process has waited for batches.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Fields]],
        *,
        batch_size: int,
        make: Callable[[int, int], Filler[Note]],
        prepare: Callable[[dict[str, Tensor], int], None],
        workers: int,
        slots: int,
        start: int = 0,
        stride: int = 1,
        bound: bool = False,
        pin: torch.device | None = None,
        pick: Callable[[int], int] | None = None,
    ) -> None:
        self.waited = 0.0
        self._batch_size, self._next, self._workers, self._prepare = batch_size, start, workers, prepare
        self._stride = stride
        slots = slots if workers else 2
        memory = [_memory(phases, spawned=workers > 0 and not _FORK) for _ in range(slots)]
        shaped = [(first, [_reshape(slot, fields) for slot in memory]) for first, fields in phases]
        self._slots = _Slots(shaped, pick)
        self._free = deque(range(slots))
        self._asked: deque[tuple[int, int]] = deque()  # slot and batch, in order
        self._missing: dict[int, int] = {}  # batch -> images still to come
        self._notes: dict[int, list[Note]] = {}
        self._processes: list[Any] = []
        if workers:
            self._start(make, bound)
        else:
            self._fill = make(0, 1)
        pinned: list[Tensor] = []
        self._unpin = weakref.finalize(self, _unpin, pinned, pin)  # keeps the memory mapped until it is unpinned
        if pin is not None:  # after the workers have started, which must not inherit it
            names = [name for name, field in phases[0][1].items() if field.pinned]
            _pin([slot[name] for slot in memory for name in names], pinned, pin)

    def _start(self, make: Callable[[int, int], Filler[Note]], bound: bool) -> None:
        workers = self._workers
        self._chunks = _chunks(self._batch_size, workers)
        context: Any = multiprocessing.get_context("fork" if _FORK else "spawn")
        self._done: Any = context.SimpleQueue()
        shared: Any = context.SimpleQueue()
        self._queues = [context.SimpleQueue() if bound else shared for _ in range(workers)]
        # Linux kills a worker when the thread that started it ends, and only the main thread lasts.
        starter = _Starter(os.getpid(), threading.current_thread() is threading.main_thread())
        for lane, tasks in enumerate(self._queues):
            words = (starter, lane, workers, make, self._slots, tasks, self._done)
            self._processes.append(context.Process(target=_work, args=words, daemon=True))
        with held_back(_MINDED):  # until a worker ignores them, it would handle them as this process does
            for process in self._processes:
                process.start()
        # Kill the workers when this process exits or drops the ring: they ignore SIGINT, SIGTERM and SIGUSR1.
        weakref.finalize(self, _end, self._processes)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor], list[Note]]]:
        """Yield a slot index, its arrays and the fillers' notes; `release` the slot after reading it."""
        while True:
            began = time.perf_counter()
            while self._free and self._processes:
                self._ask(self._free.popleft())
            slot, batch, notes = self._fill_here() if not self._processes else self._receive()
            self.waited += time.perf_counter() - began
            yield slot, self._slots.of(slot, batch), notes

    def release(self, slot: int) -> None:
        """Allow a slot to be filled again."""
        self._free.append(slot)

    def close(self) -> None:
        """Stop the workers, and unpin the memory: the next ring may get the same addresses."""
        _end(self._processes)
        self._unpin()

    def _fill_here(self) -> tuple[int, int, list[Note]]:
        slot, batch = self._free.popleft(), self._next
        arrays = self._slots.of(slot, batch)
        self._prepare(arrays, batch)
        notes = self._fill(arrays, Task(slot, batch, 0, self._batch_size))
        self._next += self._stride
        return slot, batch, list(notes)

    def _ask(self, slot: int) -> None:
        batch, self._next = self._next, self._next + self._stride
        self._prepare(self._slots.of(slot, batch), batch)
        self._asked.append((slot, batch))
        self._missing[batch], self._notes[batch] = self._batch_size, []
        for i, (first, images) in enumerate(self._chunks, batch * len(self._chunks)):
            self._queues[i % self._workers].put(Task(slot, batch, first, images))

    def _receive(self) -> tuple[int, int, list[Note]]:
        slot, batch = self._asked[0]
        while self._missing[batch]:
            task, notes = self._result()
            self._missing[task.batch] -= task.images
            self._notes[task.batch] += notes
        self._asked.popleft()
        del self._missing[batch]
        return slot, batch, self._notes.pop(batch)

    def _result(self) -> tuple[Task, list[Note]]:
        ready = wait([self._done._reader, *(p.sentinel for p in self._processes)], timeout=_STUCK)
        if self._done._reader in ready:
            result = self._done.get()
            if isinstance(result, BaseException):
                raise result
            return result
        self.close()
        if not ready:
            raise DinoError(
                f"no image was decoded in {_STUCK:g} seconds: a file or its disk does not respond",
                "check the disk or network of the images; then run the same command again",
            )
        raise DinoError(
            "a worker process was killed, probably because memory ran out", "use --workers 1, or a smaller --batch-size"
        )


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    processes.clear()


class _Starter(NamedTuple):
    """Process that starts workers: its id, and whether its main thread starts them."""

    process: int
    main: bool


def _work(
    starter: _Starter,
    lane: int,
    lanes: int,
    make: Callable[[int, int], Filler[Any]],
    slots: _Slots,
    tasks: Any,
    done: Any,
) -> None:
    # Ctrl-C and the signals of `timeout` and schedulers reach every process of the group; the parent finishes its step
    # and then stops its workers itself.
    for number in _MINDED:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _MINDED)
    end_with(starter.process, by_system=starter.main)
    torch.set_num_threads(1)
    # libtiff and libjpeg print a line of their own about each corrupt file; here the reason is a return value.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        fill = make(lane, lanes)
        while True:
            task = Task(*tasks.get())
            done.put((task, fill(slots.of(task.slot, task.batch), task)))
    except (DinoError, MemoryError) as error:
        done.put(error)
    except BaseException:
        done.put(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))


@dataclass(frozen=True)
class _Slots:
    """Slots of a ring, as arrays in the shapes of a batch.

    Attributes:
        phases: Pairs of the first batch with these shapes, and the arrays of each slot.
        pick: Function from a batch number to the index of its phase. If None, the last phase that has begun.
    """

    phases: list[tuple[int, list[Slot]]]
    pick: Callable[[int], int] | None = None

    def of(self, slot: int, batch: int) -> Slot:
        """Return the arrays of a slot that holds a given batch."""
        if self.pick is not None:
            return self.phases[self.pick(batch)][1][slot]
        return next(slots for first, slots in reversed(self.phases) if first <= batch)[slot]


def _memory(phases: Sequence[tuple[int, Fields]], *, spawned: bool) -> Slot:
    """Allocate the memory of a slot, with room for the largest shape of each array."""
    largest = {
        name: max((fields[name] for _, fields in phases), key=lambda field: math.prod(field.shape))
        for name in phases[0][1]
    }
    return {name: _allocate(field, spawned=spawned) for name, field in largest.items()}


def _reshape(memory: Slot, fields: Fields) -> Slot:
    """Return the start of each array's memory in another shape."""
    return {name: memory[name].flatten()[: math.prod(field.shape)].view(field.shape) for name, field in fields.items()}


def _allocate(field: Field, *, spawned: bool) -> Tensor:
    size = torch.Size(field.shape).numel()
    if spawned:
        return torch.empty(field.shape, dtype=field.dtype).share_memory_()
    # Not /dev/shm: containers often limit it to 64 MB and kill a process that writes more.
    memory = mmap.mmap(-1, max(1, size * field.dtype.itemsize))
    return (
        torch.frombuffer(memory, dtype=field.dtype, count=size).view(field.shape) if size else torch.empty(field.shape)
    )


def _pin(memory: Sequence[Tensor], pinned: list[Tensor], device: torch.device) -> None:
    """Pin memory for asynchronous copies to the device, and list what is pinned. The host waits for other copies."""
    with torch.cuda.device(device):  # or another device would get a context, which takes memory
        runtime = torch.cuda.cudart()
        for values in memory:
            if not values.nbytes:  # its address would be 0
                continue
            if int(runtime.cudaHostRegister(values.data_ptr(), values.nbytes, 0)):  # too much memory is locked, say
                _clear_error()
                return
            pinned.append(values)


def _unpin(pinned: list[Tensor], device: torch.device | None) -> None:
    if device is None or not pinned:
        return
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        with contextlib.suppress(RuntimeError):  # after an error of the device, which the run reports itself
            torch.cuda.synchronize()  # a copy may still read the memory
        while pinned:
            if int(runtime.cudaHostUnregister(pinned.pop().data_ptr())):
                _clear_error()


def _clear_error() -> None:
    """Clear the last error of the CUDA runtime, which torch would report as that of the next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")

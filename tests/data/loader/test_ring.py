from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinocli.core.errors import DinoError
from dinocli.core.runs import held
from dinocli.data.loader import ring
from dinocli.data.loader.ring import Field, Ring, Task, chunk_size, turns

FIELDS = {"keys": Field((10,), torch.int64), "worker": Field((10,), torch.int64)}


class Counting:
    """Write the number of each image over all batches, and the process that filled it."""

    def __init__(self, lane: int, lanes: int) -> None:
        self.lane = lane

    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[int]:
        part = slice(task.first, task.first + task.images)
        slot["keys"][part] *= 2
        slot["worker"][part] = self.lane
        return [task.first]


def numbers(slot: dict[str, Tensor], batch: int) -> None:
    slot["keys"][:] = torch.arange(10 * batch, 10 * batch + 10)


def made(make: Callable[[int, int], object], workers: int, **options: object) -> Ring:
    return Ring([(0, FIELDS)], batch_size=10, make=make, prepare=numbers, workers=workers, slots=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 4])
def test_batches_are_complete_and_in_order(workers: int, start: int) -> None:
    filled = made(Counting, workers, start=start)
    try:
        for batch, (slot, arrays, notes) in enumerate(islice(filled, 9), start):
            assert arrays["keys"].tolist() == [2 * n for n in range(10 * batch, 10 * batch + 10)]
            assert sorted(notes) == list(range(0, 10, chunk_size(10, workers)))
            filled.release(slot)
    finally:
        filled.close()


def test_bound_chunks_go_to_the_workers_in_turn() -> None:
    filled, seen = made(Counting, 3, bound=True), [0, 0, 0]
    try:
        for batches, (slot, arrays, _) in enumerate(islice(filled, 7), 1):
            for lane in arrays["worker"].tolist():
                seen[lane] += 1
            assert seen == [turns(lane, 3, 10, batches) for lane in range(3)]
            filled.release(slot)
    finally:
        filled.close()


class Shaped(Counting):
    """Write the shape of the batch, and the process that filled it."""

    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[int]:
        slot["grid"][...] = slot["grid"].shape[1]
        return [os.getpid()]


@pytest.mark.parametrize(("workers", "start", "copied"), [(0, 0, True), (2, 0, True), (2, 4, True), (1, 2, False)])
def test_shapes_change_between_batches_without_restarting_workers(
    workers: int, start: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_FORK", copied and ring._FORK)
    sides, who = {0: 2, 3: 5, 5: 1}, set()
    phases = [(first, {"grid": Field((10, side), torch.uint8)}) for first, side in sides.items()]
    filled = Ring(phases, batch_size=10, make=Shaped, prepare=unchanged, workers=workers, slots=3, start=start)
    try:
        for batch, (slot, arrays, notes) in enumerate(islice(filled, 7 - start), start):
            side = sides[max(first for first in sides if first <= batch)]
            assert arrays["grid"].tolist() == [[side] * side] * 10
            assert arrays["grid"].is_contiguous()
            who.update(notes)
            filled.release(slot)
    finally:
        filled.close()
    assert len(who) <= max(1, workers), "workers are not restarted"


def unchanged(slot: dict[str, Tensor], batch: int) -> None:
    pass


@pytest.mark.parametrize(("workers", "batch"), [(1, 5), (2, 100), (3, 32), (4, 7), (5, 1)])
def test_turns_count_what_each_worker_fills(workers: int, batch: int) -> None:
    chunk = chunk_size(batch, workers)
    sizes = [min(chunk, batch - first) for first in range(0, batch, chunk)]
    for batches in range(3 * workers):
        filled = [0] * workers
        for number in range(batches * len(sizes)):
            filled[number % workers] += sizes[number % len(sizes)]
        assert filled == [turns(lane, workers, batch, batches) for lane in range(workers)]
    assert turns(0, 0, batch, 3) == 3 * batch


class Dying(Counting):
    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[int]:
        if task.batch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(slot, task)


class Hanging(Counting):
    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[int]:
        signal.pause()
        return []


class Mistaken(Counting):
    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[int]:
        raise DinoError("a mistake", "a hint")


class Broken(Counting):
    def __call__(self, slot: dict[str, Tensor], task: Task) -> list[int]:
        raise ZeroDivisionError("in a worker")


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (Dying, DinoError, "a worker process was killed, probably because memory ran out"),
        (Hanging, DinoError, "no image was decoded in 0.5 seconds"),
        (Mistaken, DinoError, "a mistake"),
        (Broken, RuntimeError, "ZeroDivisionError: in a worker"),
    ],
)
def test_a_failed_worker_is_an_error_and_no_worker_remains(
    make: type[Counting], error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_STUCK", 0.5)
    filled = made(make, 2)
    processes = list(filled._processes)
    with pytest.raises(error, match=said) as raised:
        for slot, _, _ in filled:
            filled.release(slot)
    filled.close()
    assert not any(process.is_alive() for process in processes)
    assert make is not Mistaken or raised.value.hint == "a hint"


def test_waiting_is_counted() -> None:
    filled = made(Counting, 0)
    next(iter(filled))
    assert 0 < filled.waited < 5


def test_workers_end_with_the_process_that_started_them() -> None:
    """Fork two processes after one import of torch: one exits, the other is killed."""
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_ring
for killed in (False, True):
    if not os.fork():
        ring = test_ring.made(test_ring.Counting, 2)
        next(iter(ring))
        print(*(p.pid for p in ring._processes), flush=True)
        if killed:
            os.kill(os.getpid(), 9)
        sys.exit(3)
print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)), flush=True)
"""
    # The workers hold the pipe open: reading it to its end waits for the last of them.
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    *workers, codes = done.stdout.splitlines()
    assert [len(line.split()) for line in workers] == [2, 2]
    assert sorted(codes.split()) == ["-9", "3"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the workers")
def test_a_stopped_worker_dies_with_its_parent_and_the_lock_is_free_at_once(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_ring
from dinocli.core.runs import held
with held(Path(sys.argv[1])):
    ring = test_ring.made(test_ring.Counting, 2)
    next(iter(ring))
    print(*(p.pid for p in ring._processes), flush=True)
    sys.stdin.read()
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert run.stdin
    assert run.stdout
    workers = [int(word) for word in run.stdout.readline().split()]
    assert len(workers) == 2
    with pytest.raises(DinoError, match="another run is using"), held(tmp_path):
        pass
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    run.kill()
    run.wait()
    with held(tmp_path):
        pass
    # The workers hold the pipe open: reading it to its end waits for the last of them.
    assert run.communicate(timeout=30) == ("", None)


class Runtime:
    """Stand-in for the CUDA runtime, with its rules for pinned memory; it reports a failure once more at a launch.

    Args:
        most: Largest number of ranges that can be pinned at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 100) -> None:
        self.most, self.pinned, self.codes, self.last = most, dict[int, int](), list[int](), 0
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch, "zeros", self.launch)

    def _return(self, code: int) -> int:
        self.codes.append(code)
        self.last = code or self.last
        return code

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not (address and size):
            return self._return(1)  # invalid value
        if any(address < first + bytes_ and first < address + size for first, bytes_ in self.pinned.items()):
            return self._return(712)  # already registered
        if len(self.pinned) == self.most:
            return self._return(2)  # out of memory
        self.pinned[address] = size
        return self._return(0)

    def cudaHostUnregister(self, address: int) -> int:
        return self._return(0 if self.pinned.pop(address, 0) else 713)  # not registered

    def launch(self, *shape: int, device: str) -> Tensor:
        code, self.last = self.last, 0
        if code:
            raise RuntimeError(f"CUDA error {code}")
        return torch.ones(*shape)


PINNED = FIELDS | {"locals": Field((0, 10, 8, 8, 3), torch.uint8)}  # no local crops: an array of no bytes


def pinned_ring(workers: int) -> Ring:
    options = {"make": Counting, "prepare": numbers, "workers": workers, "slots": 3, "pin": torch.device("cuda")}
    return Ring([(0, PINNED)], batch_size=10, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("closed", [True, False])
def test_a_ring_unpins_its_memory_so_that_the_next_may_have_it(
    workers: int, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(monkeypatch)
    memory = SameMemory()
    monkeypatch.setattr(ring, "_allocate", memory)
    for _ in range(2):
        memory.given = 0
        filled = pinned_ring(workers)
        assert len(runtime.pinned) == 2 * (3 if workers else 2), "two arrays of each slot have bytes"
        _, arrays, _ = next(iter(filled))
        assert arrays["keys"].tolist() == list(range(0, 20, 2))
        if closed:
            filled.close()
            filled.close()  # a second time does nothing
        del filled
        assert not runtime.pinned
    assert set(runtime.codes) == {0}


class SameMemory:
    """Allocator that hands out the same addresses for each ring, as the system may."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.given = 0
        self.allocate = ring._allocate

    def __call__(self, field: Field, *, spawned: bool) -> Tensor:
        if self.given == len(self.made):
            self.made.append(self.allocate(field, spawned=spawned))
        self.given += 1
        return self.made[self.given - 1]


def test_memory_that_cannot_be_pinned_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch, most=3)
    filled = pinned_ring(0)
    assert len(runtime.pinned) == 3
    runtime.launch(1, device="cuda")  # the next kernel does not report the failure as its own
    batches = [arrays["keys"].tolist() for _, arrays, _ in islice(filled, 1)]
    assert batches == [list(range(0, 20, 2))]
    filled.close()
    assert not runtime.pinned
    assert runtime.codes == [0, 0, 0, 2, 0, 0, 0]


@pytest.mark.gpu
def test_two_rings_in_turn_copy_their_own_batches_to_a_gpu() -> None:
    for first in (0, 40):
        filled = pinned_ring(2)
        try:
            for batch, (slot, arrays, _) in enumerate(islice(filled, 6)):
                assert arrays["keys"].is_pinned()
                there = arrays["keys"].to("cuda", non_blocking=True) + first
                assert there.tolist() == [2 * n + first for n in range(10 * batch, 10 * batch + 10)]
                filled.release(slot)
        finally:
            filled.close()

from __future__ import annotations

import torch
from torch import Tensor

from dinocli.data.loader.copier import Copier

CPU = torch.device("cpu")


class Event:
    """Stand-in for an event of CUDA."""

    def __init__(self, number: int, ended: set[int], waited: list[int]) -> None:
        self.number, self.ended, self.waited = number, ended, waited

    def query(self) -> bool:
        return self.number in self.ended

    def synchronize(self) -> None:
        self.waited.append(self.number)
        self.ended.add(self.number)


class Stream:
    """Stand-in for a stream of CUDA whose copies end when they are waited for, or when the test says so."""

    def __init__(self) -> None:
        self.recorded, self.ended, self.waited = 0, set[int](), list[int]()

    def record_event(self) -> Event:
        self.recorded += 1
        return Event(self.recorded - 1, self.ended, self.waited)


def test_a_slot_is_released_once_its_copy_has_ended() -> None:
    copier, released = Copier(CPU), list[int]()
    copier.stream = stream = Stream()
    for slot in range(3):
        copier.done(slot, released.append)
    assert released == [0, 1], "one copy may still run"
    assert stream.waited[:1] == [0] and set(released) <= stream.ended
    stream.ended.add(3)
    copier.done(3, released.append)
    assert released == [0, 1, 2, 3]


def test_on_a_cpu_a_slot_is_read_in_place_and_released_at_once() -> None:
    copier, released, slot = Copier(CPU), list[int](), torch.arange(3)
    copied: Tensor = copier(slot)
    copier.wait()
    assert copied is slot
    copier.done(5, released.append)
    assert released == [5]

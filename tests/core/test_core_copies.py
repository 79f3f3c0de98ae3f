from __future__ import annotations

import pytest
import torch

from dinocli.core.copies import fetch, send

CPU = torch.device("cpu")


class Ordinary:
    """Stand-in for values in ordinary memory, which records the steps on their way."""

    def __init__(self) -> None:
        self.steps: list[object] = []

    def pin_memory(self) -> Ordinary:
        self.steps.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> Ordinary:
        self.steps.append((device.type, non_blocking))
        return self


def test_values_are_pinned_for_cuda_alone() -> None:
    values = Ordinary()
    send(values, torch.device("cuda", 1))
    assert values.steps == ["pinned", ("cuda", True)]
    values = Ordinary()
    send(values, torch.device("mps"))
    assert values.steps == [("mps", True)]
    numbers = torch.arange(4)
    assert send(numbers, CPU) is numbers
    assert fetch(numbers)() is numbers


@pytest.mark.gpu
def test_the_host_does_not_wait_for_copies_while_a_gpu_works() -> None:
    numbers = torch.arange(2**20, dtype=torch.float32)
    stream = torch.cuda.current_stream()
    sent = send(numbers, torch.device("cuda"))
    fetch(sent)()  # the first pinned memory of this size, whose allocation waits
    torch.cuda.synchronize()
    torch.cuda._sleep(2**31)  # clock cycles: about a second
    sent = send(numbers, torch.device("cuda"))
    assert not stream.query(), "the host waited to send"
    wait = fetch(sent * 2)
    assert not stream.query(), "the host waited to fetch"
    torch.cuda._sleep(2**31)
    assert wait().equal(numbers * 2)
    assert not stream.query(), "the host waited for later work"

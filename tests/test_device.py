from __future__ import annotations

import contextlib

import pytest
import torch

from dinocli.device import autocast, default_workers, peak_memory, pick_device
from dinocli.errors import DinoError


def test_auto_is_something_that_is_there() -> None:
    torch.zeros(1, device=pick_device("auto"))
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu", ""])
def test_what_is_not_there_is_said(name: str) -> None:
    with pytest.raises(DinoError) as error:
        pick_device(name)
    assert error.value.hint == "--device auto"


def test_a_cpu_computes_in_single_precision_with_few_helpers() -> None:
    cpu = torch.device("cpu")
    assert isinstance(autocast(cpu, "bfloat16"), contextlib.nullcontext)
    assert 1 <= default_workers(cpu) <= 4
    assert peak_memory(cpu) > 1e6

"""Every question about other processes; the one file that says torch.distributed."""

from __future__ import annotations

from torch import Tensor, distributed


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of what each process of the run holds; in a run of one process, the values as they are.

    Every process gets the same numbers, and each must have as many samples behind its own as the others.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()

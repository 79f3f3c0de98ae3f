"""Signals around the start of processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def held_back(signals: Sequence[int]) -> Iterator[None]:
    """Block signals for this process, and for those that it starts, until the `with` block ends."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Signals that stop a run, each answered at once."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Signals of Ctrl-C, `kill` and schedulers. Not every system has SIGUSR1.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
_GRACE = 2.0  # seconds for the main thread to exit; a long library call may block it
_NEWEST = 0.3  # weight of the newest step in the average step time


class Stopping:
    """Stop request of a run: the first signal ends the run after its step, a second Ctrl-C ends it at once.

    Python runs signal handlers only between its own instructions. The backward pass is one instruction and may take
    minutes. Therefore a separate thread, which the system wakes on each signal, prints the answer.

    Args:
        note: Callback that receives one-line messages for the user, called in that thread.

    Attributes:
        requested: True after a signal.
        at_once: True if the run must stop without saving: Ctrl-C came twice, or before the first step.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.requested = self.at_once = False
        self._note = note
        self._began: float | None = None  # start time of the current step
        self._pace: float | None = None  # average seconds per step
        self._saving = 0.0  # seconds per save
        self._handled = self._answered = 0  # presses of Ctrl-C counted by the main thread and by the answering thread
        self._what = "step"
        self._left = threading.Event()

    def step(self, saving: float) -> None:
        """Record the start of the next step.

        Args:
            saving: Seconds that the last save took.

        Raises:
            KeyboardInterrupt: If the run must stop at once.
        """
        self.check()
        now = time.perf_counter()
        if self._began is not None:
            took = now - self._began
            self._pace = took if self._pace is None else self._pace + _NEWEST * (took - self._pace)
        self._began, self._saving = now, saving

    def check(self) -> None:
        """Raise if the run must stop at once.

        Raises:
            KeyboardInterrupt: If `at_once` is set.
        """
        if self.at_once:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: object) -> None:
        """Handle a signal, in the main thread.

        Raises:
            KeyboardInterrupt: If the run must stop at once.
        """
        self.requested = True
        if number != signal.SIGINT:
            return
        self._handled += 1
        # Two presses may reach this handler as one call; the thread counts both.
        self.at_once = self.at_once or self._handled > 1 or self._began is None
        self.check()

    def finish(self) -> None:
        """Record that only the last save follows."""
        self._what = "save"

    def answer(self, waked: socket.socket) -> None:
        """Answer signals until a zero byte arrives. Each signal arrives as one byte, its number."""
        while number := waked.recv(1)[0]:
            self._answered += number == signal.SIGINT
            if number == signal.SIGINT and (self._answered > 1 or self._began is None):
                self.at_once = True
                threading.Thread(target=self._leave, daemon=True).start()
            elif number in _numbers():
                self._note(self.words(number))

    def words(self, number: int) -> str:
        """Return the answer to a first signal, with the remaining time estimated from earlier steps."""
        left = ""
        if self._pace is not None and self._began is not None and self._what == "step":
            seconds = max(0.0, self._began + self._pace - time.perf_counter()) + self._saving
            left = f", about {_duration(seconds)}"
        again = "; press again to stop now without saving" if number == signal.SIGINT else ""
        return f"stopping after this {self._what}{left}{again}"

    def _leave(self) -> None:
        """Exit the process if the main thread does not. Earlier saves are valid; nothing more is saved."""
        if self._left.wait(_GRACE):
            return
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[2K\x1b[?25h")  # a progress bar hides the cursor
        os.write(2, b"stopped\n")
        os._exit(130)

    def end(self) -> None:
        """Record that the main thread has left the run."""
        self._left.set()


def _numbers() -> dict[int, None]:
    return dict.fromkeys(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def stop_signals(note: Callable[[str], None]) -> Iterator[Stopping]:
    """Handle the signals that stop a run, inside the block.

    Args:
        note: Callback that receives one-line messages for the user, called in a separate thread.
    """
    stopping = Stopping(note)
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread can handle signals, so a run in another thread handles none
        return
    waked, wake = socket.socketpair()
    wake.setblocking(False)
    thread = threading.Thread(target=stopping.answer, args=(waked,), daemon=True)
    thread.start()
    woken_before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, stopping.handle) for number in _numbers()}
    try:
        yield stopping
    finally:
        stopping.end()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        wake.send(b"\0")
        thread.join()
        wake.close()
        waked.close()


@contextmanager
def collect_on_request() -> Iterator[Callable[[], object]]:
    """Disable automatic garbage collection, and yield a function that collects.

    A step makes little garbage, and a search for it stalls the device.
    """
    was, of_caller = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    if not of_caller:
        gc.freeze()  # later collections ignore networks and libraries
    gc.disable()
    try:
        yield gc.collect
    finally:
        if not of_caller:  # what a caller has frozen stays frozen
            gc.unfreeze()
        if was:
            gc.enable()

"""Stopping: the signals that ask a run to stop, and what is said at once in answer."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What Ctrl-C, `kill` and schedulers send; SIGUSR1 is not on every system.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
_GRACE = 2.0  # seconds for the main thread to leave, which may be inside one long call of a library
_NEWEST = 0.3  # weight of the newest step in the pace


class Stopping:
    """Whether a run was asked to stop; the first signal ends it after its step, a second Ctrl-C at once.

    Python runs a handler only between two of its own instructions, and the gradient of a step is one of them, which
    may take minutes. So a thread answers, which the system wakes when the signal comes.

    Args:
        say: Called in that thread with a line for the person.

    Attributes:
        asked: Whether a signal came.
        at_once: Whether nothing more is to be saved, since Ctrl-C came again, or before the first step.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = self.at_once = False
        self._say = say
        self._began: float | None = None  # when the step began that is going on
        self._pace: float | None = None  # seconds for a step
        self._saving = 0.0  # seconds for a save
        self._handled = self._answered = 0  # presses of Ctrl-C that the main thread and the answering one know of
        self._what = "step"
        self._left = threading.Event()

    def step(self, saving: float) -> None:
        """Note that the next step begins.

        Args:
            saving: Seconds that the last save took.

        Raises:
            KeyboardInterrupt: Ctrl-C came twice.
        """
        self.check()
        now = time.perf_counter()
        if self._began is not None:
            took = now - self._began
            self._pace = took if self._pace is None else self._pace + _NEWEST * (took - self._pace)
        self._began, self._saving = now, saving

    def check(self) -> None:
        """Leave where Ctrl-C came twice.

        Raises:
            KeyboardInterrupt: It did.
        """
        if self.at_once:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: object) -> None:
        """Note a signal, in the main thread.

        Raises:
            KeyboardInterrupt: It asks to leave at once.
        """
        self.asked = True
        if number != signal.SIGINT:
            return
        self._handled += 1
        # Two presses may come to this handler as one; then the thread has counted them.
        self.at_once = self.at_once or self._handled > 1 or self._began is None
        self.check()

    def finish(self) -> None:
        """Note that no step follows, but the last save."""
        self._what = "save"

    def answer(self, waked: socket.socket) -> None:
        """Answer signals until zero comes; each comes as a byte with its number."""
        while number := waked.recv(1)[0]:
            self._answered += number == signal.SIGINT
            if number == signal.SIGINT and (self._answered > 1 or self._began is None):
                self.at_once = True
                threading.Thread(target=self._leave, daemon=True).start()
            elif number in _numbers():
                self._say(self.words(number))

    def words(self, number: int) -> str:
        """The answer to a first signal, with the time that is left by the pace so far."""
        left = ""
        if self._pace is not None and self._began is not None and self._what == "step":
            seconds = max(0.0, self._began + self._pace - time.perf_counter()) + self._saving
            left = f", about {_duration(seconds)}"
        again = "; press again to stop now without saving" if number == signal.SIGINT else ""
        return f"stopping after this {self._what}{left}{again}"

    def _leave(self) -> None:
        """End the process if its main thread does not leave: what was saved before is valid, and nothing else is."""
        if self._left.wait(_GRACE):
            return
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[2K\x1b[?25h")  # a progress bar hides the cursor
        os.write(2, b"stopped\n")
        os._exit(130)

    def end(self) -> None:
        """Note that the run has left."""
        self._left.set()


def _numbers() -> dict[int, None]:
    return dict.fromkeys(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Stopping]:
    """Handle the signals that ask a run to stop, in the block.

    Args:
        say: Called, in a thread of its own, with a line for the person when one comes.
    """
    stopping = Stopping(say)
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # signals belong to the main thread; a run started from another one goes without
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

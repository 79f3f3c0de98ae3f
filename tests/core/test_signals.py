from __future__ import annotations

import signal
import subprocess
import sys
import threading

from dinocli.core.signals import held_back


def test_signals_during_the_start_of_workers_reach_only_this_process() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with held_back([signal.SIGINT]):
            # To this thread: a signal to the process may reach a thread that a library started.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            assert not came
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_that_start_meanwhile_are_spared() -> None:
    ask = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with held_back([signal.SIGINT]):
        inside = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    outside = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert (inside.stdout, outside.stdout) == ("True\n", "False\n")

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dinocli.train import interrupts as module
from dinocli.train.interrupts import Stopping, stop_signals


def until(done: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.001)
    assert done()  # type: ignore[operator]


def test_the_first_signal_is_answered_and_a_second_ctrl_c_exits() -> None:
    said: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(KeyboardInterrupt), stop_signals(said.append) as stopping:
        stopping.step(0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: len(said) == 1)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: len(said) == 2)
        assert stopping.requested
        assert not stopping.at_once
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: False)
    assert said == ["stopping after this step", "stopping after this step; press again to stop now without saving"]
    assert stopping.at_once
    assert {number: signal.getsignal(number) for number in before} == before


def test_ctrl_c_before_the_first_step_exits_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals(pytest.fail) as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: False)
    assert stopping.at_once


def test_the_remaining_time_follows_the_pace_of_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    stopping = Stopping(print)
    for _ in range(3):
        stopping.step(20.0)
        now[0] += 300
    now[0] -= 60
    assert (
        stopping.words(signal.SIGTERM) == "stopping after this step, about 80 s"
    )  # 60 s of the step, and 20 s for the save
    now[0] -= 180
    again = "; press again to stop now without saving"
    assert stopping.words(signal.SIGINT) == f"stopping after this step, about 4 min{again}"
    now[0] += 1000
    assert stopping.words(signal.SIGINT) == f"stopping after this step, about 20 s{again}", "later than the pace had it"
    stopping.finish()
    assert stopping.words(signal.SIGINT) == f"stopping after this save{again}"


def test_a_run_in_another_thread_handles_no_signals() -> None:
    def run() -> None:
        with stop_signals(print) as stopping:
            stopping.step(0.0)
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done


LONG = """
import hashlib
from dinocli.train.interrupts import stop_signals

with stop_signals(lambda line: print(line, flush=True)) as stopping:
    stopping.step(0.0)
    print("step", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # takes minutes in one call, during which Python runs no signal handler
"""


def test_ctrl_c_is_answered_and_exits_during_a_long_library_call() -> None:
    run = subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout
    assert run.stdout.readline() == "step\n"
    time.sleep(0.5)  # wait until it is in that call
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == "stopping after this step; press again to stop now without saving\n"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30) == ("", "stopped\n")
    assert run.returncode == 130

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinocli.core.locks import lock

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from dinocli.core.locks import lock

def worker(ready):
    ready.set()
    time.sleep(60)

held = lock(Path(sys.argv[1]))
context = multiprocessing.get_context("fork")
ready = context.Event()
process = context.Process(target=worker, args=(ready,))
process.start()
ready.wait()
print(process.pid, flush=True)
time.sleep(60)
"""


def test_a_lock_is_exclusive_until_it_is_closed(tmp_path: Path) -> None:
    held = lock(tmp_path)
    assert held is not None
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    held.close()
    held.close()
    again = lock(tmp_path)
    assert again is not None
    again.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(BlockingIOError):
            lock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # the child lives
        held = lock(tmp_path)
        assert held is not None
        held.close()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()

"""A rank ends when the threads that carry its messages are done with them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from meshbolt.compat.exiting import settle

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not show its threads")


def carrier(work: str) -> threading.Thread:
    """Start a thread that Linux shows under the name of torch's, and wait until it does."""
    named = threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        named.set()
        if work == "computes":
            until = time.thread_time() + 0.1
            while time.thread_time() < until:
                pass
            finished.append(work)
        else:
            done.wait()

    finished.clear()
    done.clear()
    thread = threading.Thread(target=run)
    thread.start()
    assert named.wait(10)
    return thread


finished, done = list[str](), threading.Event()


def test_a_thread_at_work_is_waited_for() -> None:
    thread = carrier("computes")
    settle()
    assert finished == ["computes"]
    thread.join()


def test_a_thread_that_waits_for_another_rank_is_not() -> None:
    thread = carrier("waits")
    started = time.monotonic()
    settle()
    assert thread.is_alive()
    assert time.monotonic() - started < 1.0
    done.set()
    thread.join()


RANK = """
import atexit, sys
from meshbolt.compat import exiting

exiting.settle = lambda: print("settled")
exiting.settle_before_exit()
exiting.settle_before_exit()
print("done")
sys.exit(3)
"""


def test_a_rank_waits_once_at_its_end_and_keeps_its_exit_code() -> None:
    ended = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\nsettled\n", "")

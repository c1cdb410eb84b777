"""What a rank waits for before Python takes itself apart."""

from __future__ import annotations

import atexit
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

# What torch calls the threads of a gloo group that carry out collectives, as Linux shows it.
_CARRIER = "pt_gloo_runloop"
_LIMIT_S = 2.0


@cache
def settle_before_exit() -> None:
    """Have this process, once it ends, wait until gloo's threads have let go of what they have sent.

    Such a thread frees a collective's tensors some time after the collective is done, and needs Python for it. If Python is
    being taken apart by then, the thread is ended in the midst of a C++ destructor: an abort of a run that has done all it
    should, one in some fifty on a busy machine. Destroying the groups does not help while a module or a mesh refers to them.
    """
    atexit.register(settle)


def settle() -> None:
    """Wait until every thread that carries out collectives is asleep, at most 2 seconds.

    A collective that is still waiting for another rank is asleep as well, and is not waited for. Where the system does not
    show what its threads do (all but Linux), the threads have 50 milliseconds.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        time.sleep(0.05)
        return
    asleep, until = 0, time.monotonic() + _LIMIT_S
    while asleep < 3 and time.monotonic() < until:  # one that waits for Python looks asleep until it gets it
        time.sleep(0.005)  # lets go of Python
        asleep = asleep + 1 if all(_sleeps(task) for task in tasks.iterdir()) else 0


def _sleeps(task: Path) -> bool:
    with suppress(OSError):  # it may end meanwhile
        if (task / "comm").read_text().strip() == _CARRIER:
            return (task / "stat").read_text().rpartition(")")[2].split()[0] == "S"
    return True

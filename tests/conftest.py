"""What every test stands on: a parent process that can be forked, and that no test leaves other than it was."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

# Read once, when torch and numpy are imported: a process that is to be forked must not have their pools of threads.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch.distributed as dist
from tests import rows

from meshbolt.testing import warm

GPU_FOLDERS = ("gpu", "multigpu")
# How long a thread or a process may take to end after its test.
SETTLE_SECONDS = 1.0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave rows that are much like others to the full runs, before those are deselected."""
    rows.thin(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide the GPUs from a session without GPU tests: autograd starts threads where it sees one."""
    if not any(folder in item.path.parts for item in session.items for folder in GPU_FOLDERS):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def warm_parent() -> None:
    """Pay once for the imports and first calls that every forked rank would otherwise pay for."""
    warm(lightning=True)


@dataclass(frozen=True)
class State:
    """What a test may not leave changed in its process."""

    variables: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    threads: frozenset[threading.Thread] = field(default_factory=lambda: frozenset(threading.enumerate()))
    children: frozenset[int | None] = field(
        default_factory=lambda: frozenset(child.pid for child in multiprocessing.active_children())
    )

    def leaks(self) -> list[str]:
        """Return, in words, all that has been added or changed since."""
        # pytest writes the name and phase of the test into this one.
        own = {"PYTEST_CURRENT_TEST"}
        changed = {name for name, _ in os.environ.items() ^ self.variables.items()} - own
        now = State()
        found = [f"environment variable {name}" for name in sorted(changed)]
        found += [f"thread {thread.name}" for thread in now.threads - self.threads]
        found += [f"process {child}" for child in now.children - self.children]
        return [*found, "an initialised process group"] if dist.is_initialized() else found

    def restore(self) -> None:
        """Give the next test a clean start, as far as that can be done."""
        os.environ.clear()
        os.environ.update(self.variables)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_leaks(warm_parent: None) -> Iterator[None]:
    """Fail a test that leaves behind a variable, a thread, a process or a process group."""
    before = State()
    yield
    until = time.monotonic() + SETTLE_SECONDS
    while any(leak.startswith(("thread", "process")) for leak in before.leaks()) and time.monotonic() < until:
        time.sleep(0.02)
    leaks = before.leaks()
    before.restore()
    if leaks:
        pytest.fail(f"the test left behind: {', '.join(leaks)}")

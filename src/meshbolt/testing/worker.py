"""The child's side of `run_ranks`: what one rank does from its first breath to its exit."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from meshbolt.testing.outcomes import type_name
from meshbolt.testing.values import dump, load

# A rank that has reported stays so long for the others, since it may host the store that they still talk to. One that
# raised leaves sooner: its absence is what wakes the ranks that wait for it in a collective.
LINGER_SECONDS = {"returned": 3.0, "raised": 0.5}


# Objects made, and not freed, between two collections; Python's own 700 cost a twentieth of a test.
GC_THRESHOLD = 10_000


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank needs to know to begin.

    Attributes:
        rank: Its number.
        world: The number of ranks.
        folder: A folder of this call alone, for the rendezvous, the output and the stacks.
        port: A free port, for code that rendezvouses by itself.
        timeout_seconds: How long a collective waits.
        limit_seconds: After how long the rank ends itself, should the parent have died.
        forked: Whether the process is a copy of the parent.
        filters: The parent's warning filters.
    """

    rank: int
    world: int
    folder: Path
    port: int
    timeout_seconds: float
    limit_seconds: float
    forked: bool
    filters: list[Any]

    @property
    def output(self) -> Path:
        """Return the file that receives what the rank writes to its standard output and error."""
        return self.folder / f"rank{self.rank}.out"

    @property
    def stacks(self) -> Path:
        """Return the file that receives the Python stacks of the rank's threads on SIGUSR1."""
        return self.folder / f"rank{self.rank}.stacks"


def main(me: Rank, connection: Connection, job: Callable[[], Any] | bytes) -> None:
    """Run `job` as rank `me.rank`, report through `connection`, and leave the process without a clean-up by Python.

    Args:
        me: The rank.
        connection: The pipe to the parent.
        job: The function of no arguments to run; pickled, where the process is not a copy of the parent.
    """
    kind = ""
    try:
        stacks, output = me.stacks.open("w", encoding="utf-8"), me.output.open("w", encoding="utf-8")
        _become_a_rank(me, stacks=stacks, output=output)
        kind = _report(me, connection, job)
        _leave(connection, seconds=LINGER_SECONDS[kind])
    except BaseException:
        # The exit below would swallow it. What cannot be reported is read from the rank's output.
        traceback.print_exc()
    finally:
        # No atexit handlers, no destructors, no joining of threads: a rank that has reported can hang no more.
        os._exit(0 if kind == "returned" else 1)


def _become_a_rank(me: Rank, *, stacks: TextIO, output: TextIO) -> None:
    # A session of its own: the parent can kill the rank together with all that the rank has started.
    os.setsid()
    _forget_the_parent(output)
    faulthandler.enable(file=output)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    faulthandler.dump_traceback_later(me.limit_seconds, exit=True, file=output)
    # What is an error in the test is an error in its ranks; the call drops what Python remembers of the old filters.
    warnings.resetwarnings()
    warnings.filters[:] = me.filters  # type: ignore[index]
    os.environ.update(environment(me))
    torch.set_num_threads(1)
    # One seed on every rank and in every call, as torch's own default has it: a result never depends on earlier tests.
    torch.manual_seed(0)
    random.seed(0)


def _forget_the_parent(output: TextIO) -> None:
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        for fd in (1, 2)
    )
    # pytest's own hooks would collect what they hear for a parent that never sees it.
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    # Objects of the parent are not this process's to finalise; and a short life needs few collections.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def environment(me: Rank) -> dict[str, str]:
    """Return the environment variables of a rank, the ones that torchrun sets; Lightning recognises them as such."""
    variables = {
        "RANK": me.rank,
        "LOCAL_RANK": me.rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": me.world,
        "LOCAL_WORLD_SIZE": me.world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": me.port,
        "TORCHELASTIC_RUN_ID": "meshbolt.testing",
        # Without it, gloo looks up the machine's own name, which may be slow or unknown.
        "GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name.startswith("lo")),
    }
    if me.forked:
        # A GPU's context does not survive a fork, so that forked ranks are CPU ranks.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {name: str(value) for name, value in variables.items()}


def _report(me: Rank, connection: Connection, job: Callable[[], Any] | bytes) -> str:
    try:
        store = dist.FileStore(str(me.folder / "rendezvous"), me.world)  # type: ignore[attr-defined]
        patience = timedelta(seconds=me.timeout_seconds)
        dist.init_process_group("gloo", store=store, rank=me.rank, world_size=me.world, timeout=patience)
        value = (load(job) if isinstance(job, bytes) else job)()
        message = ("returned", {"value": dump(value)})
    except BaseException as error:  # the test's to judge, whatever it is: torch has errors that are no Exception
        message = ("raised", _described(error))
    connection.send(message)
    return message[0]


def _described(error: BaseException) -> dict[str, Any]:
    # The first frame is this file's and tells a reader nothing.
    shown = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    return {
        "error_types": tuple(type_name(kind) for kind in type(error).__mro__),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(shown)),
    }


def _leave(connection: Connection, *, seconds: float) -> None:
    with contextlib.suppress(OSError):
        connection.poll(seconds)
    sys.stdout.flush()
    sys.stderr.flush()


def without_harness(text: str) -> str:
    """Return the output or the stacks of a rank without the frames of this file and of what called it.

    `faulthandler` writes the innermost frame first; a forked rank has all of the test runner underneath.
    """
    kept, ours = [], False
    for line in text.splitlines():
        ours = line.startswith("  File ") and (ours or line.startswith(f'  File "{__file__}"'))
        if not (ours or line.startswith("Extension modules: ")):
            kept.append(line)
    return "\n".join(kept).strip("\n")

"""Make the test process ready to fork: everything slow happens once, here, and no rank pays for it again.

A rank that is forked from a cold process imports FSDP2's lazy parts (dynamo among them) on its first step, which takes
a second per rank. One step over torch's fake process group does that in the parent, without a thread or a socket.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from meshbolt.errors import UnsupportedError


def warm(*, lightning: bool = False) -> None:
    """Prepare this process for `run_ranks(..., start="fork")`, which otherwise calls this itself.

    Sets torch to one thread, since a process that is to be forked must not have several. Repeated calls cost nothing.

    Args:
        lightning: Import Lightning as well, for ranks that run a Trainer or Fabric.
    """
    torch.set_num_threads(1)
    if lightning:
        importlib.import_module("lightning")
    _step_once()


@functools.lru_cache(maxsize=1)
def _step_once() -> None:
    # torch registers the backend named "fake" when this module is imported.
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    state = torch.get_rng_state()
    # At its first backward, autograd starts a thread per GPU and refuses to be forked from then on.
    backward = torch.cuda.device_count() == 0
    if backward:
        # Before anything else: FSDP2 uses fake tensors, after which a CUDA build without a GPU counts eight of them.
        torch.ones(1, requires_grad=True).sum().backward()
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    try:
        _sharded_step(backward=backward)
    finally:
        dist.destroy_process_group()
        torch.set_rng_state(state)
    # What the step left in cycles holds the fake group; a rank must not meet it.
    gc.collect()


def _sharded_step(*, backward: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(2, 4)).sum()
    if backward:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def refuse_unsafe_fork() -> None:
    """Check that a fork of this process can run collectives and backwards.

    Raises:
        UnsupportedError: The process has threads, a process group or a CUDA context. A forked rank would hang on a lock
            that nobody releases, or use handles that do not survive a fork.
    """
    if dist.is_initialized():
        raise _refusal("a process group is initialised in it", "Call torch.distributed.destroy_process_group() first")
    if torch.cuda.is_initialized():
        raise _refusal("CUDA is initialised in it", 'Set CUDA_VISIBLE_DEVICES="" for tests that need no GPU')
    if threads := _python_threads():
        raise _refusal(f"other threads run in it ({', '.join(threads)})", "End and join them first")
    if count := _native_threads():
        raise _refusal(
            f"{count} native threads run in it, probably of a torch operation that was not held to one thread",
            "Set OMP_NUM_THREADS=1, or call meshbolt.testing.warm() before anything computes, as in conftest.py",
        )


def _refusal(state: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        f"run_ranks forks this process, but {state}, and a forked rank could hang or crash. "
        f'{remedy}, or use start="spawn".'
    )


def _python_threads() -> list[str]:
    """Return the names of the Python threads besides this one, those of pytest-xdist's channel left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [
        names.get(ident, f"thread {ident}")
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident() and not _belongs_to_xdist(frame)
    ]


def _belongs_to_xdist(frame: FrameType | None) -> bool:
    # execnet's receiver sits in a blocking read of a pipe that no rank ever touches.
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("execnet"):
            return True
        frame = frame.f_back
    return False


def _native_threads() -> int:
    """Return how many threads there are beyond Python's own, as far as the system tells."""
    python = len(sys._current_frames())
    if _tasks() <= python:
        return 0
    # A pool such as OpenBLAS's ends itself at any fork and comes back when needed: only what survives a fork counts.
    with quiet_fork():
        child = os.fork()
        if child == 0:
            os._exit(0)
    os.waitpid(child, 0)
    return max(0, _tasks() - python)


def _tasks() -> int:
    """Return how many threads the system lists, without the kernel's own for io_uring, which outlive a ring for a moment."""
    count = 0
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            count += not (task / "comm").read_text().startswith("iou-")
    return count


@contextlib.contextmanager
def quiet_fork() -> Iterator[None]:
    """Silence Python's general warning about forks of a process with threads; the threads have been looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        yield

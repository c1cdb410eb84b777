"""Warming leaves a process that can be forked, and one that cannot is refused with the reason."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from meshbolt.errors import UnsupportedError
from meshbolt.testing.warm import _step_once, refuse_unsafe_fork, warm


@contextmanager
def waiting_thread(name: str) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_warming_leaves_no_group_no_thread_no_variable_and_the_same_random_numbers():
    threads, variables, state = threading.active_count(), dict(os.environ), torch.get_rng_state()
    _step_once.cache_clear()
    warm(lightning=True)
    assert not dist.is_initialized()
    assert threading.active_count() == threads
    assert dict(os.environ) == variables
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 1
    refuse_unsafe_fork()


def test_a_second_warming_costs_nothing():
    warm()
    hits = _step_once.cache_info().hits
    warm()
    assert _step_once.cache_info().hits == hits + 1


def test_a_process_with_another_thread_is_refused_and_the_thread_is_named():
    with waiting_thread("prefetcher"), pytest.raises(UnsupportedError, match=r"other threads run in it \(prefetcher\)"):
        refuse_unsafe_fork()
    refuse_unsafe_fork()


def test_a_process_with_a_process_group_is_refused(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedError, match="a process group is initialised"):
            refuse_unsafe_fork()
    finally:
        dist.destroy_process_group()

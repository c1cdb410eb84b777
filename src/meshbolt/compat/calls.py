"""The collectives and messages that this process starts: the methods of groups that all of torch's functions go through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

# Told of each: what it is, in which group, its bytes on this rank, the work that can be waited for, and when it was begun.
Observer = Callable[[str, Any, int, Any, float], None]

# By the names of methods, which differ between versions of torch.
_METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
    "barrier": "barrier",
}
_observers: list[Observer] = []
# As they stand in the class: what is bound by being read there would not be any more.
_own: dict[str, Any] = {}


@contextmanager
def collectives_observed(observer: Observer) -> Iterator[None]:
    """Tell of each collective and message that this process starts, while this is entered; several leave in any order.

    Args:
        observer: told right after it was started, in the thread that has done so.
    """
    if not _observers:
        _replace()
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
        if not _observers:
            for name, own in _own.items():
                setattr(dist.ProcessGroup, name, own)
            _own.clear()


def _replace() -> None:
    for name, collective in _METHODS.items():
        if name in vars(dist.ProcessGroup):
            _own[name] = vars(dist.ProcessGroup)[name]
            setattr(dist.ProcessGroup, name, _telling(getattr(dist.ProcessGroup, name), collective))


def _telling(plain: Any, collective: str) -> Any:
    @functools.wraps(plain)
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        begun_seconds = perf_counter()
        work = plain(group, *args, **kwargs)
        num_bytes = _payload_bytes((*args, *kwargs.values()))
        for observer in tuple(_observers):
            observer(collective, group, num_bytes, work, begun_seconds)
        return work

    return call


def _payload_bytes(arguments: tuple[Any, ...]) -> int:
    """Return the bytes of the larger side: what a gather returns, what a scatter is given, else what is sent."""
    return max(map(_bytes_of, arguments), default=0)


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, (list, tuple)):
        return sum(_bytes_of(each) for each in argument)
    return 0

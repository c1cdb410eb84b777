"""Where a rank's computation waits for other ranks: the calls of torch that all such waits go through."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional


@contextmanager
def waits_observed(device: torch.device, begin: Callable[[], Any], end: Callable[[Any], None]) -> Iterator[None]:
    """Surround each wait of this thread's computation for other ranks, while this is entered.

    On a GPU, where nobody waits but its stream, they are those of the current stream for the end of work in others.

    Args:
        device: where it computes.
        begin: called before a wait.
        end: called after it, with what `begin` has returned.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            # Streams wait for streams by way of an event too.
            own = functools.partial(_surrounded, torch.cuda.Stream, "wait_event", begin, end)
            stack.enter_context(own(when=lambda self: self == stream))
            when = _in_stream(stream)
        else:
            when = _in_thread(threading.get_ident())
        stack.enter_context(_surrounded(dist.Work, "wait", begin, end, when=when))
        stack.enter_context(_surrounded(functional, "wait_tensor", begin, end, when=when))
        yield


def _in_stream(stream: Any) -> Callable[[Any], bool]:
    return lambda _: bool(torch.cuda.current_stream(stream.device) == stream)


def _in_thread(thread: int) -> Callable[[Any], bool]:
    return lambda _: threading.get_ident() == thread


@contextmanager
def _surrounded(
    owner: Any,
    name: str,
    begin: Callable[[], Any],
    end: Callable[[Any], None],
    *,
    when: Callable[[Any], bool],
) -> Iterator[None]:
    plain = getattr(owner, name)
    had_own = name in vars(owner)

    @functools.wraps(plain)
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not when(self):
            return plain(self, *args, **kwargs)
        since = begin()
        try:
            return plain(self, *args, **kwargs)
        finally:
            end(since)

    setattr(owner, name, wait)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, plain)
        else:
            delattr(owner, name)

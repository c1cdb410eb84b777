"""Where a rank's computation waits for other ranks: the calls of torch that all such waits go through."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

Begin = Callable[[], Any]
End = Callable[[Any], None]


@contextmanager
def waits_observed(device: torch.device, begin: Begin, end: End) -> Iterator[None]:
    """Surround each wait of this thread's computation for other ranks, while this is entered.

    On a GPU, where nobody waits but its stream, they are those of the current stream for the end of work in others. Several may
    be entered, and left in any order.

    Args:
        device: where it computes.
        begin: called before a wait.
        end: called after it, with what `begin` has returned.
    """
    waits = _waits_of(device)
    added = [(wait, wait.add(begin, end)) for wait in waits]
    try:
        yield
    finally:
        for wait, observer in added:
            wait.remove(observer)


class _Wait:
    """A function that waits, and who observes it; it is replaced while there is anybody.

    Args:
        owner: class or module that has it.
        name: of it.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._plain: Any = None
        self._had_own = False
        self._observers: list[tuple[Callable[[Any], bool], Begin, End]] = []

    def add(self, when: Callable[[Any], bool], begin: Begin, end: End) -> Any:
        """Add an observer; return what removes it."""
        if not self._observers:
            self._replace()
        self._observers.append((when, begin, end))
        return self._observers[-1]

    def remove(self, observer: Any) -> None:
        """Remove an observer."""
        self._observers = [each for each in self._observers if each is not observer]
        if self._observers:
            return
        if self._had_own:
            setattr(self._owner, self._name, self._plain)
        else:
            delattr(self._owner, self._name)

    def _replace(self) -> None:
        plain = self._plain = getattr(self._owner, self._name)
        self._had_own = self._name in vars(self._owner)

        @functools.wraps(plain)
        def wait(waited: Any, *args: Any, **kwargs: Any) -> Any:
            begun = [(end, begin()) for when, begin, end in self._observers if when(waited)]
            try:
                return plain(waited, *args, **kwargs)
            finally:
                for end, since in begun:
                    end(since)

        setattr(self._owner, self._name, wait)


class _Chosen:
    """A wait, and which of its calls are of a computation."""

    def __init__(self, wait: _Wait, when: Callable[[Any], bool]) -> None:
        self._wait, self._when = wait, when

    def add(self, begin: Begin, end: End) -> Any:
        """Add an observer of these calls; return what removes it."""
        return self._wait.add(self._when, begin, end)

    def remove(self, observer: Any) -> None:
        """Remove an observer."""
        self._wait.remove(observer)


_WORK, _FUNCTIONAL = _Wait(dist.Work, "wait"), _Wait(functional, "wait_tensor")
# Streams wait for streams by way of an event too.
_EVENT = _Wait(torch.cuda.Stream, "wait_event")


def _waits_of(device: torch.device) -> list[_Chosen]:
    if device.type != "cuda":
        when = _in_thread(threading.get_ident())
        return [_Chosen(_WORK, when), _Chosen(_FUNCTIONAL, when)]
    stream = torch.cuda.current_stream(device)
    when = _in_stream(stream)
    return [_Chosen(_EVENT, lambda waiting: waiting == stream), _Chosen(_WORK, when), _Chosen(_FUNCTIONAL, when)]


def _in_stream(stream: Any) -> Callable[[Any], bool]:
    return lambda _: bool(torch.cuda.current_stream(stream.device) == stream)


def _in_thread(thread: int) -> Callable[[Any], bool]:
    return lambda _: threading.get_ident() == thread

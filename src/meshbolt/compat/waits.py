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

Begin = Callable[[Any], Any]
End = Callable[[Any], None]


@contextmanager
def waits_observed(device: torch.device, begin: Callable[[], Any], end: End) -> Iterator[None]:
    """Surround each wait of this thread's computation for other ranks, while this is entered.

    On a GPU, where nobody waits but its stream, they are those of the current stream for the end of work in others. Several may
    be entered, and left in any order.

    Args:
        device: where it computes.
        begin: called before a wait.
        end: called after it, with what `begin` has returned.
    """
    with ExitStack() as stack:
        for wait, when in _waits_of(device):
            stack.enter_context(wait.observed(when, lambda _: begin(), end))
        yield


@contextmanager
def works_observed(begin: Begin, end: End) -> Iterator[None]:
    """Surround each wait of this thread for the end of a collective or a message, while this is entered.

    Args:
        begin: called before a wait, with the work that is waited for.
        end: called after it, with what `begin` has returned.
    """
    with _WORK.observed(_in_thread(threading.get_ident()), begin, end):
        yield


class _Wait:
    """A function that waits, and who observes it; it is replaced while there is anybody.

    Args:
        owner: class or module that has it.
        name: of it.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._own: Any = None  # as it stands in the owner: what is bound by being read there would not be any more
        self._observers: list[tuple[Callable[[Any], bool], Begin, End]] = []

    @contextmanager
    def observed(self, when: Callable[[Any], bool], begin: Begin, end: End) -> Iterator[None]:
        """Have somebody observe calls for a while.

        Args:
            when: whether a call is to be observed, by what is waited for.
            begin: called before it, with that.
            end: called after it, with what `begin` has returned.
        """
        observer = (when, begin, end)
        if not self._observers:
            self._replace()
        self._observers = [*self._observers, observer]
        try:
            yield
        finally:
            self._observers = [each for each in self._observers if each is not observer]
            if not self._observers:
                self._put_back()

    def _put_back(self) -> None:
        if self._own is not None:
            setattr(self._owner, self._name, self._own)
        else:
            delattr(self._owner, self._name)

    def _replace(self) -> None:
        plain, self._own = getattr(self._owner, self._name), vars(self._owner).get(self._name)

        @functools.wraps(plain)
        def wait(waited: Any, *args: Any, **kwargs: Any) -> Any:
            begun = [(end, begin(waited)) for when, begin, end in self._observers if when(waited)]
            try:
                return plain(waited, *args, **kwargs)
            finally:
                for end, since in begun:
                    end(since)

        setattr(self._owner, self._name, wait)


_WORK, _FUNCTIONAL = _Wait(dist.Work, "wait"), _Wait(functional, "wait_tensor")
# Streams wait for streams by way of an event too.
_EVENT = _Wait(torch.cuda.Stream, "wait_event")


def _waits_of(device: torch.device) -> list[tuple[_Wait, Callable[[Any], bool]]]:
    if device.type != "cuda":
        when = _in_thread(threading.get_ident())
        return [(_WORK, when), (_FUNCTIONAL, when)]
    stream = torch.cuda.current_stream(device)
    when = _in_stream(stream)
    return [(_EVENT, lambda waiting: waiting == stream), (_WORK, when), (_FUNCTIONAL, when)]


def _in_stream(stream: Any) -> Callable[[Any], bool]:
    return lambda _: bool(torch.cuda.current_stream(stream.device) == stream)


def _in_thread(thread: int) -> Callable[[Any], bool]:
    return lambda _: threading.get_ident() == thread

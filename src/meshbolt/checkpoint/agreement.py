"""Ranks that act together: what fails on one of them fails on all, in the same words and before anything could hang."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist

from meshbolt.errors import CheckpointError, UnsupportedError

T = TypeVar("T")

_SHOWN_FAILURES = 3
_SHOWN_CHARACTERS = 600


class ReplacedError(CheckpointError):
    """A checkpoint was replaced or removed while it was read: another look may find a whole one."""


class Ranks:
    """The ranks that save or load one checkpoint; a single process where no process group is initialised.

    Attributes:
        group: the group they exchange over; None for the default group or a single process.
        alone: whether there is no process group.
        rank: this process's number in the group.
        size: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        if not self.alone and "cpu:" not in dist.get_backend_config(group):
            raise UnsupportedError(
                f"A checkpoint is planned over the CPU, and this process group has only {dist.get_backend(group)!r}. "
                'Pass group=torch.distributed.new_group(backend="gloo").'
            )
        self.rank = 0 if self.alone else dist.get_rank(group)
        self.size = 1 if self.alone else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this process does what is done once: the commit, and the files that are not shards."""
        return self.rank == 0

    def each(self, action: Callable[[], T], *, failing: str) -> list[T]:
        """Run an action without collectives on every rank, and return what it returned, by rank.

        Args:
            action: what this rank does; the value it returns goes to every rank, so it is small.
            failing: how the error's message begins, such as "Checkpoint 'a.ckpt' cannot be read".

        Raises:
            CheckpointError: the action failed on some rank; the same on every rank.
        """
        own: BaseException | None = None
        value: T | None = None
        try:
            value = action()
        except BaseException as error:  # an interrupt as well: the other ranks wait for this one
            own = error
        outcomes = self.gather((own and in_words(own), kind_of([own]), value), failing=failing)
        if own is not None and not isinstance(own, Exception):
            raise own
        texts = [text for text, _, _ in outcomes]
        if any(text is not None for text in texts):
            kinds = {kind for text, kind, _ in outcomes if text is not None}
            kind = ReplacedError if kinds == {ReplacedError} else CheckpointError
            raise kind(f"{failing}: {summary(texts)}") from own
        return [returned for *_, returned in outcomes]

    def agree(self, action: Callable[[], T], *, failing: str) -> T:
        """Run an action as `each` does, and return what it returned on this rank, which may be large."""
        own: list[T] = []
        self.each(lambda: own.append(action()), failing=failing)
        return own[0]

    def gather(self, value: Any, *, failing: str) -> list[Any]:
        """Return the value of every rank, by rank.

        Raises:
            CheckpointError: another rank is gone.
        """
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except Exception as error:  # gloo has errors of several classes for a peer that is gone
            raise lost_contact(error, failing=failing) from error
        return values


def kind_of(failures: Iterable[BaseException | None]) -> type[CheckpointError]:
    """Return the class of the error that all ranks raise for what failed on some."""
    return ReplacedError if all(isinstance(one, ReplacedError) for one in failures) else CheckpointError


def lost_contact(error: BaseException, *, failing: str) -> CheckpointError:
    """Return the error for a collective that failed: no rank can be asked any more what went wrong there."""
    return CheckpointError(
        f"{failing}: the contact with another rank was lost ({in_words(error)}). "
        "It has probably died: look at the output of the other ranks, then start again."
    )


def in_words(error: BaseException) -> str:
    """Return an error as text that travels between ranks: ours as it is, of others the class and the first line."""
    if isinstance(error, CheckpointError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *(line[:_SHOWN_CHARACTERS] for line in lines[:1])])


def summary(texts: list[str | None]) -> str:
    """Return what went wrong on which ranks as one sentence; without the numbers where it is the same on all.

    Args:
        texts: by rank, what went wrong there, or None.
    """
    by_text: defaultdict[str, list[int]] = defaultdict(list)
    for rank, text in enumerate(texts):
        if text is not None:
            by_text[text].append(rank)
    if len(by_text) == 1 and None not in texts:
        return next(iter(by_text))
    shown = [f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items()]
    more = len(shown) - _SHOWN_FAILURES
    return "; ".join(shown[:_SHOWN_FAILURES]) + (f"; and {more} more" if more > 0 else "")

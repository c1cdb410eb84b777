"""What torch keeps private of the connections between ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

# Of gloo's connections, which raise plain RuntimeErrors; other backends have classes of their own.
_BROKEN = re.compile(r"gloo/transport|pair closure|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)
_NOBODYS_TAG = 0x6D657368


def is_broken_connection(error: BaseException) -> bool:
    """Return whether an error, or one that has led to it, says that another rank is gone or has not answered in time."""
    return any(map(_says_so, _chain(error)))


def _says_so(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and _BROKEN.search(str(error)) is not None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def end_connections(*, but: Sequence[dist.ProcessGroup] = ()) -> None:
    """End this rank's connections to others in all of its gloo groups, for good.

    Whoever waits for this rank there gets an error now, instead of one at the timeout.

    Args:
        but: groups whose connections stay.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if "gloo" in dist.get_backend(group) and group.size() > 1 and not any(group is each for each in but):
            _end(group)


def _end(group: dist.ProcessGroup) -> None:
    # gloo has no way to be told: a receive that times out ends the connections of its group.
    nothing = torch.zeros(1)
    with suppress(RuntimeError):
        work = dist.irecv(nothing, group=group, group_src=(group.rank() + 1) % group.size(), tag=_NOBODYS_TAG)
        if work is not None:
            work.wait(timedelta(milliseconds=1))

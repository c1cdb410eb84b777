"""The columns of a parameter as tensors, where a tier has them in memory for a visit only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from meshbolt.compat import StoredTensor
from meshbolt.offload.entries import MASTER, Entry, OwnStore


class Keeper(Protocol):
    """What reads and writes columns."""

    def runs(self, entry: Entry, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield a part of a parameter's column in runs, in the order of the parameter's memory."""

    def read(self, entry: Entry, names: list[str]) -> dict[str, torch.Tensor]:
        """Return copies of columns in the parameter's shape."""

    def put(self, entry: Entry, name: str, values: torch.Tensor) -> None:
        """Write values of the parameter's shape to a column."""


def stored_columns(entry: Entry, keeper: Keeper, *, settle: Callable[[], None]) -> dict[str, StoredTensor]:
    """Return a parameter's columns, without the master, as tensors that are read when they are used, always the same ones.

    Changes of all of one in place are written at once; those of parts are kept in it, for who looks whether there are any.

    Args:
        entry: the parameter.
        keeper: of the columns.
        settle: waits for updates, before what lies there is read.
    """
    for name in entry.slot.columns if not entry.stored else ():
        if name != MASTER:
            entry.stored[name] = StoredTensor(
                _Column(entry, name, keeper, settle),
                shape=entry.shape,
                dtype=entry.slot.dtype,
                write=functools.partial(keeper.put, entry, name),
            )
    return entry.stored


def without_stored(entry: Entry, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer has for a parameter beside the tensors of `stored_columns`.

    Args:
        entry: the parameter.
        state: of the optimizer, for it.
    """
    return {key: value for key, value in state.items() if value is not entry.stored.get(key)}


def is_changed(entry: Entry, state: Mapping[str, Any]) -> bool:
    """Return whether somebody has put something into a parameter's state, changed a part of it, or taken something out.

    Args:
        entry: the parameter.
        state: of the optimizer, for it.
    """
    own = without_stored(entry, state) if entry.stored else state
    is_kept = any(stored.kept is not None and state.get(name) is stored for name, stored in entry.stored.items())
    return is_kept or len(own) != len(entry.shown) or any(own[key] is not entry.shown.get(key) for key in own)


class _Column(OwnStore):
    """The values of one column of a parameter."""

    def __init__(self, entry: Entry, name: str, keeper: Keeper, settle: Callable[[], None]) -> None:
        self._entry, self._name, self._keeper, self._settle = entry, name, keeper, settle

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Read what lies there now; where the parameter's memory is in another order, all of it."""
        self._settle()
        if self._entry.is_in_order:
            yield from self._keeper.runs(self._entry, self._name, start, stop)
        else:
            yield self._keeper.read(self._entry, [self._name])[self._name].reshape(-1)[start:stop]

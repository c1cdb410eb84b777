"""Sums over all ranks that nobody waits for: asked for after one step, there after a later one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class LateSums(Generic[T]):
    """Adds up numbers of all ranks in the background, one small collective at a time.

    All ranks must ask for sums after the same steps. Without other ranks, a sum is there at once.

    Args:
        names: of the numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._asked: tuple[T, torch.Tensor, Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self.ranks > 1:
            # Through the hosts: a collective of the devices would have to be waited for there.
            gloo = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo")

    def ask(self, about: T, numbers: Mapping[str, float]) -> None:
        """Begin to add up numbers; take the sums of what was asked before, first.

        Args:
            about: comes back with the sums.
            numbers: this rank's, by name.
        """
        if self._asked is not None:
            raise AssertionError("Sums are asked for before the last ones were taken.")
        values = torch.tensor([numbers[name] for name in self._names], dtype=torch.float64)
        work = dist.all_reduce(values, group=self._group, async_op=True) if self._group is not None else None
        self._asked = (about, values, work)

    def take(self, *, wait: bool = False) -> tuple[T, dict[str, float]] | None:
        """Return what was asked for, once; None where it is not there yet, or nothing was asked for.

        Args:
            wait: until it is there.
        """
        if self._asked is None:
            return None
        about, values, work = self._asked
        if work is not None:
            if not wait and not work.is_completed():
                return None
            work.wait()
        self._asked = None
        return about, dict(zip(self._names, values.tolist(), strict=True))

    def close(self) -> None:
        """Let go of the group; all ranks call it together."""
        if self._group is not None and self._group is not dist.group.WORLD:
            dist.destroy_process_group(self._group)
        self._group = None

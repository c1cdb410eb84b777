"""Launch all-gathers ahead of the forward, so that they travel behind the computation.

The order in which units run is observed in the first forward and never assumed; if it changes later, a gather that nobody takes
is thrown away, which costs time and nothing else. All launches happen after a step was entered, so that whatever was changed in
the shards before it (a loaded checkpoint, a swapped average, an edit by hand) is what is gathered. Memory is bounded: what is
launched at the entry is bounded in bytes, and units larger than the bound are not gathered ahead at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from meshbolt import compat
from meshbolt.units import MIB

AHEAD_BYTES = 16 * MIB


class Prefetch:
    """All-gathers of the coming units, launched at the entry of a step and while its forward runs."""

    def __init__(self, units: Mapping[str, FSDPModule], *, keeps_gathered: bool) -> None:
        """Watch the units' forwards.

        Args:
            units: all units but the root, by name.
            keeps_gathered: units stay gathered after their forward (stages 1 and 2), so that all may be gathered at once;
                else only the next ones are, to bound memory.
        """
        self._units = dict(units)
        self._keeps_gathered = keeps_gathered
        self._bytes = {name: compat.gathered_bytes(unit) for name, unit in units.items()}
        self._small = {name for name, num_bytes in self._bytes.items() if num_bytes <= AHEAD_BYTES}
        self._seen: list[str] | None = None
        self._order: list[str] | None = None
        for name, unit in self._units.items():
            if name in self._small:
                compat.set_async_gather(unit)
            else:
                # A unit as its own successor: torch then gathers nothing ahead in backward.
                unit.set_modules_to_backward_prefetch([unit])
            cast("nn.Module", unit).register_forward_pre_hook(self._watch(name), prepend=True)

    def enter_step(self) -> None:
        """Launch the gathers of the first units; to be called before a forward that a backward follows."""
        if self._order is None:
            self._seen = []
            return
        budget_bytes = AHEAD_BYTES
        for name in self._order if self._keeps_gathered else self._order[:2]:
            unit = self._units[name]
            budget_bytes -= self._bytes[name]
            if budget_bytes < 0:
                return
            if not compat.is_gathered(unit):
                unit.unshard(async_op=True)

    def end_forward(self) -> None:
        """Take the order that the first forward has shown."""
        if self._seen is None:
            return
        # A unit that runs twice in a forward has no single place in the order: then nothing is gathered ahead.
        self._order = list(self._seen) if len(set(self._seen)) == len(self._seen) else []
        self._seen = None
        for name, following in zip(self._order, self._order[1:], strict=False):
            if following in self._small:
                self._units[name].set_modules_to_forward_prefetch([self._units[following]])

    def drop(self) -> None:
        """Throw away gathers that no forward has taken."""
        for unit in self._units.values():
            compat.drop_pending_gather(unit)

    def _watch(self, name: str) -> Callable[..., None]:
        def seen(*_: object) -> None:
            if self._seen is not None:
                self._seen.append(name)

        return seen

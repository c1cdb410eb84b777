"""Launch all-gathers ahead of the forward, so that they travel behind the computation.

The order in which units run is observed in the first forward and never assumed: a model whose order changes from step to step
gets no prefetch. All launches happen after a step was entered, so that whatever was changed in the shards before it (a loaded
checkpoint, a swapped average, an edit by hand) is what is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import FSDPModule

from meshbolt import compat
from meshbolt.units import MIB

AHEAD_BYTES = 32 * MIB


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
        self._seen: list[str] = []
        self._order: list[str] | None = None
        self._watching = True
        for name, unit in self._units.items():
            compat.set_async_gather(unit)
            if isinstance(unit, nn.Module):
                unit.register_forward_pre_hook(self._watch(name), prepend=True)

    def enter_step(self) -> None:
        """Launch the gathers of the first units; to be called before the forward, with gradients enabled."""
        if self._watching and self._seen:
            self._adopt_order()
        self._seen.clear()
        budget_bytes = AHEAD_BYTES
        for name in (self._order or [])[: None if self._keeps_gathered else 2]:
            unit = self._units[name]
            budget_bytes -= sum(p.numel() * p.element_size() for p in compat.managed_parameters(unit))
            if budget_bytes < 0:
                return
            if not compat.is_gathered(unit):
                unit.unshard(async_op=True)

    def drop(self) -> None:
        """Throw away gathers that no forward has taken."""
        for unit in self._units.values():
            compat.drop_pending_gather(unit)

    def _adopt_order(self) -> None:
        self._watching = False
        if len(set(self._seen)) != len(self._seen):
            return  # a unit that runs twice in a forward has no single place in the order
        self._order = list(self._seen)
        for name, following in zip(self._order, self._order[1:], strict=False):
            self._units[name].set_modules_to_forward_prefetch([self._units[following]])

    def _watch(self, name: str):  # type: ignore[no-untyped-def]
        def seen(*_: object) -> None:
            if self._watching:
                self._seen.append(name)

        return seen

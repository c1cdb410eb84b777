"""What an optimizer shows of the state that lies outside of it, and what others put there.

For each parameter that was updated, `optimizer.state` has what the optimizer itself would have: tensors of its shape, which
are views of the columns in memory, and a step count. Whatever else is found there (after a load, or because the optimizer
made state when it was made) is copied into the columns before the next update, and replaced by the views. Where the columns are
in a file there are no views, and the step count is all that is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.compat import local_tensor
from meshbolt.offload.entries import MASTER, Entry
from meshbolt.offload.layout import Layout, Slot, StateChunk
from meshbolt.offload.pages import use_huge_pages
from meshbolt.offload.planning import slots_of
from meshbolt.offload.rules import Rule, Settings, settings_of
from meshbolt.offload.tiers import Columns, Tier
from meshbolt.offload.transfers import Live, Transfers

# By column, what is to be put into it: values, or one value for all elements.
_Puts = dict[str, "torch.Tensor | float"]


class Book:
    """The parameters of one optimizer, and what is kept for each."""

    def __init__(self, optimizer: Optimizer, *, rule: Rule, layout: Layout, full_precision: bool) -> None:
        """Begin without parameters.

        Args:
            optimizer: the user's.
            rule: how it updates.
            layout: where its state lies.
            full_precision: 16-bit parameters are updated in float32.
        """
        self._optimizer, self._rule, self._layout, self._full_precision = optimizer, rule, layout, full_precision
        self._entries: list[Entry] = []
        self._numbers: dict[nn.Parameter, int] = {}
        self._groups: dict[nn.Parameter, int] = {}
        self._seen: list[tuple[int, int]] = []
        self._tiers: Mapping[bool, Tier] = {}
        self._transfers: Mapping[bool, Transfers] = {}

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """The optimizer's."""
        return cast("dict[nn.Parameter, dict[str, Any]]", self._optimizer.state)

    def use(self, tiers: Mapping[bool, Tier], transfers: Mapping[bool, Transfers]) -> None:
        """Choose where columns lie, by whether they stay on the parameters' device.

        Args:
            tiers: the places.
            transfers: between the model and these places.
        """
        self._tiers, self._transfers = tiers, transfers

    def entry_of(self, parameter: nn.Parameter) -> Entry | None:
        """Return what is kept for a parameter; None: nothing."""
        number = self._numbers.get(parameter)
        return None if number is None else self._entries[number]

    @property
    def entries(self) -> Sequence[Entry]:
        """Those of all parameters."""
        return self._entries

    # Places -----------------------------------------------------------------------------------------------------------

    def include(self, units: Mapping[str, Sequence[nn.Parameter]], *, fraction: float) -> None:
        """Make room for parameters that have none, and copy those that need a copy.

        Args:
            units: parameters of the optimizer, by the unit they are updated with; in the order of the forward pass.
            fraction: of the state's bytes leaves the parameters' device.
        """
        settings = self.settings()
        new = [
            (unit, p, settings[group])
            for unit, parameters in units.items()
            for p in parameters
            if p not in self._numbers and (group := self.group_of(p)) is not None
        ]
        slots = slots_of(new, rule=self._rule, fraction=fraction, full_precision=self._full_precision)
        made = self._layout.add(slots)
        for (unit, parameter, _), slot in zip(new, slots, strict=True):
            self._enter(parameter, slot, name=f"parameter {len(self._entries)} (of {unit!r})")
        for stays, tier in self._tiers.items():
            tier.add([section for section in made if section.stays is stays])
        added = self._entries[len(self._entries) - len(new) :]
        self._find_views(added)
        self._copy_masters([entry for entry in added if entry.has_master], afresh=True)

    def _enter(self, parameter: nn.Parameter, slot: Slot, *, name: str) -> None:
        local = local_tensor(parameter)
        number = self._numbers[parameter] = len(self._entries)
        entry = Entry(
            parameter=parameter, name=name, number=number, slot=slot, shape=local.shape, stride=local.stride()
        )
        shard = entry.shard  # whose memory has no gaps
        if shard.device.type == "cpu" and not entry.has_master:
            use_huge_pages(shard)
        entry.scalars = [{} for _ in self._layout.chunks_of([number])]
        self._entries.append(entry)

    def _find_views(self, entries: Iterable[Entry]) -> None:
        chosen = {entry.number: entry for entry in entries}
        for section in self._layout.sections:
            columns = self._tiers[section.stays].whole(section)
            for number, place in section.places.items() if columns is not None else ():
                entry = chosen.get(number)
                names = [name for name in section.columns if name != MASTER] if entry is not None else []
                for name in names:
                    run = columns[name][place : place + entry.slot.numel]  # type: ignore[index, union-attr]
                    entry.views[name] = entry.shaped(run)  # type: ignore[union-attr]

    # Groups -----------------------------------------------------------------------------------------------------------

    def group_of(self, parameter: nn.Parameter) -> int | None:
        """Return the number of the group that has a parameter; None: none has."""
        return self.groups().get(parameter)

    def groups(self) -> Mapping[nn.Parameter, int]:
        """Return the number of each parameter's group."""
        seen = [(id(group), len(group["params"])) for group in self._optimizer.param_groups]
        if seen != self._seen:
            # A load makes new groups, and a callback may add some.
            self._seen = seen
            self._groups = {
                p: number for number, group in enumerate(self._optimizer.param_groups) for p in group["params"]
            }
        return self._groups

    def settings(self) -> dict[int, Settings]:
        """Return the groups' settings as they are now."""
        return {
            number: settings_of(self._optimizer, group) for number, group in enumerate(self._optimizer.param_groups)
        }

    # State ------------------------------------------------------------------------------------------------------------

    def begin(
        self, gradients: Mapping[int, tuple[torch.Tensor, int]], settings: Mapping[int, Settings]
    ) -> dict[int, Live]:
        """Count a step of parameters, and return what their update needs.

        Args:
            gradients: and the number of the group, by the number of the parameter.
            settings: of the groups.
        """
        entries = [self._entries[number] for number in gradients]
        self.take_over(entries, settings=settings)
        self._copy_masters([entry for entry in entries if entry.is_edited()])
        live = {entry.number: self._begin(entry, *gradients[entry.number]) for entry in entries}
        if self._rule.counts:
            torch._foreach_add_([each.count for each in live.values() if each.count is not None], 1)
        return live

    def end(self, entries: Iterable[Entry]) -> None:
        """Show what an update has left.

        Args:
            entries: that were updated.
        """
        for entry in entries:
            state = self.state[entry.parameter]
            state.update(entry.scalars[0])
            entry.shown = dict(state)
            if entry.has_master:
                entry.note_equal()

    def take_over(self, entries: Sequence[Entry], *, settings: Mapping[int, Settings]) -> None:
        """Copy into the columns what somebody has put into the optimizer's state, and show the columns in its place.

        Args:
            entries: of any parameters.
            settings: of the groups.
        """
        puts: dict[int, _Puts] = {}
        for entry in entries:
            state = self.state.get(entry.parameter)
            if state is None:
                puts[entry.number] = self._reset(entry, settings)
            elif len(state) != len(entry.shown) or any(state[key] is not entry.shown.get(key) for key in state):
                puts[entry.number] = self._taken(entry, state, settings)
        self._put(puts)

    def _reset(self, entry: Entry, settings: Mapping[int, Settings]) -> _Puts:
        group = self.group_of(entry.parameter)
        initial = self._rule.columns(settings[0 if group is None else group])
        was_started, entry.started, entry.shown = entry.started, False, {}
        entry.scalars = [{} for _ in entry.scalars]
        return {name: value for name, value in initial.items() if was_started or value}

    def _taken(self, entry: Entry, state: dict[str, Any], settings: Mapping[int, Settings]) -> _Puts:
        names = [name for name in entry.slot.columns if name != MASTER]
        if not state or not (self._rule.counts or not names or any(state.get(name) is not None for name in names)):
            return self._reset(entry, settings)
        puts: _Puts = {}
        scalars: dict[str, Any] = {}
        for key, value in list(state.items()):
            if key not in names:
                scalars[key] = _as_count(value) if key == "step" and self._rule.counts else value
            elif value is None:
                del state[key]
            elif value is not entry.views.get(key):
                puts[key] = entry.flat(value)
        entry.started = True
        if not self._rule.cuts:
            entry.scalars = [_copies(scalars) for _ in entry.scalars]
            scalars = entry.scalars[0]
        state.update(scalars)
        state.update(entry.views)
        for name in puts if not entry.views else ():
            del state[name]
        entry.shown = dict(state)
        return puts

    def _begin(self, entry: Entry, gradient: torch.Tensor, group: int) -> Live:
        state = self.state[entry.parameter]
        is_first, entry.started = not entry.started, True
        if is_first:
            if self._rule.counts:
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
            state.update(entry.views)
        count = state["step"] if self._rule.counts else None
        return Live(entry=entry, shard=entry.shard, gradient=gradient, group=group, is_first=is_first, count=count)

    # Columns ----------------------------------------------------------------------------------------------------------

    def visit(self, numbers: Iterable[int], work: Any, *, writes: bool) -> None:
        """Call a function with all chunks that have a piece of some parameters.

        Args:
            numbers: of the parameters.
            work: takes a chunk and its columns.
            writes: whether it changes them.
        """
        chunks = self._layout.chunks_of(list(numbers))
        for stays, tier in self._tiers.items():
            own = [chunk for chunk in chunks if chunk.stays is stays]
            if own:
                with self._transfers[stays].apart():
                    tier.visit(own, work, writes=writes)

    def read(self, entry: Entry, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return copies of a parameter's columns, in its shape, on the device where they are visited.

        Args:
            entry: the parameter.
            names: of columns.
        """
        found: dict[str, torch.Tensor] = {}

        def copy(chunk: StateChunk, columns: Columns) -> None:
            for piece in chunk.pieces:
                for name in names if piece.slot == entry.number else ():
                    part = columns[name][piece.span(piece.start, piece.stop)]
                    whole = found.setdefault(name, torch.empty(entry.slot.numel, dtype=part.dtype, device=part.device))
                    whole[piece.start : piece.stop] = part

        self.visit([entry.number], copy, writes=False)
        return {name: entry.shaped(found[name]) for name in names}

    def put_master(self, entry: Entry, values: torch.Tensor) -> None:
        """Set a parameter's master copy, and the parameter with it.

        Args:
            entry: that has a master.
            values: of its shape, plain or a DTensor.
        """
        flat = entry.flat(values)
        self._put({entry.number: {MASTER: flat}})
        entry.shard.copy_(flat)
        entry.note_equal()

    def _put(self, puts: Mapping[int, _Puts]) -> None:
        @torch.no_grad()
        def put(chunk: StateChunk, columns: Columns) -> None:
            for piece in chunk.pieces:
                for name, value in puts.get(piece.slot, {}).items():
                    part = columns[name][piece.span(piece.start, piece.stop)]
                    if isinstance(value, torch.Tensor):
                        part.copy_(value[piece.start : piece.stop])
                    else:
                        part.fill_(value)

        self.visit([number for number, values in puts.items() if values], put, writes=True)

    def _copy_masters(self, entries: Sequence[Entry], *, afresh: bool = False) -> None:
        """Copy parameters to their masters; elements that are equal in the parameter's dtype keep their other bits."""
        shards = {entry.number: entry.shard for entry in entries}

        @torch.no_grad()
        def copy(chunk: StateChunk, columns: Columns) -> None:
            for piece in chunk.pieces:
                shard = shards.get(piece.slot)
                if shard is not None:
                    part = columns[MASTER][piece.span(piece.start, piece.stop)]
                    new = shard[piece.start : piece.stop].to(part.device)
                    keeps = None if afresh or new.dtype == part.dtype else part.to(new.dtype) == new
                    part.copy_(new if keeps is None else torch.where(keeps, part, new.to(part.dtype)))

        self.visit(shards, copy, writes=True)
        for entry in entries:
            entry.note_equal()


def _as_count(value: Any) -> torch.Tensor:
    number = local_tensor(value).item() if isinstance(value, torch.Tensor) else value
    return torch.tensor(float(number), dtype=torch.float32)


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: local_tensor(value).clone() if isinstance(value, torch.Tensor) else value for key, value in values.items()
    }

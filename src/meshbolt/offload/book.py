"""What an optimizer shows of the state that lies outside of it, and what others put there.

For each parameter that was updated, `optimizer.state` has what the optimizer itself would have: tensors of its shape, which
are views of the columns in memory, and a step count. Whatever else is found there (after a load, or because the optimizer
made state when it was made) is copied into the columns before the next update, and replaced by the views. Where the columns are
in a file there are no views, and the step count is all that is shown, but for a while on demand (`columns.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.compat import StoredTensor, copy_runs, local_tensor
from meshbolt.offload.columns import is_changed, without_stored
from meshbolt.offload.entries import MASTER, Entry
from meshbolt.offload.layout import Layout, Slot, StateChunk, which_stay
from meshbolt.offload.pages import use_huge_pages
from meshbolt.offload.planning import Places, Wanted, slots_of
from meshbolt.offload.rules import Rule, Settings, settings_of
from meshbolt.offload.tiers import Columns, Run, Tier
from meshbolt.offload.transfers import Live, Transfers
from meshbolt.offload.watching import Fingerprints

# By column, what is to be put into it: values, or one value for all elements.
_Puts = dict[str, "torch.Tensor | float"]


class Book:
    """The parameters of one optimizer, and what is kept for each."""

    def __init__(self, optimizer: Optimizer, *, rule: Rule, layout: Layout, places: Places) -> None:
        """Begin without parameters.

        Args:
            optimizer: the user's.
            rule: how it updates.
            layout: where its state lies.
            places: what decides where that is.
        """
        self._optimizer, self._rule, self._layout, self._places = optimizer, rule, layout, places
        self._entries: list[Entry] = []
        self._numbers: dict[nn.Parameter, int] = {}
        self._groups: dict[nn.Parameter, int] = {}
        self._fingerprints = Fingerprints()
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
        """Those of all parameters, without the ones whose state was moved."""
        return [entry for entry in self._entries if self._numbers[entry.parameter] == entry.number]

    # Places -----------------------------------------------------------------------------------------------------------

    def include(self, units: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Make room for parameters that have none, and copy those that need a copy.

        Args:
            units: parameters of the optimizer, by the unit they are updated with; in the order of the forward pass.
        """
        settings = self.settings()
        new = [
            (unit, p, settings[group])
            for unit, parameters in units.items()
            for p in parameters
            if p not in self._numbers and (group := self.group_of(p)) is not None
        ]
        added = self._add(new, slots_of(new, rule=self._rule, places=self._places))
        self._copy_masters([entry for entry in added if entry.has_master], afresh=True)

    def bring_back(self, budget_bytes: int) -> int:
        """Move state that has left the parameters' device back to it, of as many whole parameters as fit; no update is under way.

        Where it lay stays reserved.

        Args:
            budget_bytes: the most that it takes there.

        Returns:
            The bytes that it takes there.
        """
        settings = self.settings()
        places = replace(self._places, fraction=0.0)
        wanted = [
            (entry.slot.unit, entry.parameter, settings[group])
            for entry in self.entries
            if not entry.slot.stays and (group := self.group_of(entry.parameter)) is not None
        ]
        near = slots_of(wanted, rule=self._rule, places=places)
        fit = which_stay([slot.num_bytes if slot.stays else 0 for slot in near], budget=budget_bytes)
        chosen: dict[str, list[tuple[Wanted, Slot]]] = {}
        for each, slot, fits in zip(wanted, near, fit, strict=True):
            if fits:
                chosen.setdefault(slot.unit, []).append((each, slot))
        for pairs in chosen.values():  # one unit at a time is in memory twice
            self._move([each for each, _ in pairs], [slot for _, slot in pairs])
        return sum(slot.num_bytes for slot, fits in zip(near, fit, strict=True) if fits)

    def _move(self, wanted: Sequence[Wanted], slots: Sequence[Slot]) -> None:
        before = [self._entries[self._numbers[parameter]] for _, parameter, _ in wanted]
        values = [
            self.read(old, [n for n in slot.columns if n in old.slot.columns])
            for old, slot in zip(before, slots, strict=True)
        ]
        puts: dict[int, _Puts] = {}
        for old, new, kept in zip(before, self._add(wanted, slots), values, strict=True):
            new.started = old.started
            new.scalars = [_copies(old.scalars[0]) for _ in new.scalars]
            puts[new.number] = {name: new.flat(value) for name, value in kept.items()}
            if old.started:
                state = self.state[new.parameter]
                state.update({**new.scalars[0], **new.views})
                new.shown = dict(state)
        self._put(puts)

    def _add(self, wanted: Sequence[Wanted], slots: Sequence[Slot]) -> list[Entry]:
        """Make room, and return who has it."""
        made = self._layout.add(slots)
        for (unit, parameter, _), slot in zip(wanted, slots, strict=True):
            self._enter(parameter, slot, name=f"parameter {len(self._entries)} (of {unit!r})")
        for stays, tier in self._tiers.items():
            tier.add([section for section in made if section.stays is stays])
        added = self._entries[len(self._entries) - len(slots) :]
        self._find_views(added)
        return added

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
        self,
        gradients: Mapping[int, tuple[torch.Tensor, int]],
        settings: Mapping[int, Settings],
        *,
        ready: torch.cuda.Event | None = None,
    ) -> dict[int, Live]:
        """Count a step of parameters, and return what their update needs.

        Args:
            gradients: and the number of the group, by the number of the parameter.
            settings: of the groups.
            ready: an event after which a GPU is done with all that was to change parameters.
        """
        entries = [self._entries[number] for number in gradients]
        self.take_over(entries, settings=settings)
        self._find_stale([entry for entry in entries if entry.has_master], ready=ready)
        self._copy_masters([entry for entry in entries if entry.is_stale])
        live = {entry.number: self._begin(entry, *gradients[entry.number]) for entry in entries}
        if self._rule.counts:
            torch._foreach_add_([each.count for each in live.values() if each.count is not None], 1)
        return live

    def end(self, entries: Sequence[Entry]) -> None:
        """Show what an update has left.

        Args:
            entries: that were updated.
        """
        for entry in entries:
            state = self.state[entry.parameter]
            state.update(entry.scalars[0])
            entry.shown = without_stored(entry, state)
        self._note([entry for entry in entries if entry.has_master])

    def _find_stale(self, entries: Sequence[Entry], *, ready: torch.cuda.Event | None) -> None:
        """Find out whose master is not equal to the parameter any more."""
        if (file := self._places.parameters) is not None:
            if file.was_touched():
                for entry in self.entries:
                    entry.is_stale = entry.has_master
                file.clean()
            return
        for stays, transfers in self._transfers.items():
            own = [entry for entry in entries if entry.slot.stays is stays]
            with transfers.looking(ready):
                for entry in self._fingerprints.changed(own):
                    entry.is_stale = True

    def _note(self, entries: Sequence[Entry]) -> None:
        """Note that parameters are equal to their masters."""
        for entry in entries:
            entry.is_stale = False
        for stays, transfers in self._transfers.items() if self._places.parameters is None else ():
            with transfers.arriving():
                self._fingerprints.note([entry for entry in entries if entry.slot.stays is stays])

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
            elif is_changed(entry, state):
                puts[entry.number] = self._taken(entry, state, settings)
        self._put(puts)

    def take_over_others(self) -> None:
        """Bring to memory what was put into the optimizer's state for parameters that nothing is kept for here."""
        others = (state for parameter, state in self.state.items() if parameter not in self._numbers)
        for state in others:
            state.update({k: value.value() for k, value in state.items() if isinstance(value, StoredTensor)})

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
        taken: list[str] = []
        scalars: dict[str, Any] = {}
        for key, value in list(state.items()):
            if key not in names:
                scalars[key] = _as_count(value) if key == "step" and self._rule.counts else value
            elif value is None:
                del state[key]
            elif value is entry.stored.get(key):
                if (kept := entry.stored[key].let_go()) is not None:
                    puts[key] = entry.flat(kept)
            elif value is not entry.views.get(key):
                puts[key] = entry.flat(value)
                taken.append(key)
        entry.started = True
        if not self._rule.cuts:
            entry.scalars = [_copies(scalars) for _ in entry.scalars]
            scalars = entry.scalars[0]
        state.update(scalars)
        state.update(entry.views)
        for name in taken if not entry.views else ():
            del state[name]
        entry.shown = without_stored(entry, state)
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

    def runs(self, entry: Entry, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield a part of a parameter's column in runs, which are there until the next one is asked for.

        Args:
            entry: the parameter.
            name: of the column.
            start: the first element, in the order of the parameter's memory.
            stop: behind the last one.
        """
        entry = self._now(entry)
        found = []
        for chunk in self._layout.chunks_of([entry.number]):
            for piece in chunk.pieces:
                first, last = max(start, piece.start), min(stop, piece.stop)
                if piece.slot == entry.number and first < last:
                    place = piece.span(first, last)
                    found.append(Run(chunk=chunk, column=name, start=place.start, stop=place.stop))
        stays = entry.slot.stays
        with self._transfers[stays].apart():
            yield from self._tiers[stays].read(found)

    def put(self, entry: Entry, name: str, values: torch.Tensor) -> None:
        """Write values to a column of a parameter.

        Args:
            entry: the parameter.
            name: of the column.
            values: of the parameter's shape.
        """
        entry = self._now(entry)
        self._put({entry.number: {name: entry.flat(values)}})

    def _now(self, entry: Entry) -> Entry:
        """Return what is kept for a parameter now: it may have been moved since somebody asked for its columns."""
        return self._entries[self._numbers[entry.parameter]]

    def put_master(self, entry: Entry, values: torch.Tensor) -> None:
        """Set a parameter's master copy, and the parameter with it.

        Args:
            entry: that has a master.
            values: of its shape, plain or a DTensor.
        """
        flat = entry.flat(values)
        self._put({entry.number: {MASTER: flat}})
        entry.shard.copy_(flat)
        self._note([entry])

    def _put(self, puts: Mapping[int, _Puts]) -> None:
        @torch.no_grad()
        def put(chunk: StateChunk, columns: Columns) -> None:
            for piece in chunk.pieces:
                for name, value in puts.get(piece.slot, {}).items():
                    part = columns[name][piece.span(piece.start, piece.stop)]
                    if isinstance(value, StoredTensor):
                        copy_runs(value, into=part, start=piece.start)
                    elif isinstance(value, torch.Tensor):
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
            entry.is_stale = False


def _as_count(value: Any) -> torch.Tensor:
    number = local_tensor(value).item() if isinstance(value, torch.Tensor) else value
    return torch.tensor(float(number), dtype=torch.float32)


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: local_tensor(value).clone() if isinstance(value, torch.Tensor) else value for key, value in values.items()
    }

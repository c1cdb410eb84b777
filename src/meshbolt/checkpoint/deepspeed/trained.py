"""What DeepSpeed's optimizer files hold of the parameters that are trained: master weights and optimizer state, by name.

Stages 1 and 2 lay the parameters of a group one behind the other, and cut that row into one part a rank. Stage 3 cuts each
parameter into one part a rank, padded to the same length, and each rank lays its parts one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed.pieces import Row, joined
from meshbolt.errors import CheckpointError, UnsupportedError

Shapes = Mapping[str, Sequence[int]]
"""Of parameters, by name, in the order in which their values lie."""

_ROWS, _SHARDS, _BASE, _INNER = (
    "single_partition_of_fp32_groups",
    "fp32_flat_groups",
    "base_optimizer_state",
    "optimizer_state_dict",
)
# A row ends with padding, to a multiple of twice the ranks; some releases had a larger one.
_MOST_PADDING = 64


@dataclass(kw_only=True)
class Trained:
    """Parameters that some ranks train together.

    Attributes:
        masters: in full precision, by name.
        states: what the optimizer keeps for each, by name.
        groups: its settings for each group, with the names under "params"; None where the files do not have them.
        unknown: names of entries that it keeps in a form that is not known.
    """

    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] | None = None
    unknown: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the values of a parameter lie in each row.

    Attributes:
        name: the parameter's.
        shape: the parameter's.
        start: of its values.
        count: of them; of the last row some may be padding.
    """

    name: str
    shape: Sequence[int]
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One flat tensor of master weights, and what the optimizer keeps for it.

    Attributes:
        masters: without padding at its end.
        state: by key; empty before the first step.
        padding: how many elements more each tensor of the state has.
    """

    masters: torch.Tensor
    state: Mapping[str, Any]
    padding: int = 0

    def holds(self, value: Any) -> bool:
        """Return whether a value has an element for each master weight."""
        return (
            isinstance(value, torch.Tensor)
            and value.dim() > 0
            and value.numel() - self.masters.numel() in (0, self.padding)
        )


def stage_of(state: Mapping[str, Any]) -> int:
    """Return the stage that wrote an optimizer file; the optimizer for bfloat16, which does not say it, has stage 1."""
    return int(state.get("zero_stage", 1))


def trained_by(shapes: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]]) -> Trained:
    """Return what the optimizer files of some ranks hold.

    Args:
        shapes: of each group of parameters, or of each part of a group, as the model's file has them.
        ranks: the optimizer's state in the file of each rank.

    Raises:
        CheckpointError: they do not belong together.
        UnsupportedError: they are of a mixture of experts.
    """
    _check_ranks(ranks)
    return _trained_in_shards(shapes, ranks) if stage_of(ranks[0]) == 3 else _trained_in_rows(shapes, ranks)


def _check_ranks(ranks: Sequence[Mapping[str, Any]]) -> None:
    stages = sorted({stage_of(rank) for rank in ranks})
    if len(stages) > 1:
        raise CheckpointError(
            f"its optimizer files are of different stages of ZeRO, {stages}: they are of different saves"
        )
    counts = ranks[0].get("partition_count", len(ranks))
    count = max(counts) if isinstance(counts, (list, tuple)) else counts
    if count != len(ranks):
        what = "missing" if count > len(ranks) else "left over from another save"
        numbers = sorted({*range(count)} ^ {*range(len(ranks))})
        raise CheckpointError(
            f"it was saved by {count} data-parallel ranks, and has the optimizer files of {len(ranks)}: those of ranks {numbers} "
            f"are {what}"
        )


def _trained_in_rows(shapes: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]]) -> Trained:
    base = ranks[0][_BASE]
    settings = [dict(group) for group in base["param_groups"]] if isinstance(base, Mapping) else None
    found = Trained(groups=settings)
    paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    if [len(each) for each in paddings] != [len(group) for group in shapes] or len(ranks[0][_ROWS]) != len(shapes):
        raise CheckpointError(
            f"its optimizer files have {len(ranks[0][_ROWS])} groups of {[len(each) for each in paddings]} parameters, and the "
            f"model's file has groups of {[len(group) for group in shapes]}: they are of different saves"
        )
    for number, group in enumerate(shapes):
        places = list(_one_after_another(group, paddings=paddings[number]))
        parts = [_part_of(rank, number) for rank in ranks]
        _take(found, places, [parts])
        if found.groups is not None:
            found.groups[number]["params"] = [place.name for place in places]
    return found


def _part_of(rank: Mapping[str, Any], number: int) -> _Part:
    base = rank[_BASE]
    paddings = rank.get("group_paddings") or [0] * (number + 1)
    # Saves that were called elastic have a list, and the count of steps beside it.
    state = base["state"].get(number, {}) if isinstance(base, Mapping) else base[number]
    if "base_optimizer_state_step" in rank:
        state = {**state, "step": rank["base_optimizer_state_step"]}
    return _Part(masters=rank[_ROWS][number], state=state, padding=int(paddings[number]))


def _trained_in_shards(shapes: Sequence[Shapes], ranks: Sequence[Mapping[str, Any]]) -> Trained:
    if any(rank.get("ds_zero_partition_groups") for rank in ranks):
        raise UnsupportedError(
            "it is of a mixture of experts whose parts belong to different ranks, which is not read. Make it universal with "
            "DeepSpeed's ds_to_universal.py, and import that"
        )
    inner = ranks[0][_INNER]
    found = Trained(groups=[dict(group) for group in inner["param_groups"]])
    named = {name: shape for group in shapes for name, shape in group.items()}
    places = list(_one_after_another(named, world=len(ranks)))
    rows = [
        [
            _Part(masters=shard, state=rank[_INNER]["state"].get(number, {}))
            for number, shard in enumerate(rank[_SHARDS])
        ]
        for rank in ranks
    ]
    _take(found, places, rows)
    whole = Row([part.masters for part in rows[0]])
    for group in found.groups or ():
        numbers = set(group["params"])
        group["params"] = [place.name for place in places if whole.at(place.start) in numbers]
    return found


def _one_after_another(shapes: Shapes, *, paddings: Sequence[int] | None = None, world: int = 1) -> Iterator[_Place]:
    """Yield where parameters lie in a row.

    Args:
        shapes: of the parameters in their order.
        paddings: elements between each one and the next.
        world: into how many rows each is cut.
    """
    start = 0
    for number, (name, shape) in enumerate(shapes.items()):
        count = -(-torch.Size(shape).numel() // world)
        yield _Place(name=name, shape=tuple(shape), start=start, count=count)
        start += count + (paddings[number] if paddings else 0)


def _take(found: Trained, places: Sequence[_Place], rows: Sequence[Sequence[_Part]]) -> None:
    """Take the parameters of some rows: of each, its piece of every row."""
    lengths = [[part.masters.numel() for part in parts] for parts in rows]
    _check_lengths(places, lengths)
    masters = [Row([part.masters for part in parts]) for parts in rows]
    keys = list(dict.fromkeys(key for parts in rows for part in parts for key in part.state))
    spread: dict[str, list[Row]] = {}
    for key in keys:
        if any(part.holds(part.state.get(key)) for parts in rows for part in parts):
            values = [
                [part.state.get(key) if part.holds(part.state.get(key)) else None for part in parts] for parts in rows
            ]
            spread[key] = [Row(each, lengths=counts) for each, counts in zip(values, lengths, strict=True)]
    for place in places:
        master = _cut(masters, place)
        if master is not None:
            found.masters[place.name] = master
        state = {}
        for key in keys:
            value = _cut(spread[key], place) if key in spread else _number(rows, masters, place, key, found)
            if value is not None:
                state[key] = value
        if state:
            found.states[place.name] = state


def _cut(rows: Sequence[Row], place: _Place) -> torch.Tensor | None:
    return joined(rows, start=place.start, count=place.count, shape=place.shape, name=place.name)


def _number(
    rows: Sequence[Sequence[_Part]], masters: Sequence[Row], place: _Place, key: str, found: Trained
) -> torch.Tensor | None:
    """Return what is one value for a whole part, such as the count of steps."""
    if len(rows) == 1:  # all parts are of one group
        concerned = list(rows[0])
    else:
        at = [row.at(place.start) for row in masters]
        concerned = [parts[number] for parts, number in zip(rows, at, strict=True) if number < len(parts)]
    values = [part.state.get(key) for part in concerned]
    if any(isinstance(value, torch.Tensor) and value.numel() != 1 for value in values):
        found.unknown.add(key)
        return None
    numbers = [value for value in values if value is not None]
    if not numbers or not all(isinstance(value, (int, float, torch.Tensor)) for value in numbers):
        found.unknown.update([key] if numbers else [])
        return None
    if len({float(value) for value in numbers}) > 1:
        raise CheckpointError(
            f"its ranks have done different numbers of steps: {key!r} of {place.name!r} is {[float(each) for each in numbers]} "
            "by rank, so its files are of different saves"
        )
    return torch.tensor(float(numbers[0]))


def _check_lengths(places: Sequence[_Place], lengths: Sequence[Sequence[int]]) -> None:
    needed = places[-1].start + places[-1].count if places else 0
    sums = [sum(counts) for counts in lengths]
    if any(not needed <= each <= needed + _MOST_PADDING * max(len(lengths), len(lengths[0])) for each in sums):
        raise CheckpointError(
            f"its optimizer files have {sums} master weights by rank or in all, where the shapes in the model's file make "
            f"{needed}: a file is missing, damaged, or of another save"
        )


def merged(slots: Sequence[Trained]) -> Trained:
    """Return what the stages of a pipeline train, together; of a tied parameter, what the first one has.

    Args:
        slots: of each stage.
    """
    whole = Trained(groups=None if slots[0].groups is None else [])
    same = len({len(each.groups or ()) for each in slots}) == 1
    by_key: dict[Any, dict[str, Any]] = {}
    for each in slots:
        whole.unknown |= each.unknown
        whole.masters = {**each.masters, **whole.masters}
        whole.states = {**each.states, **whole.states}
        for number, group in enumerate(each.groups or ()):
            settings = {key: value for key, value in group.items() if key != "params"}
            into = by_key.setdefault(number if same else repr(settings), {**settings, "params": []})
            taken = {name for other in by_key.values() for name in other["params"]}
            into["params"] += [name for name in group["params"] if name not in taken]
    if whole.groups is not None:
        whole.groups += by_key.values()
    return whole
